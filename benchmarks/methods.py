"""Compares all methods in METHODS at the same share of removed parameters: `python benchmarks/methods.py`.

The comparison runs on the embedded model at ratios 0.10 and 0.25. Every method is fitted on the same calibration tokens
(news) and folded. All models are scored on the same held-out news, as in quality.py. With --data, all models are also
scored on the real benchmark sets in the given folder. Each variant is measured in a process of its own, so that its
peak memory is measured alone. If a method cannot reach a ratio or refuses the model, its row contains the reason and no
numbers. Methods that set weights to zero form the group `zeros`. A method of the group `zeros` saves memory or time
only with sparse kernels.

By default, two methods are measured at the same time, each on its share of the cores; --jobs sets this number. The
seconds of a variant are therefore measured while another variant runs. The ratios of a method are measured one after
the other, because they share the search and the fits of equal blocks. A row is written to <out>/methods/ as soon as its
variant is measured, and no variant is measured twice. So the run can be stopped and continued, or split by --ratios or
--methods. The table <out>/methods.csv has the columns of quality.csv, and also these columns:
    fit_peak_mib    peak resident memory of the process up to the folded model, libraries and model included (Linux
                    only)
    group           `params`, or `zeros`
    refused         the reason why there are no numbers
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

import embedded
import pandas as pd
import protocol
import torch
from protocol import CKA, FREE, FT, KDP, REFUSALS, RESIDUAL, Setup, Variant

from kdp_core.base import store
from kdp_core.base.records import PrunedFacts
from kdp_core.methods import METHODS
from kdp_core.prune import fold
from kdp_core.score import efficiency

logger = logging.getLogger("methods")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"block": CKA} for name in ("remove", "linear", "linear_sequential", "linear_prefix")},
    "kdp": KDP, "kdp_residual": RESIDUAL,
    # SLEB's own code reads about 10,000 tokens for each candidate; here it reads 2,048 tokens, as in kdp_residual's
    # search
    "sleb": {"search": {"sequences": 16}},
    "streamline": {"compose": {"epochs": 5}}, "streamline_relative": {"compose": {"epochs": 5}},
    # the paper uses 1,000 draws
    "ziplm": {"compose": {"draws": 100}},
}
"""Method -> its options in a run on a CPU. Only options that differ from the method's defaults are listed."""
VARIANTS = {name: Variant(name, FREE if name == "kdp_residual" else 3, OPTIONS.get(name, {})) for name in METHODS}


def measure(name: str, ratio: float, setup: Setup, options: argparse.Namespace) -> None:
    """Fit, fold and score one variant. If --tuned names the method, the function also scores the fine-tuned variant."""
    at = folder_of(name, ratio, setup, options)
    row, real = protocol.row_path(at), ratio in options.data_ratios
    about: dict[str, Any] = {"method": name, "ratio": ratio, "seed": options.seed}
    calibrated = protocol.calibrate(setup, options.seed, options.sequences)
    try:
        selection, search_seconds = protocol.chosen(VARIANTS[name], setup, calibrated, ratio)
        plan, seconds, _ = protocol.fitted(VARIANTS[name], setup, calibrated, selection)
        pruned = fold.fold(plan, setup.dense, at / "checkpoint")
    except REFUSALS as refusal:
        logger.warning("%s at %g: %s", name, ratio, refusal)
        store.write_json(row, {**about, "refused": str(refusal)})
        return
    # ru_maxrss is not used: in a child process, its first value is the peak of the parent process
    about |= {"search_seconds": search_seconds, "fit_peak_mib": efficiency.resident_mib("VmHWM")}
    if not row.exists():
        store.write_json(row, {**about, **described(pruned), "fit_seconds": seconds,
                               **setup.judge.score(at / "checkpoint", real)})
    if name in options.tuned:
        end = FT[options.tune_targets]
        after, tune_seconds = protocol.tuned(setup, calibrated, pruned, at, options)
        store.write_json(protocol.row_path(at, end), {**about, **described(after), "method": name + end,
                                                     "fit_seconds": seconds + tune_seconds,
                                                     **setup.judge.score(at / "tuned", real)})
    shutil.rmtree(at)


def folder_of(name: str, ratio: float, setup: Setup, options: argparse.Namespace) -> Path:
    """The folder in which a variant is made; the file of its row is next to this folder."""
    return setup.folder / "rows" / f"seed{options.seed}-{name}-r{ratio:g}"


def described(pruned: PrunedFacts) -> dict[str, Any]:
    """The columns with the removed parameters, parts and layers of a variant."""
    return {**protocol.counted(pruned), "group": "zeros" if pruned.params_zeroed else "params",
            "blocks": " ".join([*(f"{start}-{stop}" for start, stop in pruned.blocks),
                                *(f"{layer}:{part}" for layer, part in pruned.parts)])}


def missing(name: str, ratio: float, setup: Setup, options: argparse.Namespace) -> bool:
    """Whether a measurement is missing: of the variant, or of its fine-tuned variant if --tuned names the method."""
    at = folder_of(name, ratio, setup, options)
    row = protocol.row_path(at)
    if not row.exists():
        return True
    return (name in options.tuned and "refused" not in store.read_json(row)
            and not protocol.row_path(at, FT[options.tune_targets]).exists())


def left(names: Sequence[str], setup: Setup, options: argparse.Namespace) -> list[tuple[str, float]]:
    """The methods and ratios that are not measured yet."""
    return [(name, ratio) for name in names for ratio in options.ratios if missing(name, ratio, setup, options)]


def apart(name: str, words: Sequence[str], setup: Setup, options: argparse.Namespace) -> None:
    """Measure the remaining ratios of a method, each in a process of its own; each process also writes the table."""
    for _, ratio in left([name], setup, options):
        subprocess.run([sys.executable, __file__, *words, "--methods", name, "--ratios", f"{ratio:g}"], check=True,
                       stdout=subprocess.DEVNULL)
        logger.info("ratio %g: %s", ratio, name)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = protocol.arguments(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="METHOD",
                        help="methods to measure (all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.25],
                        help="shares of the parameters to remove (0.1 0.25)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration (0)")
    parser.add_argument("--tuned", nargs="*", default=[], help="methods that get a fine-tuned variant too (none)")
    parser.add_argument("--jobs", type=int, default=2, help="methods measured at once (2)")
    parser.add_argument("--alone", action="store_true", help="measure in this process, one variant after the other")
    parser.set_defaults(threads=None)
    options = parser.parse_args(given)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give 1 or more")
    if options.threads is None:
        options.threads = max(1, torch.get_num_threads() // (1 if options.alone else options.jobs))
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure the variants that are not on disk, write the table and print it."""
    options = arguments(given)
    setup = protocol.prepare(options.out / "methods", options)
    protocol.calibrate(setup, options.seed, options.sequences)
    if options.alone:
        for name, ratio in left(options.methods, setup, options):
            measure(name, ratio, setup, options)
    else:
        words = [*(sys.argv[1:] if given is None else given), "--alone", "--threads", str(options.threads)]
        pool = ThreadPoolExecutor(options.jobs)
        try:
            for done in as_completed([pool.submit(apart, name, words, setup, options) for name in options.methods]):
                done.result()
        finally:
            # after an unexpected error no further method is started
            pool.shutdown(cancel_futures=True)
    frame = write(setup, options)
    print(frame[["method", "ratio", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed", "fit_seconds",
                 "fit_peak_mib", "group"]].to_string(index=False, float_format="%.4g"))
    return frame


def write(setup: Setup, options: argparse.Namespace) -> pd.DataFrame:
    """Write the table of all rows on disk. The columns of this module are written even if they are empty."""
    frame = protocol.table(setup.folder, options.out / "methods.csv", list(VARIANTS))
    for name in ("fit_peak_mib", "group", "refused"):
        frame[name] = frame.get(name)
    frame = frame.sort_values(["ratio", "group"], key=lambda column: column.eq("zeros") if column.name == "group"
                              else column, kind="stable").reset_index(drop=True)
    store.write_text(options.out / "methods.csv", frame.to_csv(index=False, lineterminator="\n"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
