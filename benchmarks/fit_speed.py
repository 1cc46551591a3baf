"""Measures how fast closed-form fits reach the held-out error of KDP's recipe: `python benchmarks/fit_speed.py`.

All fits run in one process, one after the other, on one block of the embedded model. All fits use the same states and
hold out the same sequences. Two kinds of fits are compared:
(1) the recipe of the paper (KDP, ICLR 2026, Algorithm 1: 100 epochs of step 1, then 100 epochs of step 2). The recipe
    is run exactly as written, and as we interpret it (kernel width from the median distance, step 2 on standardised
    features);
(2) the closed-form fits that the table FITS lists.
All fits are judged by the relative squared error of the block's last state on held-out sequences; massive tokens bypass
the stand-in. An error of 1 means that a fit is as good as the prediction of the mean state for every token. The time of
the recipe includes only the epochs of training. The time of a closed-form fit includes everything, also the reading of
the states and the judgement. The comparison of times is therefore biased in favour of the recipe.

The recipe can predict states only after step 1, so the curve of the recipe begins at the end of step 1. The dashed
curve is for step 1 alone: a ridge regression decodes the states from the features, and the curve shows its error. The
error of this ridge regression is measured every few epochs, and the time of the measurement is not added to the
recipe's time.

The command writes fit_speed.png, .pdf and .csv (the curves) and fit_speed_table.csv (errors and times of all fits) to
results/benchmarks. The estimated time is an hour on two cores; `--epochs 3` runs all parts in three minutes.
"""
import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kdp_core.base import store
from kdp_core.base.records import Block
from kdp_core.figures import style
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp import inverse, kernel, linear
from kdp_core.methods.kdp_residual import closed_form, dictionaries
from kdp_core.model import checkpoints, passes
from kdp_core.states import hidden
from kdp_core.states.block import FitError, load, relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger("fit_speed")
HIDDEN = embedded.ROOT / "results/smollm2-135m/news/hidden.zarr"
"""The states of 128 sequences of news that `make demo` stores."""
DENSE = embedded.ROOT / "results/smollm2-135m/dense"
CLOSED = "closed form"
NEAR = 1.05
"""A recipe is near its best error if its error is at most this factor times the best error."""


class Recipe(NamedTuple):
    """Options that differ from the library's defaults: of step 1 (`kernel`) and of step 2 (`inverse`)."""
    kernel: dict[str, Any]
    inverse: dict[str, Any]


RECIPES = {
    "kdp to the letter": Recipe({"bandwidth": "unit", "bandwidth_scale": 1.0}, {"standardise": False}),
    "kdp as meant": Recipe({}, {}),
}
Fitted = tuple[float, float]
"""Held-out error, and seconds of the fit; the seconds include the loading of states and the judgement."""


def linear_fit(states_of: HiddenStates, block: Block, seed: int, dense: Path) -> Fitted:
    """The affine map in closed form."""
    stats = linear.direct(states_of, block, seed=seed).stats
    return stats["heldout_error"], stats["seconds"]


def residual_fit(states_of: HiddenStates, block: Block, seed: int, dense: Path) -> Fitted:
    """The closed form of kdp_residual: a linear part and 96 neurons that are chosen from the MLPs of the block."""
    began = time.perf_counter()
    model = checkpoints.load_model(dense)
    options = dictionaries.closed_form_options(model, states_of, dictionary="neurons", entries=96, seed=seed)
    split = load(states_of, block, massive="bypass", heldout=0.1, seed=seed, between=False)
    h_STD, y_STD = split.h_KSTD
    module = closed_form.fit_stand_in(block, dictionaries.neurons(model, block), h_STD[split.train], y_STD[split.train],
                                      options)
    h_ND, y_ND = split.tokens(split.heldout)
    with torch.no_grad():
        error = relative_error(passes.built(module)(h_ND), y_ND)
    return error, time.perf_counter() - began


FITS: dict[str, Callable[[HiddenStates, Block, int, Path], Fitted]] = {
    "linear": linear_fit,
    "kdp_residual": residual_fit,
}


def run_recipe(name: str, states_of: HiddenStates, block: Block, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run both steps of one recipe.

    The curve has a row for each epoch, with the seconds since the start of step 1, and ends if a step fails.
    """
    recipe, rows = RECIPES[name], []
    try:
        # a collapsed kernel does not stop the run here, so that the curve shows the collapse
        first = kernel.fit(states_of, block, **{
            "features": options.features, "epochs": options.epochs, "decode_every": options.decode_every,
            "seed": options.seed, "collapse_variance": 0.0, **recipe.kernel})
        rows += [{"fit": name, "step": "kernel", "epoch": row["epoch"], "seconds": row["seconds"],
                  "error": row["decode_error"]} for row in first.curve if "decode_error" in row]
        second = inverse.fit(states_of, first, **{"width": options.width, "epochs": options.epochs,
                                                  "seed": options.seed, **recipe.inverse})
    except (FitError, TrainingFailed, kernel.KernelCollapsed) as error:
        logger.warning("%s ended: %s", name, error)
        return rows
    return rows + [{"fit": name, "step": "inverse", "epoch": row["epoch"],
                    "seconds": first.curve[-1]["seconds"] + row["seconds"], "error": row["heldout_error"]}
                   for row in second.curve]


def run_fit(name: str, states_of: HiddenStates, block: Block, dense: Path,
            options: argparse.Namespace) -> dict[str, Any]:
    """Run one closed-form fit --repeats times, after one run that is not timed.

    The returned seconds are the median of these runs.
    """
    found = [FITS[name](states_of, block, options.seed, dense) for _ in range(options.repeats + 1)][1:]
    return {"fit": name, "step": CLOSED, "epoch": 0, "error": found[0][0],
            "seconds": statistics.median(seconds for _, seconds in found)}


def nothing_done(states_of: HiddenStates, block: Block, seed: int) -> float:
    """The error without a stand-in: the state before the block is compared with the state after the block."""
    split = load(states_of, block, massive="bypass", heldout=0.1, seed=seed, between=False)
    return relative_error(*split.tokens(split.heldout))


def compare(curves: pd.DataFrame) -> pd.DataFrame:
    """Compare each recipe with each closed-form fit.

    Each row contains the best error of a recipe, the time until the recipe reaches this error, and the speed-up by the
    fit. A row with step `inverse` is about the whole recipe. A row with step `kernel` is about step 1 alone: a ridge
    regression decodes the features, and its time is not counted. `speedup` uses the time to the recipe's best error.
    `speedup_near` uses the time to the first epoch whose error is within 5 % of the best error. Both are NaN if the fit
    does not reach the best error.
    """
    rows = []
    for (recipe, step), curve in curves[curves["step"] != CLOSED].groupby(["fit", "step"], sort=False):
        best = curve.loc[curve["error"].idxmin()]
        near = curve.loc[curve["error"] <= NEAR * best["error"], "seconds"].min()
        for _, fit in curves[curves["step"] == CLOSED].iterrows():
            reached = fit["error"] <= best["error"]
            rows.append({"recipe": recipe, "step": step, "best_error": best["error"], "best_epoch": best["epoch"],
                         "best_seconds": best["seconds"], "near_seconds": near,
                         "last_seconds": curve["seconds"].max(), "fit": fit["fit"], "fit_error": fit["error"],
                         "fit_seconds": fit["seconds"], "reached": reached,
                         "speedup": best["seconds"] / fit["seconds"] if reached else float("nan"),
                         "speedup_near": near / fit["seconds"] if reached else float("nan")})
    return pd.DataFrame(rows)


def draw(curves: pd.DataFrame, nothing: float, block: Block) -> style.Drawn:
    """Draw the held-out error against seconds, on log axes: curves for recipes, points for closed-form fits."""
    with style.quiet():
        figure = Figure(figsize=(style.PAGE_IN, 3.0))
        axis = figure.subplots()
        for place, (name, own) in enumerate(curves.groupby("fit", sort=False)):
            color, marker = (looks[place % len(looks)] for looks in (style.COLORS, style.MARKERS))
            for step, look in (("kernel", {"linestyle": style.DASHES[1], "label": f"{name}, step 1 by ridge"}),
                                ("inverse", {"label": f"{name}, both steps"}),
                                (CLOSED, {"label": name, "marker": marker, "linestyle": "none",
                                          "markersize": 7})):
                part = own[own["step"] == step]
                if not part.empty:
                    axis.plot(part["seconds"], part["error"], color=color, **look)
        axis.axhline(nothing, color=style.GREY, linestyle=":", linewidth=0.9, label="block removed")
        axis.set(xscale="log", yscale="log", xlabel="Seconds of fitting",
                 ylabel="Held-out relative error of the last state",
                 title=f"Block {block[0]}-{block[1]}")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        style.plain_log(axis)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    return style.Drawn(figure, curves)


def make_states(block: Block, dense: Path, folder: Path, sequences: int | None = None) -> HiddenStates:
    """Extract the block's states over the default calibration set, or over `sequences` sequences of each text."""
    tokens = embedded.calibration_tokens(dense, embedded.default_config(), sequences=sequences)
    hidden.extract(checkpoints.load_model(dense), tokens, folder / "hidden.zarr",
                   layers=list(range(block[0], block[1] + 1)))
    return hidden.read(folder / "hidden.zarr")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=Path, help="stored states (of `make demo`; extracted if they are missing)")
    parser.add_argument("--sequences", type=int, help="extract the states of this number of sequences of each text")
    parser.add_argument("--dense", type=Path, help="converted checkpoint of the model (of `make demo`)")
    parser.add_argument("--block", default="14-16", help="first layer and last layer plus one (14-16)")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of each step (100)")
    parser.add_argument("--features", type=int, default=1024, help="features of the kernel, the paper's 2m (1024)")
    parser.add_argument("--width", type=int, default=1024, help="hidden width of the inverse network (1024)")
    parser.add_argument("--decode-every", type=int, default=5,
                        help="epochs of step 1 between two decodings by ridge (5)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each closed-form fit (3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out split and of the trainings (0)")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    options = parser.parse_args(given)
    start, _, stop = options.block.partition("-")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        parser.error(f"--block {options.block!r}: give the first layer and the last layer plus one, such as 14-16")
    if min(options.epochs, options.repeats, options.threads) < 1:
        parser.error("--epochs, --repeats and --threads: give 1 or more")
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Run all fits, write the curves and the table, print the table."""
    options = arguments(given)
    block: Block = tuple(int(layer) for layer in options.block.split("-"))
    embedded.set_threads(options.threads)
    path = options.hidden or (HIDDEN if HIDDEN.exists() and not (options.dense or options.sequences) else None)
    with tempfile.TemporaryDirectory() as folder:
        dense = options.dense or (DENSE if DENSE.exists() else
                                  embedded.dense_model(Path(folder), embedded.default_config())[0])
        states_of = hidden.read(path) if path else make_states(block, dense, Path(folder), options.sequences)
        rows = [run_fit(name, states_of, block, dense, options) for name in FITS]
        for name in RECIPES:
            rows += run_recipe(name, states_of, block, options)
        nothing = nothing_done(states_of, block, options.seed)
    curves = pd.DataFrame(rows)[["fit", "step", "epoch", "seconds", "error"]]
    table = compare(curves)
    style.save(draw(curves, nothing, block), options.out / "fit_speed")
    store.write_text(options.out / "fit_speed_table.csv", table.to_csv(index=False, lineterminator="\n"))
    print(table.to_string(index=False, float_format="%.4g"))
    print(f"\nblock removed: {nothing:.4g}; {options.threads} threads; written to {options.out}")
    return table


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
