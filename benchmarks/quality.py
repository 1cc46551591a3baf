"""Compares the quality of pruned models at the same share of removed parameters: `python benchmarks/quality.py`.

The comparison runs on the embedded model, for several ratios and calibration seeds. Every variant of VARIANTS is fitted
on the same calibration tokens (news), folded, and scored on the same held-out news (perplexity, last words,
continuations). For each variant, the fine-tuned variant is also measured; its name ends with `+ft`, or with `+lora` if
all linear layers are fine-tuned (--tune-targets linear). If a folder of real benchmark sets is given (--data), some of
these tasks are also scored, at the ratios of --data-ratios.

A row is written to <out>/quality/ as soon as its variant is measured, and no variant is measured twice. So the run can
be stopped and continued, and processes can share it by --seeds, --ratios or --methods. After each variant, the table of
all rows so far is written to <out>/quality.csv. Its columns are
    ppl, ppl_stderr, ppl_ratio  held-out perplexity, and its ratio to the dense model's perplexity
    acc, acc_stderr, rp         mean accuracy of the held-out tasks, and its share of the dense model's mean, in percent
    params_removed              share of all parameters that was removed, less the parameters of stand-ins
    fit_seconds                 seconds of the fit, fine-tuning included
    search_seconds              seconds of the search that orders the layers; one search serves all ratios
"""
import argparse
import logging
import shutil
from collections.abc import Sequence
from typing import Any

import embedded
import pandas as pd
import protocol
from protocol import CKA, FREE, FT, KDP, RESIDUAL, Calibrated, Setup, Variant

from kdp_core import methods
from kdp_core.base import store
from kdp_core.base.records import Selection
from kdp_core.prune import fold

logger = logging.getLogger("quality")


def changed(**compose: Any) -> dict[str, dict[str, Any]]:
    """The options of kdp_residual, in which `compose` overrides the options of the fit.

    The removed layers do not depend on the options of the fit.
    """
    return {**RESIDUAL, "compose": {**RESIDUAL["compose"], **compose}}


VARIANTS = {
    "remove": Variant("remove", 3, {"block": CKA}),
    "linear": Variant("linear", 3, {"block": CKA}),
    "linear_prefix": Variant("linear_prefix", 3, {"block": CKA}),
    "replaceme_lstsq": Variant("replaceme_lstsq", 3, {}),
    "replaceme_masked": Variant("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "replaceme_after_sink": Variant("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "kdp": Variant("kdp", 3, KDP),
    "kdp_residual": Variant("kdp_residual", FREE, RESIDUAL),
    # variants that show the effect of each part of kdp_residual
    "closed_form": Variant("kdp_residual", FREE, changed(epochs=0)),
    "dense_states": Variant("kdp_residual", FREE, changed(epochs=0, prefix=False)),
    "linear_only": Variant("kdp_residual", FREE, changed(epochs=0, dictionary="none")),
    "linear_trained": Variant("kdp_residual", FREE, changed(dictionary="none")),
    "random_features": Variant("kdp_residual", FREE, changed(epochs=0, dictionary="rff", entries=149)),
    "random_trained": Variant("kdp_residual", FREE, changed(dictionary="rff", entries=149)),
    "unweighted": Variant("kdp_residual", FREE, changed(epochs=0, token_weight="none")),
    "outputs_alone": Variant("kdp_residual", FREE, changed(kl_weight=1.0)),
    "cka_layers": Variant("kdp_residual", FREE, RESIDUAL),
}
"""In `replaceme_after_sink`, the replaced block is moved so that it begins at layer 12, because layer 11 writes the
massive activations of this model. The features of `random_*` have as many parameters as 96 neurons. `cka_layers`
selects single layers by the CKA between the state before and the state after a layer."""
MAIN = ("remove", "linear", "linear_prefix", "replaceme_lstsq", "kdp", "kdp_residual")


def chosen(name: str, setup: Setup, calibrated: Calibrated, ratio: float) -> tuple[Selection, float]:
    """Select the blocks of a variant. Return the selection and the seconds of the search."""
    variant, facts = VARIANTS[name], setup.facts
    if name == "replaceme_after_sink":
        (start, stop), = chosen("replaceme_lstsq", setup, calibrated, ratio)[0].blocks
        return Selection([(12, 12 + stop - start)], [], "given", ratio, ratio, ratio, variant.k_max, [],
                         stop - start), 0.0
    if name == "cka_layers":
        # with K_max = 2, a block is a single layer; blocks may be adjacent, as in the search
        size = methods.method_of(variant.method).module_params(facts, variant.options)
        return methods.method_of("linear").select(calibrated.similarity, facts, ratio=ratio, k_max=2,
                                                  module_params=size, **CKA), 0.0
    return protocol.chosen(variant, setup, calibrated, ratio)


def measure(name: str, ratio: float, seed: int, setup: Setup, calibrated: Calibrated,
            options: argparse.Namespace) -> None:
    """Fit, fold and score one variant and, if asked for, its fine-tuned variant.

    Rows that are on disk are not measured again.
    """
    at = setup.folder / "rows" / f"seed{seed}-{name}-r{ratio:g}"
    real = ratio in options.data_ratios
    tune = name in options.tuned and seed in options.tuned_seeds
    end = FT[options.tune_targets]
    row, tuned_row = protocol.row_path(at), protocol.row_path(at, end)
    if row.exists() and (tuned_row.exists() or not tune):
        return
    selection, search_seconds = chosen(name, setup, calibrated, ratio)
    plan, seconds, kl = protocol.fitted(VARIANTS[name], setup, calibrated, selection)
    pruned = fold.fold(plan, setup.dense, at / "checkpoint")
    about = {"ratio": ratio, "seed": seed, "search_seconds": search_seconds,
             "blocks": " ".join(f"{start}-{stop}" for start, stop in pruned.blocks)}
    if not row.exists():
        store.write_json(row, {"method": name, **about, **protocol.counted(pruned), "fit_seconds": seconds,
                               "heldout_kl": kl, **setup.judge.score(at / "checkpoint", real)})
    if tune:
        after, tune_seconds = protocol.tuned(setup, calibrated, pruned, at, options)
        store.write_json(tuned_row, {"method": name + end, **about, **protocol.counted(after),
                                     "fit_seconds": seconds + tune_seconds, "heldout_kl": None,
                                     **setup.judge.score(at / "tuned", real)})
    shutil.rmtree(at)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = protocol.arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(MAIN), choices=list(VARIANTS), metavar="VARIANT",
                        help=f"variants to measure, of {', '.join(VARIANTS)} ({' '.join(MAIN)})")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.25, 0.3],
                        help="shares of the parameters to remove (0.1 0.2 0.25 0.3)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the calibration (0 1 2)")
    parser.add_argument("--tuned", nargs="*", default=list(MAIN),
                        help=f"variants that get a fine-tuned variant too ({' '.join(MAIN)})")
    parser.add_argument("--tuned-seeds", nargs="*", type=int, default=[0, 1, 2],
                        help="the calibration seeds of fine-tuned variants (0 1 2)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure the variants that are not on disk, write the table and print it."""
    options = arguments(given)
    setup = protocol.prepare(options.out / "quality", options)
    for ratio in options.ratios:
        for seed in options.seeds:
            calibrated = protocol.calibrate(setup, seed, options.sequences)
            for name in options.methods:
                measure(name, ratio, seed, setup, calibrated, options)
                protocol.table(setup.folder, options.out / "quality.csv", list(VARIANTS))
                logger.info("seed %d, ratio %g: %s", seed, ratio, name)
    frame = protocol.table(setup.folder, options.out / "quality.csv", list(VARIANTS))
    print(frame[["method", "ratio", "seed", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
                 "fit_seconds"]].to_string(index=False, float_format="%.4g"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
