"""One self-contained HTML page of a run.

The page shows, in this order: the outcome in words and in a picture; what the models write; the findings and their
certainty; each model; and how the results were made.

The page loads no other file, and its content security policy makes the browser refuse such loads. Links on the page are
relative paths. All text is escaped. Equal arguments give the same page, byte for byte.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kdp_core.base.measurements import Agreement, Answers
from kdp_core.results import findings, page
from kdp_core.results.columns import DENSE
from kdp_core.results.findings import Finding, counted, duration, known, listing
from kdp_core.results.page import text
from kdp_core.results.paired import SIGNIFICANT
from kdp_core.results.report_models import FigureEntry, ReportError, figure, of_model, summary_table

TITLE = "Kernelized Dynamics Pruning: results"
FIRST = "score-size"
"""The figure on the first screen."""
READING = {
    "Standard error (±)": "How much a score would change by chance if other items of the same kind had been drawn. In "
                          "about two thirds of all cases the score would change by less than one standard error. The "
                          "standard error of a mean assumes that the tasks are independent. The standard error covers "
                          "the choice of items, but not the choice of calibration texts or seeds.",
    "No winner": "The best value is so close to other values that the order may be chance.",
    "Paired test": "A test that compares two models item by item, so that an item which is hard for both models does "
                   "not count as a difference. p is how often chance alone would show a difference at least as large.",
    "Holm's correction": "Raises p because many pairs were tested: the luckiest of many models looks better than it "
                         "is.",
    "Combined standard error": "How much the difference of two scores would change by chance if the scores were "
                               "independent. All models answer the same items, so a rule with this error is too "
                               "cautious: a paired test can detect smaller differences.",
    "Retained": "Mean accuracy as a percentage of the dense model's. A model that only guesses still “retains” the "
                "accuracy of guessing.",
}
"""The meanings of the words in the first section."""
PAIRED_RULE = (f"Two models are compared by a paired test on the same items: a difference is clear if p is below "
               f"{SIGNIFICANT:g} after Holm's correction. If a pair has no test, a difference is clear from "
               f"{findings.CLEAR:g} combined standard errors on, and a tie up to {findings.TIE:g}.")
UNPAIRED_RULE = (f"There are no paired tests. A difference is clear from {findings.CLEAR:g} combined standard errors "
                 f"on, a tie up to {findings.TIE:g}, and suggestive in between.")
LEVELS = {"clear": "clear", "suggestive": "suggestive", "tie": "no winner", "unknown": "error unknown"}
"""The words in which the page prints how certain a first place is."""


def build(*, summary: pd.DataFrame, scores: pd.DataFrame, figures: Sequence[FigureEntry] = (),
          fits: pd.DataFrame | None = None, comparisons: pd.DataFrame | None = None, config_yaml: str = "",
          versions: Mapping[str, str] | None = None, seeds: Mapping[str, int] | None = None,
          benchmarks: pd.DataFrame | None = None, refused: Mapping[str, str] | None = None,
          expectations: Mapping[str, Sequence[tuple[str, str]]] | None = None,
          agreements: Mapping[str, Sequence[tuple[str, Agreement]]] | None = None,
          answers: Mapping[str, Answers] | None = None) -> str:
    """The page as text.

    summary, scores, fits: the data frames that summary.summarise, summary.tidy and summary.fits return.
    comparisons: the paired tests that findings.headline reads, or None.
    expectations: for each model, pairs of (name of a pruned model, expectation of its generation).
    agreements: for each model, the comparisons of searches for layers.
    benchmarks: one row for each job, with the columns rule, s, max_rss (MB) of Snakemake's benchmark files.
    refused: grid points that could not be made, with the reasons.
    answers: for each dense model's name, the continuations of the prompts.
    Raises ReportError for an empty summary, or for a figure whose file is missing.
    """
    if summary.empty:
        raise ReportError("the summary has no rows; evaluate at least the dense model before you build the report")
    said = findings.headline(summary, comparisons=comparisons)
    models = list(dict.fromkeys(summary["model"]))
    first = [entry for entry in figures if Path(entry.png_path).stem == FIRST]
    return page.document(TITLE, findings.sentence(summary) or _run(summary, None), [
        ("In short", "short", _glance(said, models, comparisons, [findings.next_best(summary, comparisons=comparisons),
                                                                  _run(summary, benchmarks)])),
        ("Left out", "refused", _refused(refused)),
        ("Summary", "summary", summary_table(summary, comparisons)),
        ("Overview", "figures", "".join(figure(entry) for entry in figures
                                          if entry.model not in models and entry not in first)),
        *((model, f"model{place}", of_model(
            model, summary, scores, figures, fits, comparisons, (expectations or {}).get(model, ()),
            (agreements or {}).get(model, ())))
          for place, model in enumerate(models, start=1)),
        ("Tasks", "tasks", _tasks(scores)),
        ("Configuration", "configuration", page.folded("The configuration of this run", f"<pre>{text(config_yaml)}"
                                                       "</pre>") if config_yaml else ""),
        ("Versions and seeds", "versions", _pairs("Package", versions) + _pairs("Seed", seeds)),
        ("Run times", "times", _times(benchmarks) if benchmarks is not None else ""),
    ], _first_screen(first, answers or {}))


# The first screen -----------------------------------------------------------------------------------------------------

def _first_screen(figures: Sequence[FigureEntry], answers: Mapping[str, Answers]) -> str:
    """The first picture, and beside it the models' answers to prompts."""
    parts = [figure(entry, heading=False) for entry in figures]
    parts += [f'<div class="answers">{_answers(model, own)}</div>' for model, own in answers.items()]
    return f'<div class="first">{"".join(parts)}</div>\n' if parts else ""


def _answers(model: str, own: Answers) -> str:
    """The continuations of the first prompt. The continuations of the other prompts are hidden until the reader
    clicks."""
    made = [f"<dl>{''.join(_answer(prompt, row['name'], row['texts'][place]) for row in own.rows)}</dl>"
            for place, prompt in enumerate(own.prompts)]
    more = "".join(f"<h3>{text(prompt)} …</h3>{lines}" for prompt, lines in zip(own.prompts[1:], made[1:], strict=True))
    return (f"<h2>What {text(model)} writes, dense and pruned</h2>{made[0]}"
            f"{page.folded('More prompts', more)}" + page.note(
                f"Each model continues the words in bold with its most likely tokens, at most {own.tokens}. The "
                "texts are examples, not measurements."))


def _answer(prompt: str, name: str, continued: str) -> str:
    return f"<dt>{text(name)}</dt><dd><b>{text(prompt)}</b>{text(' '.join(continued.splitlines()))}</dd>"


def _run(summary: pd.DataFrame, benchmarks: pd.DataFrame | None) -> str:
    """One or two sentences on what was pruned and how long it took."""
    pruned = summary[summary["method"] != DENSE]
    models = list(dict.fromkeys(summary["model"]))
    if pruned.empty:
        return f"{listing(models)}: only the dense model was evaluated; nothing is pruned yet."
    methods, ratios = list(dict.fromkeys(pruned["method"])), sorted(set(pruned["ratio"]))
    took = f" All jobs together took {duration(_seconds(benchmarks).sum())}." \
        if benchmarks is not None and len(benchmarks) else ""
    word = "targets" if len(ratios) > 1 else "a target"
    targets = listing([f"{100 * ratio:g}" for ratio in ratios])
    return (f"This run pruned {listing(models)} by {listing(methods)} at {word} of {targets} % of the parameters, "
            f"which gave {counted(len(pruned), 'pruned model')}.{took}")


def _glance(said: Sequence[Finding], models: Sequence[str], comparisons: pd.DataFrame | None,
            leads: Sequence[str]) -> str:
    """The leads, one card for each model and target ratio, and the meanings of the words on the cards."""
    made = "".join(f'<p class="lead">{text(lead)}</p>' for lead in leads if lead)
    for model in models:
        own = [finding for finding in said if finding.model == model]
        dense = "".join(f'<p class="lead">{text(claim.text)}</p>' for finding in own if not finding.target
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


def _refused(refused: Mapping[str, str] | None) -> str:
    """The table of the grid points that could not be made, with the reasons."""
    if not refused:
        return ""
    said = f"{counted(len(refused), 'grid point')} could not be made. This page shows all other grid points."
    return page.note(said) + page.plain(["Point", "Reason"], [list(one) for one in refused.items()], label="Left out")


# How it was made ------------------------------------------------------------------------------------------------------

def _tasks(scores: pd.DataFrame) -> str:
    """The table of the scored tasks, with their numbers of items."""
    measured = scores[scores["task"] != "efficiency"]
    sizes = measured.groupby(["task", "metric", "unit"], sort=True)["items"].agg(["min", "max"]).reset_index()
    rows = [[row["task"], row["metric"], row["unit"],
             f"{row['min']:,}" if row["min"] == row["max"] else f"{row['min']:,} to {row['max']:,}"]
            for _, row in sizes.iterrows()]
    words = {"Metric": "lm-eval's name of the metric. acc_norm is the accuracy if answers are weighted by length.",
             "Unit": "Other tables print a share in %. ppl is perplexity. bits/byte does not depend on the tokenizer.",
             "Items": "Number of questions on which each model was scored; for perplexity, of documents or windows."}
    return page.plain(["Task", "Metric", "Unit", "Items"], rows, label="Tasks") + page.meanings(words) if rows else ""


def _times(benchmarks: pd.DataFrame) -> str:
    """One row for each workflow rule: number of jobs, seconds of all jobs, longest job and peak memory. The rule with
    the longest total time is first."""
    seconds = _seconds(benchmarks)
    memory = benchmarks["max_rss"] if "max_rss" in benchmarks else math.nan
    # Snakemake writes `-` or `NA` for a job that is too short for a sample
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
    total = (f"{counted(len(clean), 'job')} took {duration(seconds.sum())} together; the longest took "
             f"{duration(seconds.max())}.")
    return page.note(total) + page.plain(head, rows, label="Run times")


def _seconds(benchmarks: pd.DataFrame) -> pd.Series:
    if not {"rule", "s"} <= set(benchmarks):
        raise ReportError(f"benchmarks have the columns {', '.join(map(str, benchmarks))}; give the columns rule and s")
    return pd.to_numeric(benchmarks["s"], errors="coerce")


def _pairs(word: str, values: Mapping[str, Any] | None) -> str:
    rows = [[str(name), str(value)] for name, value in sorted((values or {}).items())]
    return page.plain([word, "Value"], rows, label=f"{word}s")
