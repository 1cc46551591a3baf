"""Theorems 1 and 2 of KDP drawn and tabulated: bounds beside what they bound, and risks in comparable units.

No such figure is in the paper, which states the theorems and shows operator norms (its Figure 5). Reads records of
kdp_core.study.theory, computes nothing.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from kdp_core.base.records import Theory
from kdp_core.figures.style import COLORS, DASHES, GREY, PAGE_IN, Drawn, FigureError, quiet

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
"""Curves of the first panel: label, dashes, colour."""
SPACES = {"identity": ("linear map of states", GREY), "random": ("random features", COLORS[0]),
          "learned": ("learned features", COLORS[1])}

HORIZON_COLUMNS = {
    "horizon": "k", "rms": "Error, rms", "largest": "Error, worst token", "bound_products": "Eq. 13", "bound_erm":
    "Bound, n left out", "bound": "Bound, C = 1", "bound_equation_9": "Bound, eq. 9", "trivial": "Any operators",
    "constant": "Constant", "beyond": "Tokens above n left out", "samples_needed": "Tokens needed", "says_erm":
    "Says, n left out", "says": "Says, C = 1"}
RIDGE_COLUMNS = {
    "ridge": "Ridge", "l_erm": "L_ERM", "b_a": "B_A", "rms": "Error, rms", "bound_erm": "Bound, n left out", "bound":
    "Bound, C = 1", "trivial": "Any operators", "constant": "Constant", "vacuous_erm": "Vacuous, n left out", "vacuous":
    "Vacuous"}
RISK_COLUMNS = {
    "gap": "Layers", "space": "Class", "features": "Dimension", "bandwidth_scale": "Width", "tokens": "Tokens", "risk":
    "Risk", "relative_risk": "Relative risk", "state_error": "State error", "state_error_stderr": "+-", "state_median":
    "State error, median token", "direct_error": "State error, direct", "operator_norm": "Norm of A"}
CONDITION_COLUMNS = {
    "gap": "Layers", "space": "Class", "features": "Dimension", "bandwidth_scale": "Width", "tokens": "Tokens", "risk":
    "RFF risk", "identity_risk": "Identity risk", "holds": "Holds", "holds_without_fit": "Holds with A = 0",
    "better_state": "State better", "state_excess": "State error, excess", "state_excess_stderr": "+-",
    "samples_printed": "n by eq. 4", "samples_proof": "n by eq. 36"}


def theory(record: Theory, *, width: float = PAGE_IN, height: float = 4.6) -> Drawn:
    """Four panels: Theorem 1's bounds and errors by horizon from the run's first state; then held-out errors of the
    decoded state by dimension of the features and by training tokens, and what the kernel's width does to the risk of
    Theorem 2 and to the state. The last three for the longest gap. Raises FigureError for a record without rows.
    """
    horizons = pd.DataFrame([row for row in record.horizons if row["start"] == record.block[0]])
    risks = pd.DataFrame(record.risks)
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
        states = f"state {record.block[0]} to {record.block[0] + gap}"
        first.set_title(f"Theorem 1, from state {record.block[0]}")
        for axis, title in ((second, "by dimension"), (third, "by tokens"), (fourth, "by width of the kernel")):
            axis.set_title(f"Theorem 2, {states}, {title}")
    return Drawn(figure, pd.concat([pd.DataFrame(record.horizons).assign(theorem=1), risks.assign(theorem=2)],
                                   ignore_index=True))


def _bounds(axis: Axes, horizons: pd.DataFrame) -> None:
    for name, (label, dashes, color) in BOUNDS.items():
        axis.plot(horizons["horizon"], horizons[name], linestyle=dashes, color=color, label=label, marker=".")
    axis.set(yscale="log", xlabel="Horizon k (layers)", ylabel="Error in the kernel space")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    axis.legend(loc="upper left", ncols=2, fontsize=5.5, columnspacing=1.0, handlelength=3.0)


def _base(rows: pd.DataFrame) -> dict[str, Any]:
    """The point from which one thing at a time changes: the first random row on all tokens."""
    random = rows[(rows["space"] == "random") & (rows["tokens"] == rows["tokens"].max())]
    return random.iloc[0].to_dict()


def _states(axis: Axes, rows: pd.DataFrame, name: str, label: str) -> None:
    """Held-out error of the decoded state against one thing, all else as in the base."""
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
    """Risk in the kernel space, its share of the variance there, and the state's error, by width of the kernel."""
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
    """Only what was measured stands on the axis."""
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


# Tables ---------------------------------------------------------------------------------------------------------------

def tables(records: Mapping[tuple[str, str], Theory]) -> dict[str, pd.DataFrame]:
    """Frames `horizons`, `ridges`, `risks`, `conditions` and `constants` of records by (model, calibration)."""
    kinds = ("horizons", "ridges", "risks", "conditions")
    made = {name: pd.DataFrame([{"model": model, "calib": calib, **row} for (model, calib), record in records.items()
                                for row in getattr(record, name)]) for name in kinds}
    constants = ("features", "delta", "tokens", "sequences", "heldout_tokens", "l_erm", "b_a", "r_phi",
                 "generalisation", "generalisation_equation_9")
    made["constants"] = pd.DataFrame([
        {"model": model, "calib": calib, "start": record.block[0], "stop": record.block[1],
         **{name: getattr(record, name) for name in constants}} for (model, calib), record in records.items()])
    return made


def tidy(records: Mapping[tuple[str, str], Theory]) -> pd.DataFrame:
    """Every number in one frame, with the columns theorem (1 or 2) and what (horizon, ridge, risk, condition)."""
    made = tables(records)
    kinds = {"horizons": (1, "horizon"), "ridges": (1, "ridge"), "risks": (2, "risk"), "conditions": (2, "condition")}
    return pd.concat([made[name].assign(theorem=theorem, what=what) for name, (theorem, what) in kinds.items()
                      if len(made[name])], ignore_index=True)


def markdown(records: Mapping[tuple[str, str], Theory]) -> str:
    """The tables for reading: horizons from each run's first state, in words where a bound says nothing."""
    parts = []
    for (model, calib), record in records.items():
        horizons = [row | {"says": _worth(row, "bound"), "says_erm": _worth(row, "bound_erm")}
                    for row in record.horizons if row["start"] == record.block[0]]
        parts += [f"## {model}, {calib}: layers {record.block[0]} to {record.block[1] - 1}\n",
                  f"2m = {record.features}, n = {record.tokens:,} tokens of {record.sequences} sequences, delta = "
                  f"{record.delta:g}: L_ERM = {record.l_erm:.3g}, B_A = {record.b_a:.4g}, R_phi = {record.r_phi:.3g}; "
                  f"term in n {record.generalisation:.3g} with C = 1, {record.generalisation_equation_9:.3g} by "
                  "equation 9.\n",
                  "### Theorem 1\n", _markdown(horizons, HORIZON_COLUMNS),
                  "### Theorem 1: the whole run, operators of other ridges\n",
                  _markdown(record.ridges, RIDGE_COLUMNS), "### Theorem 2: risks\n",
                  _markdown(record.risks, RISK_COLUMNS), "### Theorem 2: what it claims and asks for\n",
                  _markdown(record.conditions, CONDITION_COLUMNS)]
    return "\n".join(parts)


def _worth(row: Mapping[str, Any], name: str) -> str:
    """What one bound of one horizon says."""
    if row[name] >= row["trivial"]:
        return "nothing: vacuous"
    return f"{'above' if row[name] >= row['constant'] else 'below'} the error of a constant"


def _markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(columns.values())} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
