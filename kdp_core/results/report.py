"""One self-contained HTML page of a run: what came out and how sure it is, then each model, then how it was made.

No network, no fonts, no scripts from elsewhere (a content security policy says so to the browser); links lead to files
beside the page. All text is escaped. Equal arguments give equal bytes.
"""
import base64
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd

from kdp_core.results import findings, page, tables
from kdp_core.results.findings import Finding, counted, duration, known, listing
from kdp_core.results.page import Cell, Row, cell, text
from kdp_core.results.tables import COLUMNS, DENSE, Column

EXTRA = {
    "params_zeroed": Column("Set to zero", "%", "Share of all parameters set to zero and kept in the model.", 1, 100),
    "prefill_ms": Column("Prefill", "ms", "Median time of one pass over the timed prompt.", 1),
    "decode_ms": Column("Decode", "ms", "Median time of one more token, the prompt cached.", 1),
    "peak_memory_mib": Column("Peak memory", "MiB", "Most memory held while the model was timed.", 0),
}
"""Costs that the summary does not have."""
COSTS = ("params_removed", "params_zeroed", "layers_removed", "params_millions", "macs_giga", "prefill_ms", "decode_ms",
         "peak_memory_mib", "search_seconds", "fit_seconds", "blocks")
GROUPS = {"": "Models with fewer parameters", "finetuned": "Fine-tuned after pruning (†)",
          "zeros": "Models with weights set to zero, as large as the dense one"}
FIT_WORDS = {
    "block": "Layers replaced, first to one past the last; `all` is a fit of all blocks together.",
    "step": "Which fit: a linear map, step 1 of KDP (kernel), its step 2 (inverse), all stand-ins at once (compose).",
    "heldout error": "Squared error of the stand-in on sequences that it never saw, over the variance of the states: 0 "
                     "is perfect, 1 as good as the constant mean.",
    "heldout error identity": "The same for putting nothing in the block's place.",
    "decode error": "The same for the best linear map back from the features that step 1 predicts.",
    "decode error true features": "The same from the true features: what step 1 could reach at best.",
    "heldout cos": "Step 1: weighted cosine of predicted and true features on held-out sequences.",
    "heldout loss": "The loss that was trained on, on held-out sequences.",
    "heldout mse": "Step 1: the part of its loss that is a mean squared error.",
    "heldout kl": "Divergence of the pruned model's outputs from the dense model's, nats a token.",
    "ridge": "Penalty on the size of a linear map, as it was used.",
    "tokens": "Tokens that were fitted on.",
    "seconds": "Time of the fit.",
}
TEST_WORDS = {
    "against": "The question: who differs from the best, from the baseline, from the dense model?",
    "difference": "Score of the method less that of the other, as a share of items or in nats a token.",
    "stderr": "Standard error of that difference, item by item.",
    "p": "How often chance alone would show a difference as large.",
    "p holm": "The same, raised because many pairs were tested.",
    "items": "Items that both models answered.",
}
READING = {
    "Standard error (±)": "How far a score would move by chance if other items of the same kind had been drawn; about "
                          "two thirds of the time less than this. That of a mean takes the tasks as independent. It "
                          "covers the choice of items, not that of calibration texts or seeds.",
    "No winner": "The best value is too close to others to say that the order is real.",
    "Paired test": "Compares two models item by item, so that items which are hard for both drop out; p is how often "
                   "chance alone would show a difference as large.",
    "Holm's correction": "Raises p because many pairs were tested, and the luckiest of many looks better than it is.",
    "Combined standard error": "The chance movement of a difference of two scores taken as independent. All models "
                               "answer the same items, so this is on the safe side: a paired test can see smaller "
                               "differences.",
    "Retained": "Mean accuracy as a share of the dense model's. A model that guesses still “retains” what guessing "
                "scores.",
}
PAIRED_RULE = (f"A paired test on the same items decides, clear below p = {tables.SIGNIFICANT:g} after Holm's "
               f"correction; pairs without one are clear from {findings.CLEAR:g} combined standard errors on and tied "
               f"up to {findings.TIE:g}.")
UNPAIRED_RULE = (f"No paired tests were given: a difference is clear from {findings.CLEAR:g} combined standard errors "
                 f"on, a tie up to {findings.TIE:g}, suggestive between.")
MARKS = f"{tables.NOTE} A heading sorts its column, within the groups."
LEVELS = {"clear": "clear", "suggestive": "suggestive", "tie": "no winner", "unknown": "error unknown"}


class ReportError(ValueError):
    """Something that the page needs is missing."""


class FigureEntry(NamedTuple):
    """A figure of the page."""
    title: str
    caption: str
    rule: str
    """Workflow rule that made it."""
    png_path: Path | str
    link: str = ""
    """Where it lies from the page, without suffix; its PDF and CSV are beside it. Empty: no links."""
    model: str = ""
    """The model it is about; empty for an overview of all."""


def build(*, summary: pd.DataFrame, scores: pd.DataFrame, figures: Sequence[FigureEntry] = (),
          fits: pd.DataFrame | None = None, comparisons: pd.DataFrame | None = None, config_yaml: str = "",
          versions: Mapping[str, str] | None = None, seeds: Mapping[str, int] | None = None,
          benchmarks: pd.DataFrame | None = None, title: str = "Kernelized Dynamics Pruning: results",
          baseline: str = "remove") -> str:
    """The page as text.

    summary: from tables.summarise; scores: from tables.tidy; fits: from tables.fits; comparisons: paired tests, as
    findings.headline takes them, or none; benchmarks: columns rule, s, max_rss (MB) from Snakemake's benchmark files,
    a row a job. `baseline` is the method that deletes the chosen layers and puts nothing in their place. Raises
    ReportError for an empty summary or a figure without its file.
    """
    if summary.empty:
        raise ReportError("the summary has no rows; evaluate at least the dense model before the report is built")
    said = findings.headline(summary, baseline=baseline, comparisons=comparisons)
    models = list(dict.fromkeys(summary["model"]))
    return page.document(title, _lead(summary, benchmarks), [
        ("In short", "short", _glance(said, models, comparisons)),
        ("Summary", "summary", _summary_table(summary, comparisons)),
        ("Overview", "figures", "".join(_figure(entry) for entry in figures if entry.model not in models)),
        *((model, f"model{place}", _model(model, summary, scores, figures, fits, comparisons))
          for place, model in enumerate(models, start=1)),
        ("Tasks", "tasks", _tasks(scores)),
        ("Configuration", "configuration", page.folded("The configuration of this run", f"<pre>{text(config_yaml)}"
                                                       "</pre>") if config_yaml else ""),
        ("Versions and seeds", "versions", _pairs("Package", versions) + _pairs("Seed", seeds)),
        ("Run times", "times", _times(benchmarks) if benchmarks is not None else ""),
    ])


# The first screen -----------------------------------------------------------------------------------------------------

def _lead(summary: pd.DataFrame, benchmarks: pd.DataFrame | None) -> str:
    """What was pruned and how long it took, in a sentence or two."""
    pruned = summary[summary["method"] != DENSE]
    models = list(dict.fromkeys(summary["model"]))
    if pruned.empty:
        return f"{listing(models)}: the dense model alone, nothing pruned yet."
    methods, ratios = list(dict.fromkeys(pruned["method"])), sorted(set(pruned["ratio"]))
    took = f" All jobs together took {duration(_seconds(benchmarks).sum())}." \
        if benchmarks is not None and len(benchmarks) else ""
    return (f"{listing(models)} pruned by {listing(methods)} at {'targets' if len(ratios) > 1 else 'a target'} of "
            f"{listing([f'{100 * ratio:g}' for ratio in ratios])} % of the parameters: "
            f"{counted(len(pruned), 'pruned model')}.{took}")


def _glance(said: Sequence[Finding], models: Sequence[str], comparisons: pd.DataFrame | None) -> str:
    """A card a target of each model, and what the words mean."""
    made = ""
    for model in models:
        own = [finding for finding in said if finding.model == model]
        dense = "".join(f'<p class="lead">Dense: {text(claim.text)}</p>' for finding in own if not finding.target
                        for claim in finding.claims)
        cards = "".join(_card(finding) for finding in own if finding.target)
        made += f'<h3>{text(model)}</h3>{dense}<div class="cards">{cards}</div>\n'
    paired = comparisons is not None and not comparisons.empty
    return made + page.note(PAIRED_RULE if paired else UNPAIRED_RULE) + page.meanings(READING, "What the words mean")


def _card(finding: Finding) -> str:
    said = ""
    for claim in finding.claims:
        level = f'<span class="level {claim.level}">{LEVELS[claim.level]}</span>' if claim.level else ""
        words = text(claim.text).replace(text(claim.first), f"<b>{text(claim.first)}</b>", 1)
        said += f"<dt>{text(claim.topic)}{level}</dt><dd>{words if claim.first else text(claim.text)}</dd>"
    return f'<article class="card"><h4>Target {text(finding.target)}</h4><dl>{said}</dl></article>'


# The summary ----------------------------------------------------------------------------------------------------------

def _summary_table(summary: pd.DataFrame, comparisons: pd.DataFrame | None, *, label: str = "Summary") -> str:
    """The main columns, marked as in tables.marks; below it what they mean."""
    marks = {name: tables.marks(summary, name, comparisons=comparisons) for name in tables.MAIN}
    made = _point_table(summary, tables.MAIN, COLUMNS, label=label, marks=marks)
    return made + page.note(MARKS) + page.meanings({tables.heading(COLUMNS[name]): COLUMNS[name].what
                                                    for name in tables.MAIN})


def _point_table(rows: pd.DataFrame, names: Sequence[str], columns: Mapping[str, Column], *, label: str,
                 marks: Mapping[str, Mapping[Any, str]] | None = None) -> str:
    """A row a model: its keys and these columns; in groups, where there is more than one kind of model."""
    keys = tables.shown_keys(rows)[0 if rows["model"].nunique() > 1 else 1:]
    head = [tables.KEY_HEADINGS[key] for key in keys] + [tables.heading(columns[name]) for name in names]
    groups: dict[str, list[Row]] = {}
    for index, row in rows.iterrows():
        cells = [cell(tables.key_text(key, row), None if key != "ratio" else 100 * row[key]) for key in keys]
        cells += [_number_cell(row, name, columns[name], (marks or {}).get(name, {}).get(index, "")) for name in names]
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
    error = row[column.stderr] if column.stderr and name not in tables.RELATIVE else None
    return Cell(_marked(text(tables.number(column, value)), mark) + _error(column, error),
                str(value) if known(value) else "")


def _marked(markup: str, mark: str) -> str:
    return {"best": f"<b>{markup}</b>", "second": f"<u>{markup}</u>"}.get(mark, markup)


def _error(column: Column, error: Any) -> str:
    return f' <span class="pm">± {text(tables.number(column, error))}</span>' if known(error) else ""


# A model --------------------------------------------------------------------------------------------------------------

def _model(model: str, summary: pd.DataFrame, scores: pd.DataFrame, figures: Sequence[FigureEntry],
           fits: pd.DataFrame | None, comparisons: pd.DataFrame | None) -> str:
    """Scores by task, costs and blocks, paired tests, fits and figures of one model."""
    own, alone = summary[summary["model"] == model], summary["model"].nunique() == 1
    measured = scores[scores["model"] == model]
    parts = [("Summary", "" if alone else _summary_table(own, comparisons, label=f"Summary of {model}")),
             ("Scores by task", _task_scores(own, measured)),
             ("Costs and blocks", _costs(own, measured)),
             ("Paired comparisons", _comparisons(comparisons, model)),
             ("Fits", _fits(fits, model)),
             ("Figures", "".join(_figure(entry) for entry in figures if entry.model == model))]
    return "".join(f"<h3>{heading}</h3>\n{markup}" for heading, markup in parts if markup)


def _task_scores(own: pd.DataFrame, measured: pd.DataFrame) -> str:
    """Every metric of every task, a column each."""
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
    """What each model has, takes and took."""
    frame, columns = own.copy(), {**COLUMNS, **EXTRA}
    for name in ("prefill_ms", "decode_ms", "peak_memory_mib"):
        frame[name] = _looked_up(frame, measured[measured["metric"] == name], "value")
    names = [name for name in COSTS if frame[name].notna().any() and (name != "params_zeroed" or frame[name].any())]
    words = {tables.heading(columns[name]): columns[name].what for name in names}
    words["Blocks"] = "Replaced layers, first to one past the last: 5-7 stands for layers 5 and 6."
    return _point_table(frame, names, columns, label="Costs and blocks") + page.meanings(words)


def _looked_up(frame: pd.DataFrame, part: pd.DataFrame, source: str) -> list[float]:
    """The values of `part` that belong to the rows of `frame`, by method, calibration set, ratio and k_max."""
    held = {_point(row): row[source] for _, row in part.iterrows()}
    return [held.get(_point(row), math.nan) for _, row in frame.iterrows()]


def _point(row: pd.Series) -> tuple[Any, ...]:
    return (row["method"], "" if row["method"] == DENSE else row["calib"], float(row["ratio"]), int(row["k_max"]))


def _comparisons(comparisons: pd.DataFrame | None, model: str) -> str:
    """The paired tests of a model that the words go by, folded."""
    own = _of_model(comparisons, model)
    if not own.empty:
        own = own[(own["task"] == "all") & own["p_holm"].notna()]
    return _unfolds(own, f"{counted(len(own), 'test')}, item by item", TEST_WORDS, "Paired comparisons")


def _fits(fits: pd.DataFrame | None, model: str) -> str:
    """All fits of a model, folded, without the columns that none of them has."""
    own = _of_model(fits, model).dropna(axis=1, how="all")
    return _unfolds(own, f"{counted(len(own), 'fit')}, block by block", FIT_WORDS, "Fits")


def _of_model(frame: pd.DataFrame | None, model: str) -> pd.DataFrame:
    if frame is None or "model" not in frame:
        return pd.DataFrame() if frame is None else frame
    return frame[frame["model"] == model].drop(columns="model")


def _unfolds(own: pd.DataFrame, heading: str, words: Mapping[str, str], label: str) -> str:
    """A frame and what its columns mean, below its heading."""
    told = {word: meaning for word, meaning in words.items() if word.replace(" ", "_") in own}
    return page.folded(heading, _frame(own, label) + page.meanings(told)) if len(own) else ""


def _frame(frame: pd.DataFrame, label: str) -> str:
    """Any frame, numbers to four digits."""
    rows = [Row([Cell(text(_plain(value)), str(value) if known(value) else "") for value in row])
            for row in frame.itertuples(index=False)]
    heads = [str(name).replace("_", " ") for name in frame]
    return page.table(heads, {"": rows}, label=label, name=heads.index("method") if "method" in heads else 0)


def _plain(value: Any) -> str:
    if not known(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else \
        f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _figure(entry: FigureEntry) -> str:
    path = Path(entry.png_path)
    if not path.is_file():
        raise ReportError(f"figure {entry.title!r} has no file {path.name}; run rule {entry.rule} first")
    data = path.read_bytes()
    # a PNG's header says how much room it takes: the page does not jump when it is drawn
    width, height = struct.unpack(">II", data[16:24])
    links = "".join(f' <a href="{text(quote(entry.link))}.{suffix}">{suffix.upper()}</a>' for suffix in ("pdf", "csv")
                    ) if entry.link else ""
    return (f'<figure><h4>{text(entry.title)}</h4><img alt="{text(entry.title)}: described below" '
            f'width="{width}" height="{height}" '
            f'src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}">'
            f"<figcaption>{text(entry.caption)} Made by rule <code>{text(entry.rule)}</code>.{links}</figcaption>"
            "</figure>\n")


# How it was made ------------------------------------------------------------------------------------------------------

def _tasks(scores: pd.DataFrame) -> str:
    """What was scored, on how many items."""
    measured = scores[scores["task"] != "efficiency"]
    sizes = measured.groupby(["task", "metric", "unit"], sort=True)["items"].agg(["min", "max"]).reset_index()
    rows = [[row["task"], row["metric"], row["unit"],
             f"{row['min']:,}" if row["min"] == row["max"] else f"{row['min']:,} to {row['max']:,}"]
            for _, row in sizes.iterrows()]
    words = {"Metric": "As lm-eval names it: acc_norm is accuracy with answers weighed by their length.",
             "Unit": "A share is printed in % elsewhere, ppl is perplexity, bits/byte is the same for any tokenizer.",
             "Items": "Questions, or for perplexity documents or windows of text, that each model was scored on."}
    return page.plain(["Task", "Metric", "Unit", "Items"], rows, label="Tasks") + page.meanings(words) if rows else ""


def _times(benchmarks: pd.DataFrame) -> str:
    """A row a rule, longest first: jobs, seconds in all, longest job, peak memory."""
    seconds = _seconds(benchmarks)
    memory = benchmarks["max_rss"] if "max_rss" in benchmarks else math.nan
    # Snakemake writes - or NA for jobs that are too short to be sampled
    clean = benchmarks.assign(s=seconds, max_rss=pd.to_numeric(pd.Series(memory, index=benchmarks.index),
                                                               errors="coerce"))
    rows = []
    for rule, part in sorted(clean.groupby("rule"), key=lambda item: (-item[1]["s"].sum(), item[0])):
        peak = part["max_rss"].max()
        rows.append([str(rule), str(len(part)), f"{part['s'].sum():.1f}", f"{part['s'].max():.1f}",
                     f"{peak:,.0f}" if known(peak) else "–"])
    if not rows:
        return ""
    head = ["Rule", "Jobs", "All jobs (s)", "Longest job (s)", "Peak memory (MB)"]
    total = f"{counted(len(clean), 'job')}, {duration(seconds.sum())} in all, {duration(seconds.max())} the longest."
    return page.note(total) + page.plain(head, rows, label="Run times")


def _seconds(benchmarks: pd.DataFrame) -> pd.Series:
    if not {"rule", "s"} <= set(benchmarks):
        raise ReportError(f"benchmarks need the columns rule and s, not {', '.join(map(str, benchmarks))}")
    return pd.to_numeric(benchmarks["s"], errors="coerce")


def _pairs(word: str, values: Mapping[str, Any] | None) -> str:
    rows = [[str(name), str(value)] for name, value in sorted((values or {}).items())]
    return page.plain([word, "Value"], rows, label=f"{word}s")
