"""Step 1 of KDP beside the limit of matrix products, and step 2 from its closed form beside the recipe of the paper.

The operations of an iteration of step 1 are counted: features and their gradient, Gram and cross matrices, predictions
and their gradient in float32; Cholesky and its solves in float64. The limit is the time of square products with the
same number of operations, measured in the same turns. The time of step 1 is the time in its own curve, without judging.

Step 2 starts at random, as in the paper, or at the best linear decoding of the features (kdp_core.methods.kdp.inverse).
The first epochs of the random start are compared with the time in which the other start reaches the same held-out
error.
"""
from typing import Any

import torch

from kdp_core.methods.kdp import inverse, kernel
from stage.setup import Setup
from stage.timing import Clock, Row, Times, figure, kept, products, timed, turns_of_products


def measure(setup: Setup) -> list[Row]:
    """Both steps on one block."""
    given = {"features": setup.size(1024, 32), "epochs": 1, "batch_sequences": setup.size(100, 8), "heldout": 0.2}
    fitted: list[Any] = []
    training(setup, given, fitted)
    rows = [step_1(setup, given, fitted)]
    return [*rows, *step_2(setup, fitted[-1])]


def training(setup: Setup, given: dict[str, Any], fitted: list[Any]) -> Clock:
    """One fit; its time is the seconds of training alone."""
    fitted.append(kernel.fit(setup.hidden, setup.block, **given))
    return Clock(fitted[-1].curve[-1]["seconds"], fitted[-1].curve[-1]["seconds"])


def step_1(setup: Setup, given: dict[str, Any], fitted: list[Any]) -> Row:
    """Training beside the limit."""
    single, double = flops(fitted[-1].stats["tokens"], setup.facts.width, given["features"], 2, setup.hidden.sequences,
                           given)
    runs = {"single": products(), "double": products(torch.float64)}
    times = Times({"ours": [], "limit": []})
    for _ in range(setup.repeats):
        before = {name: timed(run) for name, run in runs.items()}
        times["ours"].append(training(setup, given, fitted))
        after = {name: timed(run) for name, run in runs.items()}
        took = {name: (before[name].wall + after[name].wall) / 2 for name in runs}
        limit = took["single"] * turns_of_products(single) + took["double"] * turns_of_products(double)
        times["limit"].append(Clock(limit, limit))
    return times.row("step 1, training", "ours", "limit", target=0.8, against="limit of matrix products")


def flops(tokens: int, width: int, features: int, layers: int, sequences: int, given: dict[str, Any]) -> tuple[
        float, float]:
    """Operations of one epoch in float32 and in float64."""
    batches = -(-round(sequences * (1 - given["heldout"])) // given["batch_sequences"])
    # lift and gradient to Omega; Gram, cross, prediction and its gradient
    single = tokens * ((layers + 1) * 2 * width * features + layers * 8 * features ** 2)
    return single, batches * layers * 7 * features ** 3 / 3


def step_2(setup: Setup, kernel_map: Any) -> list[Row]:
    """The two starts: seconds to the error that the random start reaches, and both errors."""
    given = {"width": setup.size(1024, 64), "epochs": setup.size(20, 2), "heldout": 0.2}
    began = inverse.fit(setup.hidden, kernel_map, **given)
    closed, clock = kept(lambda: inverse.fit(setup.hidden, kernel_map, **{**given, "start": "ridge", "epochs": 0}))
    best = min(began.curve, key=lambda entry: entry["heldout_error"])
    error, goal = closed.stats["heldout_error"], best["heldout_error"]
    reached = error <= goal
    rows = [figure("step 2, held-out error of the closed form", error, "",
                   f"best of {given['epochs']} epochs from a random start", goal, target=1.0, at_most=True)]
    ratio = best["seconds"] / clock.wall
    row = Row("step 2, time to that error", clock.wall, "s", "training from a random start", best["seconds"], ratio,
              None, "at least 10", bool(reached and ratio >= 10))
    return [*rows, row]
