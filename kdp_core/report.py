"""One self-contained HTML page of a run: what came out, how sure it is, how it was made.

No network, no fonts, no scripts from elsewhere (a content security policy says so to the browser); the table sorts by
a few lines of JavaScript and reads the same without. All text is escaped. Equal arguments give equal bytes.
"""
import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kdp_core import tables
from kdp_core.tables import COLUMNS, DENSE

TIE, CLEAR = 1.0, 2.0
"""In combined standard errors: up to TIE apart is a tie, from CLEAR on a clear difference."""


class ReportError(ValueError):
    """Something that the page needs is missing."""


class FigureEntry(NamedTuple):
    """A figure of the page."""
    title: str
    caption: str
    rule: str
    """Workflow rule that made it."""
    png_path: Path | str


def build(*, summary: pd.DataFrame, scores: pd.DataFrame, figures: Sequence[FigureEntry] = (),
          fits: pd.DataFrame | None = None, config_yaml: str = "", versions: Mapping[str, str] | None = None,
          seeds: Mapping[str, int] | None = None, benchmarks: pd.DataFrame | None = None,
          title: str = "Kernelized Dynamics Pruning: results", baseline: str = "remove") -> str:
    """The page as text.

    summary: from tables.summarise; scores: from tables.tidy; fits: from tables.fits; benchmarks: columns rule, s,
    max_rss (MB) from Snakemake's benchmark files, a row a job. `baseline` is the method that deletes the chosen layers
    and puts nothing in their place. Raises ReportError for an empty summary or a figure without its file.
    """
    if summary.empty:
        raise ReportError("the summary has no rows; evaluate at least the dense model before the report is built")
    body = [
        ("In short", "short", _findings(headline(summary, baseline=baseline))),
        ("Summary", "summary", _summary_table(summary)),
        ("Figures", "figures", "".join(_figure(entry) for entry in figures)),
        ("Grid points", "points", _grid_points(summary)),
        ("Fits", "fits", _frame(fits) if fits is not None else ""),
        ("Tasks and errors", "tasks", _tasks(scores)),
        ("Configuration", "configuration", _configuration(config_yaml)),
        ("Versions and seeds", "versions", _pairs("Package", versions) + _pairs("Seed", seeds)),
        ("Run times", "times", _times(benchmarks) if benchmarks is not None else ""),
    ]
    kept = [(heading, anchor, content) for heading, anchor, content in body if content]
    links = "".join(f'<a href="#{anchor}">{heading}</a> ' for heading, anchor, _ in kept)
    sections = "".join(f'<section id="{anchor}"><h2>{heading}</h2>\n{content}</section>\n'
                       for heading, anchor, content in kept)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n{POLICY}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{CSS}</style></head>\n<body><header><h1>{_text(title)}</h1>"
            f"<nav>{links}</nav></header>\n<main>{sections}</main>\n<script>{SCRIPT}</script></body></html>\n")


class Finding(NamedTuple):
    """What the page says in words of one model, or of one model and target."""
    subject: str
    sentences: list[str]


# In words -------------------------------------------------------------------------------------------------------------

def headline(summary: pd.DataFrame, *, baseline: str = "remove") -> list[Finding]:
    """The summary in plain sentences: one finding for each dense model and one for each target ratio of it.

    Two values up to one combined standard error sqrt(se1^2 + se2^2) apart are called a tie, from two on a clear
    difference. All models answer the same items, so this error, which takes them as independent, is on the safe side.
    """
    said = []
    for model in sorted(summary["model"].unique()):
        own = summary[summary["model"] == model]
        dense = own[own["method"] == DENSE]
        pruned = own[own["method"] != DENSE]
        if not dense.empty:
            said.append(Finding(f"{model}, dense", [f"{_dense_words(dense.iloc[0])}."]))
        for ratio, group in pruned.groupby("ratio", sort=True):
            said.append(Finding(f"{model}, target {100 * float(ratio):g} %", _group_words(group, baseline)))
    return said


def _dense_words(row: pd.Series) -> str:
    parts = [f"{_value(row, name)} {word}" for name, word in (("acc", "mean accuracy"), ("ppl", "perplexity"))
             if _known(row[name])]
    return " and ".join(parts) or "Not scored"


def _group_words(group: pd.DataFrame, baseline: str) -> list[str]:
    names = _variant_names(group)
    scored = [metric for metric in ("acc", "ppl") if group[metric].notna().any()]
    low, high = 100 * group["params_removed"].min(), 100 * group["params_removed"].max()
    actual = f"{low:.1f} %" if high - low < 0.05 else f"{low:.1f} to {high:.1f} %"
    return [*(_metric_words(group, names, metric) for metric in scored), *_baseline_words(group, names, baseline),
            f"Really removed: {actual} of the parameters."]


def _metric_words(group: pd.DataFrame, names: pd.Series, metric: str) -> str:
    """Who is first, by how much, and who cannot be told from it."""
    column, word = COLUMNS[metric], "accuracy" if metric == "acc" else "perplexity"
    ranked = group[group[metric].notna()].sort_values(metric, ascending=column.better < 0, kind="stable")
    first = ranked.iloc[0]
    name, value = names[first.name], f"{_value(first, metric)}{_beside_dense(first, metric)}"
    if len(ranked) == 1:
        return f"{name} alone was scored for {word}: {value}."
    tied = [names[label] for label in ranked.index[1:] if _apart(first, ranked.loc[label], metric) <= TIE]
    if tied:
        return (f"No winner in {word}: {name} reads best ({value}), with {_list(tied)} within one combined standard "
                "error of it.")
    second = ranked.iloc[1]
    gap = tables.number(column, abs(first[metric] - second[metric])) + (" points" if column.unit == "%" else "")
    apart = _apart(first, second, metric)
    noise = "standard errors are not known" if math.isinf(apart) else \
        f"{apart:.1f} combined standard errors, {'a clear difference' if apart >= CLEAR else 'suggestive, not clear'}"
    lead = "kept the most accuracy" if metric == "acc" else "had the lowest perplexity"
    return f"{name} {lead} ({value}), {gap} ahead of {names[second.name]} ({_value(second, metric)}): {noise}."


def _beside_dense(row: pd.Series, metric: str) -> str:
    if metric == "acc":
        return f", {row['rp']:.1f} % of dense" if _known(row["rp"]) else ""
    return f", {row['ppl_ratio']:.2f} times dense" if _known(row["ppl_ratio"]) else ""


def _baseline_words(group: pd.DataFrame, names: pd.Series, baseline: str) -> list[str]:
    """Methods that do no better than deleting layers, compared at equal calibration set and k_max."""
    worse, level = [], []
    for _, part in group[group["acc"].notna()].groupby(["calib", "k_max"], sort=True):
        plain = part[part["method"] == baseline]
        if plain.empty:
            continue
        floor = plain.iloc[0]
        for label, row in part[part["method"] != baseline].iterrows():
            if _apart(row, floor, "acc") <= TIE:
                level.append(names[label])
            elif row["acc"] < floor["acc"]:
                worse.append(names[label])
    said = [f"Less accurate than “{baseline}”, which deletes layers and puts nothing in their place: {_list(worse)}."
            ] if worse else []
    return said + ([f"Not told apart from “{baseline}” in accuracy: {_list(level)}."] if level else [])


def _apart(one: pd.Series, other: pd.Series, metric: str) -> float:
    """Difference in combined standard errors: infinite where none is known and the values differ."""
    gap = abs(one[metric] - other[metric])
    errors = [one[COLUMNS[metric].stderr], other[COLUMNS[metric].stderr]]
    combined = math.hypot(*errors) if all(_known(error) for error in errors) else 0.0
    return gap / combined if combined else (math.inf if gap else 0.0)


def _variant_names(group: pd.DataFrame) -> pd.Series:
    """The method, with calib and k_max where the group varies in them."""
    calibs, k_maxes = group["calib"].nunique() > 1, group["k_max"].nunique() > 1
    extras = [[*([str(row["calib"])] if calibs else []), *([f"k {row['k_max']}"] if k_maxes else [])]
              for _, row in group.iterrows()]
    return pd.Series([f"{method} ({', '.join(extra)})" if extra else method
                      for method, extra in zip(group["method"], extras, strict=True)], index=group.index)


def _value(row: pd.Series, name: str) -> str:
    column = COLUMNS[name]
    error = row[column.stderr]
    unit = f" {column.unit}" if column.unit else ""
    pm = f" ± {tables.number(column, error)}" if _known(error) else ""
    return f"{tables.number(column, row[name])}{pm}{unit}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)


# In tables ------------------------------------------------------------------------------------------------------------

def _summary_table(summary: pd.DataFrame) -> str:
    """The main columns, sortable, marked as in tables.marks; below it what the columns mean."""
    keys = tables.shown_keys(summary)[0 if summary["model"].nunique() > 1 else 1:]
    marks = {name: tables.marks(summary, name) for name in tables.MAIN}
    words = [tables.KEY_HEADINGS[key] for key in keys] + [tables.heading(COLUMNS[name]) for name in tables.MAIN]
    head = "".join(f'<th scope="col"{"" if place < len(keys) else NUMERIC}><button type="button">{_text(word)}</button>'
                   "</th>" for place, word in enumerate(words))
    rows = []
    for label, row in summary.iterrows():
        cells = [_td(tables.key_text(key, row), row[key]) for key in keys]
        cells += [_number_td(row, name, marks[name].get(label, "")) for name in tables.MAIN]
        rows.append(f"<tr{DENSE_ROW if row['method'] == DENSE else ''}>{''.join(cells)}</tr>")
    meanings = "".join(f"<dt>{_text(tables.heading(COLUMNS[name]))}</dt><dd>{_text(COLUMNS[name].what)}</dd>"
                       for name in tables.MAIN)
    return (f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
            f'</table></div><p class="note">{MARKS}</p><details><summary>What the columns mean</summary>'
            f"<dl>{meanings}</dl></details>")


def _grid_points(summary: pd.DataFrame) -> str:
    pruned = summary[summary["method"] != DENSE]
    names = ("params_removed", "layers_removed", "fit_seconds", "blocks")
    head = [tables.KEY_HEADINGS[key] for key in tables.KEYS] + [tables.heading(COLUMNS[name]) for name in names]
    rows = [[*(tables.key_text(key, row) for key in tables.KEYS),
             *(tables.number(COLUMNS[name], row[name]) for name in names)] for _, row in pruned.iterrows()]
    return _table(head, rows) + '<p class="note">A block 5-7 stands for layers 5 and 6.</p>' if rows else ""


def _tasks(scores: pd.DataFrame) -> str:
    measured = scores[scores["task"] != "efficiency"]
    sizes = measured.groupby(["task", "metric", "unit"], sort=True)["items"].agg(["min", "max"]).reset_index()
    rows = [[row["task"], row["metric"], row["unit"],
             f"{row['min']:,}" if row["min"] == row["max"] else f"{row['min']:,} to {row['max']:,}"]
            for _, row in sizes.iterrows()]
    return _table(["Task", "Metric", "Unit", "Items"], rows) + f'<p class="note">{ERRORS}</p>' if rows else ""


def _times(benchmarks: pd.DataFrame) -> str:
    """A row a rule, longest first: jobs, seconds in all, longest job, peak memory."""
    if not {"rule", "s"} <= set(benchmarks):
        raise ReportError(f"benchmarks need the columns rule and s, not {', '.join(map(str, benchmarks))}")
    memory = benchmarks["max_rss"] if "max_rss" in benchmarks else math.nan
    # Snakemake writes - or NA for jobs that are too short to be sampled
    clean = benchmarks.assign(s=pd.to_numeric(benchmarks["s"], errors="coerce"),
                              max_rss=pd.to_numeric(pd.Series(memory, index=benchmarks.index), errors="coerce"))
    rows = []
    for rule, part in sorted(clean.groupby("rule"), key=lambda item: (-item[1]["s"].sum(), item[0])):
        peak = part["max_rss"].max()
        rows.append([str(rule), str(len(part)), f"{part['s'].sum():.1f}", f"{part['s'].max():.1f}",
                     f"{peak:,.0f}" if _known(peak) else "–"])
    return _table(["Rule", "Jobs", "All jobs (s)", "Longest job (s)", "Peak memory (MB)"], rows) if rows else ""


def _pairs(word: str, values: Mapping[str, Any] | None) -> str:
    rows = [[str(name), str(value)] for name, value in sorted((values or {}).items())]
    return _table([word, "Value"], rows) if rows else ""


def _frame(frame: pd.DataFrame) -> str:
    """Any frame, numbers to four digits."""
    rows = [[_plain(value) for value in row] for row in frame.itertuples(index=False)]
    return _table([str(name).replace("_", " ") for name in frame], rows) if rows else ""


def _plain(value: Any) -> str:
    if not _known(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else \
        f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small table; a column is set right if all its cells are numbers or dashes."""
    right = [all(_numeric(row[place]) for row in rows) for place in range(len(head))]
    top = "".join(f'<th scope="col"{NUMERIC if side else ""}>{_text(word)}</th>'
                  for word, side in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(f"<td{NUMERIC if side else ''}>{_text(cell)}</td>"
                                    for cell, side in zip(row, right, strict=True)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _numeric(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "–"
    return True


def _td(text: str, value: Any) -> str:
    return f'<td data-value="{_text(str(value))}">{_text(text)}</td>'


def _number_td(row: pd.Series, name: str, mark: str) -> str:
    column, value = COLUMNS[name], row[name]
    error = row[column.stderr] if column.stderr in ("acc_stderr", "ppl_stderr") else None
    pm = f' <span class="pm">± {_text(tables.number(column, error))}</span>' if _known(error) else ""
    text = _text(tables.number(column, value))
    text = {"best": f"<b>{text}</b>", "second": f"<u>{text}</u>"}.get(mark, text)
    return f'<td{NUMERIC} data-value="{value if _known(value) else ""}">{text}{pm}</td>'


# The rest of the page -------------------------------------------------------------------------------------------------

def _figure(entry: FigureEntry) -> str:
    path = Path(entry.png_path)
    if not path.is_file():
        raise ReportError(f"figure {entry.title!r} has no file {path.name}; run rule {entry.rule} first")
    image = base64.b64encode(path.read_bytes()).decode("ascii")
    return (f'<figure><h3>{_text(entry.title)}</h3><img alt="{_text(entry.caption)}" '
            f'src="data:image/png;base64,{image}"><figcaption>{_text(entry.caption)} '
            f'<span class="rule">Made by rule <code>{_text(entry.rule)}</code>.</span></figcaption></figure>\n')


def _configuration(config_yaml: str) -> str:
    return (f"<details><summary>The configuration of this run</summary><pre>{_text(config_yaml)}</pre></details>"
            if config_yaml else "")


def _findings(findings: Sequence[Finding]) -> str:
    said = "".join(f"<h3>{_text(subject)}</h3><ul>{''.join(f'<li>{_text(one)}</li>' for one in sentences)}</ul>\n"
                   for subject, sentences in findings)
    return f'{said}<p class="note">{READING}</p>'


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


NUMERIC = ' class="number"'
DENSE_ROW = ' class="dense"'
POLICY = ('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
          '\'unsafe-inline\'; script-src \'unsafe-inline\'">\n')
READING = ("Values stand with one standard error. Up to one combined standard error apart is called a tie, two or more "
           "a clear difference. All models answer the same items, so these errors, which take the models as "
           "independent, are on the safe side. Read accuracies against what guessing would score: a model that "
           "guesses still “retains” a share of the dense model's accuracy.")
MARKS = ("Compared are pruned models of one model and target. Bold: best, by more than one combined standard error "
         "where errors are known. Underlined: second, or all that cannot be told from the first. "
         "Click a heading to sort.")
ERRORS = ("The standard error of a task is over its items; that of the mean accuracy takes the tasks as independent. "
          "It covers the choice of items, not that of calibration texts or seeds.")
CSS = """
:root { --ink: #1c1c1c; --soft: #5c5c5c; --line: #dcdcdc; --link: #005a8f; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
ul { margin: 0 0 .8rem; padding-left: 1.2rem; }
p, ul, dl, figcaption { max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; }
a { color: var(--link); text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
.note, figcaption, .pm, .rule { color: var(--soft); font-size: .875rem; } .pm { font-size: .85em; white-space: nowrap; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: baseline; }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1.5px solid var(--ink); }
td { border-bottom: 1px solid var(--line); white-space: nowrap; }
.number { text-align: right; padding: .32rem .3rem .32rem .6rem; }
.number + :not(.number) { padding-left: 1.1rem; }
tr.dense td { background: #f4f4f2; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
u { text-underline-offset: .2em; }
figure { margin: 0 0 2.2rem; } img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0 0 0 1rem; }
pre { overflow-x: auto; background: #f6f6f4; padding: .8rem 1rem; font-size: .8rem; line-height: 1.45; }
@media print { nav, script { display: none; } body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 7.5pt; } th, td { padding-right: .35rem; } .wide, pre { overflow: visible; }
  th { white-space: normal; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[place].dataset.value;
    const compare = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
});
"""
