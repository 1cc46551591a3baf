"""Compares every stage with a lower limit or another implementation: `python benchmarks/stages.py [STAGE ...]`.

A stage and its comparison are measured alternately (benchmarks/stage). A stage is compared either with the minimum of
work that it needs, or with another implementation that gives the same result. The table of a stage is printed as
Markdown and written to <out>/<stage>.csv. benchmarks/README.md shows the tables of one machine, and lists the changes
to the stages that were made or only tried. `--quick` runs all parts in a few minutes; its sizes are too small for
conclusions.
"""
import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import embedded
import torch
from stage import timing
from stage.setup import Setup
from stage.timing import Row

logger = logging.getLogger("stages")
STAGES = {"products": "multiplication", "extraction": "extraction", "store": "reading", "cka": "cka",
          "kdp": "kernel", "kdp_residual": "residual", "evaluation": "evaluation", "folded": "folded",
          "growth": "growth", "imports": "imports", "surgeon": "surgeon"}
"""Stage -> the module in benchmarks/stage that measures it."""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"stages to measure: {', '.join(STAGES)} (all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all parts run")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--data", type=Path, help="folder with the local files of docs/benchmarks.md, for evaluation")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the tables (results/benchmarks)")
    options = parser.parse_args(given)
    for stage in options.stages:
        if stage not in STAGES:
            parser.error(f"no stage {stage!r}; choose from {', '.join(STAGES)}")
    if min(options.repeats, options.threads) < 1:
        parser.error("--repeats and --threads: give 1 or more")
    return options


def main(given: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Measure the stages one after the other; write and print each table."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    setup, tables = Setup(options), {}
    for stage in options.stages or STAGES:
        tables[stage] = importlib.import_module(f"stage.{STAGES[stage]}").measure(setup)
        timing.write(tables[stage], options.out / f"{stage}.csv")
        print(f"\n## {stage}\n\n{timing.markdown(tables[stage])}", flush=True)
    print(f"\n{options.threads} threads, {options.repeats} turns, torch {torch.__version__}", file=sys.stderr)
    return tables


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
