"""The figure of KDP's Theorems 1 and 2: bounds beside the measured errors, and risks in comparable units.

The paper has no such figure; it states the theorems and shows operator norms (its Figure 5). This module reads the
records of kdp_core.study.theory and computes nothing.
"""
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from kdp_core.base.measurements import Theory
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import COLORS, DASHES, GREY, PAGE_IN, Drawn, FigureError, quiet, whole_numbers

BOUNDS: dict[str, tuple[str, Any, str]] = {
    "bound_equation_9": ("bound, constants of eq. 9", DASHES[3], COLORS[1]),
    "bound": ("bound, C = 1", DASHES[0], COLORS[1]),
    "bound_erm": ("bound without the term in n", DASHES[1], COLORS[1]),
    "bound_products": ("eq. 13, norms of products", DASHES[2], COLORS[1]),
    "trivial": ("any operators", DASHES[2], GREY),
    "constant": ("constant prediction", DASHES[1], GREY),
    "largest": ("worst held-out token", DASHES[1], COLORS[0]),
    "rms": ("held-out root mean square", DASHES[0], COLORS[0]),
}
"""For each curve of the first panel: label, dashes, colour."""
SPACES = {"identity": ("linear map of states", GREY), "random": ("random features", COLORS[0]),
          "learned": ("learned features", COLORS[1])}


def theorems(theory: Theory, *, width: float = PAGE_IN, height: float = 4.6) -> Drawn:
    """Draw both theorems in four panels.

    The first panel shows the bounds and errors of Theorem 1 by horizon, from the first state of the block. The other
    panels show Theorem 2 for the longest gap, the largest distance between two states. Two of these panels show the
    held-out error of the decoded state, by dimension of the features and by number of training tokens. The last panel
    shows how the risk and this error depend on the width of the kernel. Raises FigureError for a record without
    horizons or risks.
    """
    horizons = pd.DataFrame([row for row in theory.horizons if row["start"] == theory.block[0]])
    risks = pd.DataFrame(theory.risks)
    if horizons.empty or risks.empty:
        raise FigureError("no horizons or no risks in the record of theory; run the stage again")
    gap = int(risks["gap"].max())
    own = risks[risks["gap"] == gap]
    with quiet():
        figure = Figure(figsize=(width, height))
        ((first, second), (third, fourth)) = figure.subplots(2, 2)
        _bounds(first, horizons)
        _states(second, own, "features", "Dimension of the features")
        _states(third, own, "tokens", "Training tokens")
        _widths(fourth, own)
        states = f"state {theory.block[0]} to {theory.block[0] + gap}"
        first.set_title(f"Theorem 1, from state {theory.block[0]}")
        for axis, title in ((second, "by dimension"), (third, "by tokens"), (fourth, "by width of the kernel")):
            axis.set_title(f"Theorem 2, {states}, {title}")
    return Drawn(figure, pd.concat([pd.DataFrame(theory.horizons).assign(theorem=1), risks.assign(theorem=2)],
                                   ignore_index=True))


def _bounds(axis: Axes, horizons: pd.DataFrame) -> None:
    for name, (label, dashes, color) in BOUNDS.items():
        axis.plot(horizons["horizon"], horizons[name], linestyle=dashes, color=color, label=label, marker=".")
    axis.set(yscale="log", xlabel="Horizon k (layers)", ylabel="Error in the kernel space")
    whole_numbers(axis.xaxis, 8)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.5)  # the legend needs space
    axis.legend(loc="upper left", ncols=2, fontsize=5.5, columnspacing=1.0, handlelength=3.0)


def _base(rows: pd.DataFrame) -> dict[str, Any]:
    """The reference point: the first point with random features and all tokens. In each panel, one quantity of the
    reference point is varied."""
    random = rows[(rows["space"] == "random") & (rows["tokens"] == rows["tokens"].max())]
    return random.iloc[0].to_dict()


def _states(axis: Axes, rows: pd.DataFrame, name: str, label: str) -> None:
    """Held-out error of the decoded state against one quantity. All other quantities have the values of the reference
    point."""
    base = _base(rows)
    others = [key for key in ("features", "bandwidth_scale", "tokens") if key != name]
    random = rows[(rows["space"] == "random") & (rows[others] == [base[key] for key in others]).all(axis=1)]
    _line(axis, random.sort_values(name), name, "state_error", SPACES["random"])
    _line(axis, random.sort_values(name), name, "state_median", ("random features, median token", COLORS[0]), DASHES[1])
    plain = rows[rows["space"] == "identity"].sort_values("tokens")
    for value, dashes in (("state_error", "-"), ("state_median", DASHES[1])):
        look = (SPACES["identity"][0] + (", median token" if value == "state_median" else ""), GREY)
        if name == "tokens":
            _line(axis, plain, name, value, look, dashes)
        else:
            axis.axhline(plain[value].iloc[-1], color=GREY, label=look[0], linestyle=dashes)
    _line(axis, rows[rows["space"] == "learned"], name, "state_error", SPACES["learned"])
    axis.set(xscale="log", ylim=(0, axis.get_ylim()[1]), xlabel=label, ylabel="Error of the decoded state")
    _ticks(axis, sorted(set(random[name])))
    axis.legend(fontsize=5.5, handlelength=3.6)


def _line(axis: Axes, rows: pd.DataFrame, name: str, value: str, look: tuple[str, str], dashes: Any = "-") -> None:
    errors = rows["state_error_stderr"].astype(float).fillna(0) if value == "state_error" else None
    axis.errorbar(rows[name], rows[value], yerr=errors, label=look[0], color=look[1], linestyle=dashes, marker="o",
                  elinewidth=0.7, capsize=1.5)


def _widths(axis: Axes, rows: pd.DataFrame) -> None:
    """Draw three errors against the width of the kernel: the risk in the kernel space, this risk relative to the
    variance of the space, and the error of the decoded state."""
    base = _base(rows)
    random = rows[(rows["space"] == "random") & (rows["features"] == base["features"])
                  & (rows["tokens"] == base["tokens"])].sort_values("bandwidth_scale")
    for value, label, dashes, color in (("risk", "risk in the kernel space", DASHES[1], COLORS[0]),
                                        ("relative_risk", "relative risk there", DASHES[2], COLORS[0]),
                                        ("state_error", "error of the decoded state", DASHES[0], COLORS[0])):
        axis.plot(random["bandwidth_scale"], random[value], linestyle=dashes, color=color, label=label, marker="o")
    plain = rows[(rows["space"] == "identity") & (rows["tokens"] == base["tokens"])]
    axis.axhline(plain["state_error"].iloc[0], color=GREY, label="linear map of states, decoded state")
    axis.set(xscale="log", yscale="log", xlabel="Width of the kernel (median distances)", ylabel="Held-out error")
    _ticks(axis, list(random["bandwidth_scale"]))
    axis.legend(fontsize=5.5, handlelength=3.6)


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    """Set ticks at the values that were measured, and nowhere else."""
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


FIGURES = (
    Entry("theory", "Theorems 1 and 2",
          "First, the bounds of Theorem 1 and the errors that they bound, by horizon. Then, held-out errors of random "
          "and learned features and of linear maps of states. Last, the risk of Theorem 2 against the width of the "
          "kernel: this risk falls even if the error of the state does not fall.",
          theorems, scope="calibrated", needs="theory", place=60, differs="in no paper"),
)
