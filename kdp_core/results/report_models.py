"""The parts of the report about models: the summary, and the scores, costs, tests, fits and figures of each model."""
import base64
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from kdp_core.base.measurements import Agreement
from kdp_core.results import page, tables
from kdp_core.results.columns import COLUMNS, DENSE, MAIN, RELATIVE, Column, heading, number
from kdp_core.results.findings import counted, known
from kdp_core.results.marks import NOTE, marks
from kdp_core.results.page import Cell, Row, cell, text

EXTRA = {
    "params_zeroed": Column("Set to zero", "%", "Share of all parameters that are set to zero and kept.", 1, 100),
    "prefill_ms": Column("Prefill", "ms", "Median time of one pass over the timed prompt.", 1),
    "decode_ms": Column("Decode", "ms", "Median time of one more token after a cached prompt.", 1),
    "peak_memory_mib": Column("Peak memory", "MiB", "The largest memory use while the model was timed.", 0),
}
"""Costs that are not in the summary."""
PANELS = 1.7
"""If the width of a figure is at least this many times its height, the figure is shown as a row of panels side by
side."""
COSTS = ("params_removed", "params_zeroed", "layers_removed", "params_millions", "macs_giga", "prefill_ms", "decode_ms",
         "peak_memory_mib", "search_seconds", "fit_seconds", "blocks")
GROUPS = {"": "Models with fewer parameters", "finetuned": "Fine-tuned after pruning (†)",
          "zeros": "Models with weights set to zero, as large as the dense one"}
"""Kinds of pruned models, in the order in which tables group them."""
FIT_WORDS = {
    "block": "Replaced layers, from the first to one past the last; `all` is a fit of all blocks together.",
    "step": "What was fitted: a linear map, step 1 of KDP (kernel), its step 2 (inverse), or all stand-ins at once "
            "(compose).",
    "heldout error": "Squared error of the stand-in on held-out sequences, divided by the variance of the states: 0 is "
                     "perfect, and 1 is as good as the mean state.",
    "heldout error identity": "The held-out error if the block is removed without a stand-in.",
    "decode error": "The held-out error of the best linear map from the features that step 1 predicts to the states.",
    "decode error true features": "The held-out error of such a map from the true features. Step 1 cannot reach a "
                                  "smaller error.",
    "heldout cos": "Step 1: weighted cosine of predicted and true features on held-out sequences.",
    "heldout loss": "The training loss, measured on held-out sequences.",
    "heldout mse": "Step 1: the part of its loss that is a mean squared error.",
    "heldout kl": "Divergence of the pruned model's outputs from the dense model's, in nats per token.",
    "ridge": "Penalty on the size of a linear map.",
    "tokens": "Number of tokens on which the fit was made.",
    "seconds": "Time of the fit in seconds.",
}
"""What the columns of the fits mean."""
TEST_WORDS = {
    "against": "The model with which the method is compared: the best model, the baseline, or the dense model.",
    "difference": "Score of the method minus score of the other model, as a share of items or in nats per token.",
    "stderr": "Standard error of that difference, computed from the differences of the items.",
    "p": "How often chance alone would show a difference at least as large.",
    "p holm": "p with Holm's correction, which raises p because many pairs were tested.",
    "items": "Number of items that both models answered.",
}
"""What the columns of the paired tests mean."""
MARKS = f"{NOTE} A click on a heading sorts the rows of each group by that column."
"""The note below the table of the summary."""


class ReportError(ValueError):
    """The page cannot be built, because a part of its data is missing."""


class FigureEntry(NamedTuple):
    """A figure that the page shows."""
    title: str
    caption: str
    rule: str
    """The workflow rule that made the figure."""
    png_path: Path | str
    link: str = ""
    """Path from the page to the figure's PDF and CSV files, without suffix. If the path is empty, the page has no links
    to the figure's files."""
    model: str = ""
    """The model that the figure shows; empty for a figure of all models."""


# The summary ----------------------------------------------------------------------------------------------------------

def summary_table(summary: pd.DataFrame, comparisons: pd.DataFrame | None, *, label: str = "Summary") -> str:
    """The main columns of the summary with their marks, and below the table the meanings of the columns and marks."""
    marked = {name: marks(summary, name, comparisons=comparisons) for name in MAIN}
    made = _point_table(summary, MAIN, COLUMNS, label=label, marked=marked)
    return made + page.note(MARKS) + page.meanings({heading(COLUMNS[name]): COLUMNS[name].what
                                                    for name in MAIN})


def _point_table(rows: pd.DataFrame, names: Sequence[str], columns: Mapping[str, Column], *, label: str,
                 marked: Mapping[str, Mapping[Any, str]] | None = None) -> str:
    """A table with one row for each model. Each row of the table has the model's keys and the given columns.

    Rows are grouped if there are several kinds of pruned models.
    """
    keys = tables.shown_keys(rows)[0 if rows["model"].nunique() > 1 else 1:]
    head = [tables.KEY_HEADINGS[key] for key in keys] + [heading(columns[name]) for name in names]
    groups: dict[str, list[Row]] = {}
    for index, row in rows.iterrows():
        cells = [cell(tables.key_text(key, row), None if key != "ratio" else 100 * row[key]) for key in keys]
        cells += [_number_cell(row, name, columns[name], (marked or {}).get(name, {}).get(index, "")) for name in names]
        groups.setdefault(_group(row), []).append(Row(cells, "dense" if row["method"] == DENSE else ""))
    pruned = len(set(groups) - {"dense"}) > 1
    named = {"": groups.get("dense", []) + (groups.get("", []) if not pruned else [])} | {
        words: groups[group] for group, words in GROUPS.items() if group in groups and (pruned or group)}
    return page.table(head, named, label=label, name=keys.index("method"))


def _group(row: pd.Series) -> str:
    if row["method"] == DENSE:
        return "dense"
    return "zeros" if row["params_zeroed"] > 0 else "finetuned" if row["finetuned"] else ""


def _number_cell(row: pd.Series, name: str, column: Column, mark: str = "") -> Cell:
    value = row[name]
    error = row[column.stderr] if column.stderr and name not in RELATIVE else None
    return Cell(_marked(text(number(column, value)), mark) + _error(column, error),
                str(value) if known(value) else "")


def _marked(markup: str, mark: str) -> str:
    return {"best": f"<b>{markup}</b>", "second": f"<u>{markup}</u>"}.get(mark, markup)


def _error(column: Column, error: Any) -> str:
    return f' <span class="pm">± {text(number(column, error))}</span>' if known(error) else ""


# A model --------------------------------------------------------------------------------------------------------------

def of_model(model: str, summary: pd.DataFrame, scores: pd.DataFrame, figures: Sequence[FigureEntry],
             fits: pd.DataFrame | None, comparisons: pd.DataFrame | None,
             expectations: Sequence[tuple[str, str]] = (),
             agreements: Sequence[tuple[str, Agreement]] = ()) -> str:
    """The part of the page about one model: expected generation, claims on searches, scores by task, costs and blocks,
    paired tests, fits and figures.

    The model's summary is shown only if the run has several models. Raises ReportError for a figure whose file is
    missing.
    """
    own, alone = summary[summary["model"] == model], summary["model"].nunique() == 1
    measured = scores[scores["model"] == model]
    parts = [("Summary", "" if alone else summary_table(own, comparisons, label=f"Summary of {model}")),
             ("Will it still generate?", "".join(page.note(f"{words}: {said}") for words, said in expectations)),
             ("Objective or search?", "".join(_claims(words, one) for words, one in agreements)),
             ("Scores by task", _task_scores(own, measured)),
             ("Costs and blocks", _costs(own, measured)),
             ("Paired comparisons", _comparisons(comparisons, model)),
             ("Fits", _fits(fits, model)),
             ("Figures", "".join(figure(entry) for entry in figures if entry.model == model))]
    return "".join(f"<h3>{heading}</h3>\n{markup}" for heading, markup in parts if markup)


def _claims(words: str, agreement: Agreement) -> str:
    """The claims on objectives and searches at one ratio, each with its result."""
    head = ["Claim", "Draws", "Difference", "95 % interval", "Told"]
    rows = [[one["claim"], str(one["draws"]), _signed(one["mean"]),
             "" if one["low"] is None else f"{_signed(one['low'])} to {_signed(one['high'])}", one["told"]]
            for one in agreement.claims]
    return page.note(f"{words}: {len(agreement.rows)} searches. A claim holds if the interval of its difference over "
                     "the draws of calibration text lies above zero.") + page.plain(head, rows, label="Claims")


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def _task_scores(own: pd.DataFrame, measured: pd.DataFrame) -> str:
    """One column for each metric of each task."""
    quality = measured[measured["task"] != "efficiency"]
    frame, columns = own[["model", "calib", "method", "ratio", "k_max", "finetuned", "params_zeroed"]].copy(), {}
    for (task, metric, unit), part in quality.groupby(["task", "metric", "unit"], sort=True):
        share, name = unit == "share", f"{task}, {metric}"
        columns[name] = Column(name, "%" if share else unit, "", 1 if share else 2, 100 if share else 1,
                               stderr=f"{name} stderr")
        for target, source in ((name, "value"), (f"{name} stderr", "stderr")):
            frame[target] = _looked_up(frame, part, source)
    return _point_table(frame, list(columns), columns, label="Scores by task") if columns else ""


def _costs(own: pd.DataFrame, measured: pd.DataFrame) -> str:
    """Size, speed and memory of each model, the times of search and fit, and the blocks."""
    frame, columns = own.copy(), {**COLUMNS, **EXTRA}
    for name in ("prefill_ms", "decode_ms", "peak_memory_mib"):
        frame[name] = _looked_up(frame, measured[measured["metric"] == name], "value")
    names = [name for name in COSTS if frame[name].notna().any() and (name != "params_zeroed" or frame[name].any())]
    words = {heading(columns[name]): columns[name].what for name in names}
    words["Blocks"] = "Replaced layers, from the first to one past the last: 5-7 means layers 5 and 6."
    return _point_table(frame, names, columns, label="Costs and blocks") + page.meanings(words)


def _looked_up(frame: pd.DataFrame, part: pd.DataFrame, source: str) -> list[float]:
    """For each row of `frame`, the value of `part` with the same method, calibration set, ratio and k_max."""
    held = {_point(row): row[source] for _, row in part.iterrows()}
    return [held.get(_point(row), math.nan) for _, row in frame.iterrows()]


def _point(row: pd.Series) -> tuple[Any, ...]:
    return (row["method"], "" if row["method"] == DENSE else row["calib"], float(row["ratio"]), int(row["k_max"]))


def _comparisons(comparisons: pd.DataFrame | None, model: str) -> str:
    """The paired tests behind the sentences about a model, hidden until the reader clicks."""
    own = _rows_of(comparisons, model)
    if not own.empty:
        own = own[(own["task"] == "all") & own["p_holm"].notna()]
    return _unfolds(own, f"{counted(len(own), 'test')}, item by item", TEST_WORDS, "Paired comparisons")


def _fits(fits: pd.DataFrame | None, model: str) -> str:
    """All fits of a model without the empty columns, hidden until the reader clicks."""
    own = _rows_of(fits, model).dropna(axis=1, how="all")
    return _unfolds(own, f"{counted(len(own), 'fit')}, block by block", FIT_WORDS, "Fits")


def _rows_of(frame: pd.DataFrame | None, model: str) -> pd.DataFrame:
    if frame is None or "model" not in frame:
        return pd.DataFrame() if frame is None else frame
    return frame[frame["model"] == model].drop(columns="model")


def _unfolds(own: pd.DataFrame, heading: str, words: Mapping[str, str], label: str) -> str:
    """A frame with the meanings of its columns, hidden until the reader clicks."""
    told = {word: meaning for word, meaning in words.items() if word.replace(" ", "_") in own}
    return page.folded(heading, _frame(own, label) + page.meanings(told)) if len(own) else ""


def _frame(frame: pd.DataFrame, label: str) -> str:
    """A data frame as a table; its numbers have four significant digits."""
    rows = [Row([Cell(text(_plain(value)), str(value) if known(value) else "") for value in row])
            for row in frame.itertuples(index=False)]
    heads = [str(name).replace("_", " ") for name in frame]
    return page.table(heads, {"": rows}, label=label, name=heads.index("method") if "method" in heads else 0)


def _plain(value: Any) -> str:
    if not known(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else \
        f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def figure(entry: FigureEntry, *, heading: bool = True) -> str:
    """A figure with its title, caption and links. Raises ReportError if the file of the figure does not exist."""
    path = Path(entry.png_path)
    if not path.is_file():
        raise ReportError(f"figure {entry.title!r} has no file {path.name}; run rule {entry.rule} first")
    data = path.read_bytes()
    # with the size from the header of the PNG file, the page does not jump when the image is drawn
    width, height = struct.unpack(">II", data[16:24])
    links = "".join(f' <a href="{text(quote(entry.link))}.{suffix}">{suffix.upper()}</a>' for suffix in ("pdf", "csv")
                    ) if entry.link else ""
    title = f"<h4>{text(entry.title)}</h4>" if heading else ""
    # on a phone, panels next to each other stay readable because the reader can scroll sideways
    panels = ' class="panels" tabindex="0"' if width > PANELS * height else ""
    return (f'<figure>{title}<div{panels}><img alt="{text(entry.title)}: described below" '
            f'width="{width}" height="{height}" '
            f'src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}"></div>'
            f"<figcaption>{text(entry.caption)} Made by rule <code>{text(entry.rule)}</code>.{links}</figcaption>"
            "</figure>\n")
