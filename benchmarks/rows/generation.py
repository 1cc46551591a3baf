"""Tables of the statistics and the generated text of pruned models.

A row is a record of one model. The tables have all rows on disk, and the rows of the tables of an earlier run.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kdp_core.base import store
from kdp_core.score import generation
from kdp_core.study import candidates, single_step

Row = Mapping[str, Any]
FIRST = ("model", "method", "ratio", "params_removed", *(f"loss_{name}" for name in (
    "quality", "agreement", "lambada", "rouge1", "repetition")), *single_step.CHANGES)
"""Names of the first columns of the table."""
KEYS = ["model", "method", "ratio"]
"""The columns that tell rows apart."""


def entry(row: Row, dense: Row) -> dict[str, Any]:
    """One row of the table: the stored measures of one pruned model, with its losses."""
    known = {key: value for key, value in row.items() if key not in ("choices", "sizes", "text")}
    if "refused" in row:
        return known
    return {**known, **{f"loss_{name}": loss for name, loss in generation.losses(row, dense).items()}}


def earlier_tables(name: str, folder: Path | None) -> list[pd.DataFrame]:
    """The table of an earlier run; an empty list without a folder."""
    return [pd.read_csv(folder / f"{name}.csv")] if folder else []


def known(folder: Path | None) -> set[tuple[str, str, float]]:
    """Model, method and ratio of the rows of an earlier run."""
    return {key for table in earlier_tables("generation", folder)
            for key in table[KEYS].itertuples(index=False, name=None)}


def write_tables(measured: Mapping[str, tuple[Row, list[Row]]], out: Path, earlier: Path | None) -> pd.DataFrame:
    """Write both tables, and return the first of them. `measured` has for each model its dense row and the rows of its
    pruned versions. `earlier` is the folder with the tables of an earlier run."""
    lines, choices = [], []
    for dense, rows in measured.values():
        lines += [entry(row, dense) for row in [dense, *rows]]
        choices += [{**{name: row[name] for name in KEYS}, **one}
                    for row in rows if row.get("choices") for one in candidates.by_task(row["choices"])]
    frame, items = (pd.concat([pd.DataFrame(own), *earlier_tables(name, earlier)], ignore_index=True)
                    for name, own in (("generation", lines), ("generation_choices", choices)))
    frame = frame[[*[name for name in FIRST if name in frame], *sorted(set(frame) - set(FIRST))]]
    frame = frame.drop_duplicates(KEYS).sort_values(["model", "ratio", "method"], kind="stable")
    items = items.drop_duplicates([*KEYS, "task"]) if len(items) else items
    for name, table in (("generation", frame), ("generation_choices", items)):
        if len(table):
            text = table.to_csv(index=False, lineterminator="\n", float_format="%.10g")
            store.write_text(out / f"{name}.csv", text)
    return frame
