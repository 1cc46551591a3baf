"""Compares step 1 of KDP with the limit of matrix products, and the closed-form start of step 2 with the paper's
recipe.

The operations of an update of step 1 are counted. Float32 operations compute the features, the Gram and cross matrices,
the predictions, and the gradients of features and predictions. Float64 operations compute Cholesky factors, and solve
equations with these factors. The limit is the time that products of square matrices need for the same number of
operations. These products are timed just before and just after step 1. The time of step 1 is the time in its training
curve, which does not include the judgement.

Two starts of step 2 are compared: random weights, as in the paper, and the closed form, which is the best linear
decoding of the features (kdp_core.methods.kdp.inverse). From the random start, step 2 is trained for some epochs. The
time to the best held-out error of these epochs is compared with the time of the closed form, which must reach the same
error.
"""
from typing import Any

import torch

from kdp_core.methods.kdp import inverse, kernel
from stage.setup import Setup
from stage.timing import Clock, Row, Times, figure, kept, products, timed, turns_of_products


def measure(setup: Setup) -> list[Row]:
    """Measure both steps on one block."""
    given = {"features": setup.size(1024, 32), "epochs": 1, "batch_sequences": setup.size(100, 8), "heldout": 0.2}
    fitted: list[Any] = []
    training(setup, given, fitted)
    rows = [step_1(setup, given, fitted)]
    return [*rows, *step_2(setup, fitted[-1])]


def training(setup: Setup, given: dict[str, Any], fitted: list[Any]) -> Clock:
    """Fit step 1 once. The returned time is the seconds of training alone."""
    fitted.append(kernel.fit(setup.hidden, setup.block, **given))
    return Clock(fitted[-1].curve[-1]["seconds"], fitted[-1].curve[-1]["seconds"])


def step_1(setup: Setup, given: dict[str, Any], fitted: list[Any]) -> Row:
    """Compare the time of training with the limit of matrix products."""
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
    """Two numbers for one epoch: the float32 operations, and the float64 operations."""
    batches = -(-round(sequences * (1 - given["heldout"])) // given["batch_sequences"])
    # lift and gradient to Omega; Gram, cross, prediction and its gradient
    single = tokens * ((layers + 1) * 2 * width * features + layers * 8 * features ** 2)
    return single, batches * layers * 7 * features ** 3 / 3


def step_2(setup: Setup, kernel_map: Any) -> list[Row]:
    """Compare the two starts: their held-out errors, and their times to the best error of the random start."""
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
