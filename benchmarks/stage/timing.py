"""Times a stage and its comparison alternately, so that a slow minute of the machine slows both.

The comparison is one of two kinds: a floor or a peer. A floor is the minimum of work that the stage needs. A peer is
another implementation with the same result. In each turn, the stage and its comparison both run once. The ratio is the
median over turns of (time of the comparison / time of the stage). With a ratio of 2, the stage is twice as fast as the
comparison. Targets apply to wall-clock time. The ratio of processor times is also given, because it hardly changes on a
busy machine. Processor time does not become shorter if work runs on two cores at the same time.
"""
import csv
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

GEMM = 1024
"""Number of rows and of columns of the square matrices whose products measure the limit."""
PRODUCTS = 4
"""Number of matrix products in one run that measures the limit."""


class Clock(NamedTuple):
    """Seconds of one turn."""
    wall: float
    cpu: float


class Row(NamedTuple):
    """One line of a table."""
    measure: str
    ours: float
    unit: str
    against: str
    """Name of the comparison: a floor, a peer or a limit."""
    other: float
    ratio: float
    cpu_ratio: float | None
    """The ratio of processor times; None if the row has no such ratio."""
    target: str
    holds: bool | None
    """Whether `ratio` reaches the target; None for a row without a target."""


class Times(dict[str, list[Clock]]):
    """Name of a run -> its times in all turns."""

    def seconds(self, name: str, field: str = "wall") -> float:
        """Median time of a run over all turns."""
        return statistics.median(getattr(clock, field) for clock in self[name])

    def ratio(self, other: str, ours: str, *, scale: float = 1.0, field: str = "wall") -> float:
        """The quotient scale * (time of run `other`) / (time of run `ours`) in each turn; returns the median over
        turns."""
        return statistics.median(scale * getattr(one, field) / max(getattr(own, field), 1e-9)
                                 for one, own in zip(self[other], self[ours], strict=True))

    def row(self, measure: str, ours: str, other: str, *, target: float | None = None, scale: float = 1.0,
            against: str | None = None) -> Row:
        """A row that compares the run `ours` with the run `other`.

        `scale` is the work of `ours` divided by the work of `other`.
        """
        return judged(Row(measure, self.seconds(ours), "s", against or other, scale * self.seconds(other),
                          self.ratio(other, ours, scale=scale), self.ratio(other, ours, scale=scale, field="cpu"),
                          "", None), target)


def judged(row: Row, target: float | None, *, at_most: bool = False) -> Row:
    """The row with its target. The field `holds` says whether the ratio reaches the target."""
    if target is None:
        return row
    holds = row.ratio <= target if at_most else row.ratio >= target
    return row._replace(target=f"{'at most' if at_most else 'at least'} {target:g}", holds=bool(holds))


def figure(measure: str, ours: float, unit: str, against: str, other: float, *, target: float | None = None,
           at_most: bool = False, cpu: float | None = None) -> Row:
    """A row of the table whose number is not a time, for example a share or a peak memory.

    The ratio in this row is `ours` divided by `other`. `cpu` is the same number as `ours`, computed from processor
    time.
    """
    cpu_ratio = None if cpu is None else cpu / other
    return judged(Row(measure, ours, unit, against, other, ours / other, cpu_ratio, "", None), target, at_most=at_most)


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int, *, warm: bool = True,
             before: Callable[[], Any] | None = None) -> Times:
    """Time every run `repeats` times, in the order A B, B A, A B, ...; a first turn of each run is not timed.

    before: a function that is called before every run; its time is not measured.
    """
    times = Times({name: [] for name in runs})
    for turn in range(-1 if warm else 0, repeats):
        for name in list(runs)[::-1 if turn % 2 else 1]:
            if before:
                before()
            taken = timed(runs[name])
            if turn >= 0:
                times[name].append(taken)
    return times


def timed(run: Callable[[], Any]) -> Clock:
    """The time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Clock(time.perf_counter() - wall, time.process_time() - cpu)


def kept(run: Callable[[], Any]) -> tuple[Any, Clock]:
    """Call a run; return its result and its time."""
    found: list[Any] = []
    clock = timed(lambda: found.append(run()))
    return found[0], clock


def products(dtype: torch.dtype = torch.float32, *, size: int = GEMM, device: str = "cpu") -> Callable[[], None]:
    """A run of products of square matrices; its speed is the limit for all matrix products."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return run


def turns_of_products(flops: float, size: int = GEMM) -> float:
    """The number of runs of `products` that together have this number of floating-point operations."""
    return flops / (PRODUCTS * 2 * size ** 3)


def markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown, as benchmarks/README.md shows it."""
    lines = ["| measure | ours | beside it | | ratio | in processor time | target | holds |",
             "|---|---:|---:|---|---:|---:|---|---|"]
    for row in rows:
        cpu = "" if row.cpu_ratio is None else f"{row.cpu_ratio:.3g}"
        holds = "" if row.holds is None else "yes" if row.holds else "no"
        lines.append(f"| {row.measure} | {row.ours:.3g} {row.unit} | {row.other:.3g} {row.unit} | {row.against} | "
                     f"{row.ratio:.3g} | {cpu} | {row.target} | {holds} |")
    return "\n".join(lines)


def write(rows: Iterable[Row], path: Path) -> None:
    """The table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
