"""Compares our fits with the code of the methods' authors: `python benchmarks/neighbours.py --originals DIR [METHOD
...]`.

DIR contains clones of the authors' repositories, one folder for each repository. The command imports the functions of
the authors that calibrate a pruned model, and runs them and our functions alternately: on the same model (the embedded
one; FLAP needs a made-up one), with the same tokens and the same amount of work. A run starts with the loaded model
and ends with the new weights or the chosen layers. The first row of a method has the ratio of the times, (time of the
original / our time). The other rows compare the results. benchmarks/originals says for each method which functions run,
and what makes old code run.

    method             repository                          commit that was tried
    wanda              locuslab/wanda                      8e8fc87
    sparsegpt          IST-DASLab/sparsegpt                147d215
    sleb               jiwonsong-dev/SLEB                  d07129a
    shortgpt           sramshetty/ShortGPT, unofficial     78d9615
    laco               yangyifei729/LaCo                   8483587
    slicegpt           microsoft/TransformerCompression    6b12cde
    flap               CASIA-IVA-Lab/FLAP                  3bb57db
    llm_pruner         horseee/LLM-Pruner                  128a07d
    shortened_ppl      Nota-NetsPresso/shortened-llm       4031a92
    shortened_taylor   Nota-NetsPresso/shortened-llm       4031a92
    streamline         RUCKBReasoning/LLM-Streamline       adf50ba
    replaceme_lstsq    mts-ai/ReplaceMe                    5bb71d9
    joint_drop         CASE-Lab-UMD/LLM-Drop               28b5dd1

Without a METHOD, all methods run whose clone is in DIR. The code of the clones runs with the rights of the user; read
it before you run it.
"""
import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import embedded
import torch
from originals import orders, replaced, widths, zeros
from originals.cases import Case, Original
from stage import timing
from stage.setup import Setup
from stage.timing import Row

from kdp_core.model import checkpoints

logger = logging.getLogger("neighbours")
ORIGINALS: dict[str, Original] = {**zeros.ORIGINALS, **orders.ORIGINALS, **replaced.ORIGINALS, **widths.ORIGINALS}
"""Our method -> the code of its authors."""
NOT_COMPARED = {"slimgpt": "its authors have released no code"}
"""Our method -> why it cannot be compared."""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Every message about a wrong value says what to give instead."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="repositories and the commits that were tried:\n" + "\n".join(
            f"  {name:18} https://github.com/{one.repository} {one.commit}" for name, one in ORIGINALS.items()))
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="methods to compare (all that are in DIR)")
    parser.add_argument("--originals", type=Path, required=True, metavar="DIR", help="folder of the clones")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the tables (results/benchmarks)")
    options = parser.parse_args(given)
    options.quick = False
    if min(options.repeats, options.threads) < 1:
        parser.error("--repeats and --threads: give 1 or more")
    if not options.originals.is_dir():
        parser.error(f"--originals {options.originals}: there is no such folder; make it and clone into it the "
                     "repositories that --help lists")
    for name in options.methods:
        if reason := refusal(name, options.originals):
            parser.error(reason)
    options.methods = options.methods or [name for name in ORIGINALS if not refusal(name, options.originals)]
    if not options.methods:
        parser.error(f"--originals {options.originals}: the folder has none of the clones; clone into it the "
                     "repositories that --help lists")
    return options


def refusal(name: str, folder: Path) -> str:
    """Why a method cannot be compared; empty if it can."""
    if name in NOT_COMPARED:
        return f"method {name!r} is not compared: {NOT_COMPARED[name]}; omit it"
    if name not in ORIGINALS:
        return f"there is no comparison for the method {name!r}; choose from {', '.join(ORIGINALS)}"
    one = ORIGINALS[name]
    if not (folder / one.folder).is_dir():
        return (f"method {name!r} needs the folder {folder / one.folder}; run `git clone "
                f"https://github.com/{one.repository} {folder / one.folder}` or omit the method")
    return ""


def compare(name: str, case: Case, repeats: int) -> list[Row]:
    """Run our function and the original's alternately. Returns the row with the times, and the rows that compare the
    results."""
    pair, found = ORIGINALS[name].pair(case), {}

    def keeping(side: str, run: Callable[[], Any]) -> Callable[[], None]:
        return lambda: found.update({side: run()})

    # our functions get the model that is already loaded, as the original does
    with mock.patch.object(checkpoints, "load_model", lambda *_, **__: pair.case.model()):
        times = timing.in_turns({"ours": keeping("ours", pair.ours), "original": keeping("original", pair.original)},
                                repeats, before=pair.case.load, warm=False)
    row = times.row(f"{name}: {pair.work}", "ours", "original", target=1.0, against=ORIGINALS[name].repository)
    return [row, *(one._replace(measure=f"{name}: {one.measure}")
                   for one in pair.compare(found["ours"], found["original"]))]


def main(given: Sequence[str] | None = None) -> list[Row]:
    """Compare the methods one after the other; write and print the table."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    setup, rows = Setup(options), []
    # the first pass of a process is slow, because modules are imported
    setup.model(setup.tokens.ids_ST[:1])
    for name in ORIGINALS:
        if name in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                case = Case(options.originals.resolve() / ORIGINALS[name].folder, setup.dense, setup.facts,
                            setup.tokens, Path(folder), [])
                rows += compare(name, case, options.repeats)
            timing.write(rows, options.out / "neighbours.csv")
            logger.info("%s: compared", name)
    print(f"\n{timing.markdown(rows)}", flush=True)
    print(f"\n{options.threads} threads, {options.repeats} turns, torch {torch.__version__}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
