"""Tables on Theorems 1 and 2 of KDP: one data frame with every number, and the tables in Markdown.

The paper states the theorems and prints no such tables. The records are those of kdp_core.study.theory.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdp_core.base.measurements import Theory
from kdp_core.results import tables

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
"""For each of the four tables: the fields of a row, and the headings of the columns."""


def tidy(records: Mapping[tuple[str, str], Theory]) -> pd.DataFrame:
    """One frame with all rows of all records; the keys of `records` are (model, calibration).

    The columns `theorem` (1 or 2) and `what` (horizon, ridge, risk, condition) say what a row describes.
    """
    kinds = {"horizons": (1, "horizon"), "ridges": (1, "ridge"), "risks": (2, "risk"), "conditions": (2, "condition")}
    made = {name: pd.DataFrame([{"model": model, "calib": calib, **row} for (model, calib), record in records.items()
                                for row in getattr(record, name)]) for name in kinds}
    return pd.concat([made[name].assign(theorem=theorem, what=what) for name, (theorem, what) in kinds.items()
                      if len(made[name])], ignore_index=True)


def markdown(records: Mapping[tuple[str, str], Theory]) -> str:
    """The tables in Markdown. The first table has only horizons from the first state of each run. In words, this table
    compares each bound with the bounds `trivial` and `constant`."""
    parts = []
    for (model, calib), record in records.items():
        horizons = [row | {"says": _worth(row, "bound"), "says_erm": _worth(row, "bound_erm")}
                    for row in record.horizons if row["start"] == record.block[0]]
        parts += [f"## {model}, {calib}: layers {record.block[0]} to {record.block[1] - 1}\n",
                  f"2m = {record.features}, n = {record.tokens:,} tokens of {record.sequences} sequences, delta = "
                  f"{record.delta:g}: L_ERM = {record.l_erm:.3g}, B_A = {record.b_a:.4g}, R_phi = {record.r_phi:.3g}; "
                  f"term in n {record.generalisation:.3g} with C = 1, {record.generalisation_equation_9:.3g} by "
                  "equation 9.\n",
                  "### Theorem 1\n", _table(horizons, HORIZON_COLUMNS),
                  "### Theorem 1: the whole run, operators of other ridges\n",
                  _table(record.ridges, RIDGE_COLUMNS), "### Theorem 2: risks\n",
                  _table(record.risks, RISK_COLUMNS), "### Theorem 2: what it claims and asks for\n",
                  _table(record.conditions, CONDITION_COLUMNS)]
    return "\n".join(parts)


def _worth(row: Mapping[str, Any], name: str) -> str:
    """What the report says about a bound at a horizon: that it is vacuous, or that it is above or below the error of a
    constant prediction."""
    if row[name] >= row["trivial"]:
        return "nothing: vacuous"
    return f"{'above' if row[name] >= row['constant'] else 'below'} the error of a constant"


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    return tables.grid(list(columns.values()), [((), [_cell(row[name]) for name in columns]) for row in rows], "md",
                       keys=None)


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
