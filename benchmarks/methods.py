"""Every method of the table at the same share of parameters removed: `python benchmarks/methods.py`.

On the embedded model, at 0.10 and 0.25: each row fitted on the same calibration tokens (news), folded, and scored on
the same held-out news as in quality.py, and on real benchmark sets where they are at hand (--data). A row runs in a
process of its own, so that the peak of its memory is its own. A method that cannot reach a ratio, or refuses the model,
keeps its row with the reason in the place of numbers. Methods that set weights to zero stand in the group `zeros`: they
save neither room nor time without sparse kernels.

Two methods are measured at once (--jobs), each on its share of the cores: seconds are those of a row with another
beside it. A method's ratios follow one another, since they share its search and the fits of equal blocks. A row is
written as soon as it is measured, to <out>/methods/, and never measured again: the run can be stopped and gone on with,
or split by --ratios or --methods. The table, <out>/methods.csv, has the columns of
quality.csv and
    fit_peak_mib    peak resident memory of the process up to the folded model, libraries and model in (Linux only)
    group           `params`, or `zeros`
    refused         why there are no numbers
"""
import argparse
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
import protocol
import torch
from protocol import CKA, FREE, FT, KDP, RESIDUAL, Ground, Row

from kdp_core.base import store
from kdp_core.base.records import PrunedFacts
from kdp_core.methods import METHODS
from kdp_core.methods._judge import RankError
from kdp_core.methods._select import BlockError
from kdp_core.methods.kdp_residual.search import SearchError
from kdp_core.prune import finetune, fold
from kdp_core.prune.fold import FoldError
from kdp_core.score import efficiency
from kdp_core.states.block import FitError

logger = logging.getLogger("methods")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"block": CKA} for name in ("remove", "linear", "linear_sequential", "linear_prefix")},
    "kdp": KDP, "kdp_residual": RESIDUAL,
    # its own code reads about 10,000 tokens a candidate; here 2,048, as the search of kdp_residual judges on
    "sleb": {"search": {"sequences": 16}},
    "streamline": {"compose": {"epochs": 5}},
}
"""What rows set beside their defaults, for a run on a CPU."""
ROWS = {name: Row(name, FREE if name == "kdp_residual" else 3, OPTIONS.get(name, {})) for name in METHODS}
REFUSALS = (BlockError, FitError, FoldError, RankError, SearchError)
"""What a method that cannot do the model or the ratio raises; anything else is a fault and stops the run."""


def measure(name: str, ratio: float, ground: Ground, options: argparse.Namespace) -> None:
    """Fit, fold and score one row; with --tuned its fine-tuned variant too."""
    at = ground.folder / "rows" / f"seed{options.seed}-{name}-r{ratio:g}"
    real, tune = ratio in options.data_ratios, name in options.tuned
    about: dict[str, Any] = {"method": name, "ratio": ratio, "seed": options.seed}
    made = protocol.calibrate(ground, options.seed, options.sequences)
    try:
        selection, search_seconds = protocol.chosen(ROWS[name], ground, made, ratio)
        plan, seconds, _ = protocol.fitted(ROWS[name], ground, made, selection)
        pruned = fold.fold(plan, ground.dense, at / "checkpoint")
    except REFUSALS as refusal:
        logger.warning("%s at %g: %s", name, ratio, refusal)
        store.write_json(row_of(at), {**about, "refused": str(refusal)})
        return
    # not ru_maxrss: a child's begins at what its parent had
    about |= {"search_seconds": search_seconds, "fit_peak_mib": efficiency.resident_mib("VmHWM")}
    if not row_of(at).exists():
        store.write_json(row_of(at), {**about, **described(pruned), "fit_seconds": seconds,
                                      **ground.judge.score(at / "checkpoint", real)})
    if tune:
        after, record = finetune.finetune(ground.dense, at / "checkpoint", at / "tuned",
                                          protocol.sample(made.tokens, options.tune_on), pruned,
                                          epochs=options.tune_epochs)
        store.write_json(row_of(at, FT), {**about, **described(after), "method": name + FT,
                                          "fit_seconds": seconds + record.seconds,
                                          **ground.judge.score(at / "tuned", real)})
    shutil.rmtree(at)


def row_of(at: Path, variant: str = "") -> Path:
    """Where a row's numbers lie."""
    return at.with_name(f"{at.name}{variant}.json")


def described(pruned: PrunedFacts) -> dict[str, Any]:
    """What a row took out."""
    return {**protocol.counted(pruned), "group": "zeros" if pruned.params_zeroed else "params",
            "blocks": " ".join([*(f"{start}-{stop}" for start, stop in pruned.blocks),
                                *(f"{layer}:{part}" for layer, part in pruned.parts)])}


def missing(name: str, ratio: float, ground: Ground, options: argparse.Namespace) -> bool:
    """Whether a row, or its fine-tuned variant where it is asked for, has not been measured."""
    at = ground.folder / "rows" / f"seed{options.seed}-{name}-r{ratio:g}"
    if not row_of(at).exists():
        return True
    return name in options.tuned and "refused" not in store.read_json(row_of(at)) and not row_of(at, FT).exists()


def left(names: Sequence[str], ground: Ground, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Methods and ratios that have not been measured."""
    return [(name, ratio) for name in names for ratio in options.ratios if missing(name, ratio, ground, options)]


def apart(name: str, words: Sequence[str], ground: Ground, options: argparse.Namespace) -> None:
    """Measure what is left of a method, a process a row, each of which writes the table too."""
    for _, ratio in left([name], ground, options):
        subprocess.run([sys.executable, __file__, *words, "--methods", name, "--ratios", f"{ratio:g}"], check=True,
                       stdout=subprocess.DEVNULL)
        logger.info("ratio %g: %s", ratio, name)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = protocol.arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.25])
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--tuned", nargs="*", default=[], help="rows that get a fine-tuned variant too (none)")
    parser.add_argument("--jobs", type=int, default=2, help="methods measured at once (2)")
    parser.add_argument("--alone", action="store_true", help="measure in this process, one row after the other")
    parser.set_defaults(threads=None)
    options = parser.parse_args(given)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one method has to be measured at a time")
    if options.threads is None:
        options.threads = max(1, torch.get_num_threads() // (1 if options.alone else options.jobs))
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not there yet, write the table, print it."""
    options = arguments(given)
    ground = protocol.prepare(options.out / "methods", options)
    protocol.calibrate(ground, options.seed, options.sequences)
    if options.alone:
        for name, ratio in left(options.methods, ground, options):
            measure(name, ratio, ground, options)
    else:
        words = [*(sys.argv[1:] if given is None else given), "--alone", "--threads", str(options.threads)]
        pool = ThreadPoolExecutor(options.jobs)
        try:
            for done in as_completed([pool.submit(apart, name, words, ground, options) for name in options.methods]):
                done.result()
        finally:
            # after a fault the other methods are not begun
            pool.shutdown(cancel_futures=True)
    frame = write(ground, options)
    print(frame[["method", "ratio", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed", "fit_seconds",
                 "fit_peak_mib", "group"]].to_string(index=False, float_format="%.4g"))
    return frame


def write(ground: Ground, options: argparse.Namespace) -> pd.DataFrame:
    """The table of all that is there; its columns stand whatever has been measured."""
    frame = protocol.table(ground.folder, options.out / "methods.csv", list(ROWS))
    for name in ("fit_peak_mib", "group", "refused"):
        frame[name] = frame.get(name)
    frame = frame.sort_values(["ratio", "group"], key=lambda column: column.eq("zeros") if column.name == "group"
                              else column, kind="stable").reset_index(drop=True)
    store.write_text(options.out / "methods.csv", frame.to_csv(index=False, lineterminator="\n"))
    return frame


if __name__ == "__main__":
    protocol.log_to_stderr()
    main()
