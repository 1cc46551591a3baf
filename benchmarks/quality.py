"""Which method keeps most of the model at the same share of parameters removed: `python benchmarks/quality.py`.

On the embedded model, for several ratios and calibration seeds: every row of ROWS fitted on the same calibration
tokens (news), folded, and scored on the same held-out news (perplexity, last words, continuations); beside each its
fine-tuned variant, marked `+ft`. Where a folder of real benchmark sets is at hand (--data), some of their tasks are
scored too, on the ratios of --data-ratios.

A row is written as soon as it is measured, to <out>/quality/, and never measured again: the run can be stopped, split
between processes by --seeds, --ratios or --methods, and gone on with. The table of all that is there is written each
time to <out>/quality.csv:
    ppl, ppl_stderr, ppl_ratio  held-out perplexity; beside the dense model's
    acc, acc_stderr, rp         mean accuracy of the held-out tasks, in percent; beside the dense model's
    params_removed              share of all parameters, what was put back counted
    fit_seconds, search_seconds fitting (fine-tuning counted), and ordering layers, of which one serves all ratios
"""
import argparse
import logging
import shutil
from collections.abc import Sequence
from typing import Any

import pandas as pd
import protocol
from protocol import CKA, FREE, FT, KDP, RESIDUAL, Calibrated, Ground, Row

from kdp_core import methods
from kdp_core.base import store
from kdp_core.base.records import Selection
from kdp_core.prune import finetune, fold

logger = logging.getLogger("quality")


def changed(**compose: Any) -> dict[str, dict[str, Any]]:
    """kdp_residual with some options of its fit changed; the layers stay those of kdp_residual."""
    return {**RESIDUAL, "compose": {**RESIDUAL["compose"], **compose}}


ROWS = {
    "remove": Row("remove", 3, {"block": CKA}),
    "linear": Row("linear", 3, {"block": CKA}),
    "linear_prefix": Row("linear_prefix", 3, {"block": CKA}),
    "replaceme_lstsq": Row("replaceme_lstsq", 3, {}),
    "replaceme_masked": Row("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "replaceme_after_sink": Row("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "kdp": Row("kdp", 3, KDP),
    "kdp_residual": Row("kdp_residual", FREE, RESIDUAL),
    # what each part of kdp_residual is worth
    "closed_form": Row("kdp_residual", FREE, changed(epochs=0)),
    "dense_states": Row("kdp_residual", FREE, changed(epochs=0, prefix=False)),
    "linear_only": Row("kdp_residual", FREE, changed(epochs=0, dictionary="none")),
    "linear_trained": Row("kdp_residual", FREE, changed(dictionary="none")),
    "random_features": Row("kdp_residual", FREE, changed(epochs=0, dictionary="rff", entries=149)),
    "random_trained": Row("kdp_residual", FREE, changed(dictionary="rff", entries=149)),
    "unweighted": Row("kdp_residual", FREE, changed(epochs=0, token_weight="none")),
    "outputs_alone": Row("kdp_residual", FREE, changed(kl_weight=1.0)),
    "cka_layers": Row("kdp_residual", FREE, RESIDUAL),
}
"""`replaceme_after_sink`: its run moved to start at layer 12, since layer 11 writes this model's massive activations.
`random_*`: as many parameters as 96 neurons. `cka_layers`: single layers by CKA of their two states."""
MAIN = ("remove", "linear", "linear_prefix", "replaceme_lstsq", "kdp", "kdp_residual")


def chosen(name: str, ground: Ground, made: Calibrated, ratio: float) -> tuple[Selection, float]:
    """The blocks of a row, and the seconds of the search."""
    row, facts = ROWS[name], ground.facts
    if name == "replaceme_after_sink":
        (start, stop), = chosen("replaceme_lstsq", ground, made, ratio)[0].blocks
        return Selection([(12, 12 + stop - start)], [], "given", ratio, ratio, ratio, row.k_max, [],
                         stop - start), 0.0
    if name == "cka_layers":
        # K_max = 2 removes single layers; touching contexts, as the search allows
        size = methods.method_of(row.method).module_params(facts, row.options)
        return methods.method_of("linear").select(made.similarity, facts, ratio=ratio, k_max=2, module_params=size,
                                                  **CKA), 0.0
    return protocol.chosen(row, ground, made, ratio)


def measure(name: str, ratio: float, seed: int, ground: Ground, made: Calibrated, options: argparse.Namespace) -> None:
    """Fit, fold and score one row and its fine-tuned variant; what is on disk already is not measured again."""
    row, at = ROWS[name], ground.folder / "rows" / f"seed{seed}-{name}-r{ratio:g}"
    real = ratio in options.data_ratios
    wanted = [at.with_name(at.name + ".json")]
    tune = name in options.tuned and seed in options.tuned_seeds
    if tune:
        wanted.append(at.with_name(at.name + FT + ".json"))
    if all(path.exists() for path in wanted):
        return
    selection, search_seconds = chosen(name, ground, made, ratio)
    plan, seconds, kl = protocol.fitted(row, ground, made, selection)
    pruned = fold.fold(plan, ground.dense, at / "checkpoint")
    about = {"ratio": ratio, "seed": seed, "search_seconds": search_seconds,
             "blocks": " ".join(f"{start}-{stop}" for start, stop in pruned.blocks)}
    if not wanted[0].exists():
        store.write_json(wanted[0], {"method": name, **about, **protocol.counted(pruned), "fit_seconds": seconds,
                                     "heldout_kl": kl, **ground.judge.score(at / "checkpoint", real)})
    if tune:
        after, record = finetune.finetune(ground.dense, at / "checkpoint", at / "tuned",
                                          protocol.sample(made.tokens, options.tune_on), pruned,
                                          epochs=options.tune_epochs)
        store.write_json(wanted[1], {"method": name + FT, **about, **protocol.counted(after),
                                     "fit_seconds": seconds + record.seconds, "heldout_kl": None,
                                     **ground.judge.score(at / "tuned", real)})
    shutil.rmtree(at)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = protocol.arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(MAIN), choices=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (those of the table of methods)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.25, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--tuned", nargs="*", default=list(MAIN), help="rows that get a fine-tuned variant too")
    parser.add_argument("--tuned-seeds", nargs="*", type=int, default=[0, 1, 2], help="and for which seeds")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not there yet, write the table, print it."""
    options = arguments(given)
    ground = protocol.prepare(options.out / "quality", options)
    for ratio in options.ratios:
        for seed in options.seeds:
            made = protocol.calibrate(ground, seed, options.sequences)
            for name in options.methods:
                measure(name, ratio, seed, ground, made, options)
                protocol.table(ground.folder, options.out / "quality.csv", list(ROWS))
                logger.info("seed %d, ratio %g: %s", seed, ratio, name)
    frame = protocol.table(ground.folder, options.out / "quality.csv", list(ROWS))
    print(frame[["method", "ratio", "seed", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
                 "fit_seconds"]].to_string(index=False, float_format="%.4g"))
    return frame


if __name__ == "__main__":
    protocol.log_to_stderr()
    main()
