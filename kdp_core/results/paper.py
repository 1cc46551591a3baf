"""Tables 1 to 9 and 11 of the KDP paper (Ma et al., ICLR 2026), made from the numbers of a run.

    1, 6    accuracy by task, mean and retained performance; Table 6 is for OPT models
    2, 7    perplexity by text, ROUGE by task, retained performance of both; Table 7 is for OPT models
    3, 4    linear maps in the original space; maximum length K_max
    5       the layers that were removed from each pruned model
    8       the data that each variant was trained on
    9, 11   barely trained steps; calibration sets
A table whose numbers the run does not have is left out. Tables 3, 4, 9 and 11 are ablations of the configuration; each
of these ablations names the number of its table. Tables 10 and 12 need no run; the module `costs` makes them. The paper
prints scores without errors; here every score has its standard error. Table 2 has one row for each pair of model and
method; the paper has one column for each model. RP(Rouge) is a ratio of two means over tasks, like RP in Table 1.
`summary.retained_ppl` defines RP(PPL). The paper's Table 8 lists no samples for ShortGPT and SLEB. ShortGPT and SLEB
select layers on calibration text, so kdp lists this text as their samples.
"""
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import pandas as pd

from kdp_core.results import ablations, tables
from kdp_core.results.ablations import Ablation
from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column
from kdp_core.results.marks import NOTE
from kdp_core.results.summary import retained
from kdp_core.score.metrics import PRIMARY

ORDER = ("cmnli", "hellaswag", "piqa", "chid", "wsc", "coqa", "boolq", "mmlu", "cmmlu", "race", "sst2", "c3",
         "wikitext", "c4", "xsum")
"""The paper's order of tasks; all other tasks follow in alphabetical order."""
ROUGE = re.compile(r"^rouge[-_]?1")
"""Names of the ROUGE-1 metrics, which score the summaries in Table 2."""
OWN = {
    "layers": Column("Pruned layers", "", "Runs of removed layers; the last layer of each is included."),
    "sequences": Column("Sequences", "", "Sequences of the calibration set.", 0),
    "tokens": Column("Tokens", "", "Tokens of the calibration set.", 0),
    "trained": Column("Training", "", "Whether anything is fitted."),
    "tuned": Column("Fine-tuning", "", "Whether the pruned model is fine-tuned as a whole."),
    "rp_rouge": Column("Retained (ROUGE)", "%", "Mean ROUGE-1 as a percentage of the dense model's.", 1, 1, 1,
                       "rp_rouge_stderr"),
}
"""Columns that only these tables have, and not the summary."""
NEEDS = {
    1: "a model that is not OPT and accuracy tasks under evaluate.tasks",
    2: "a model that is not OPT and perplexity or ROUGE tasks under evaluate.tasks",
    3: "an ablation with `paper: 3`; configs/ablations.yaml has one",
    4: "an ablation with `paper: 4`; configs/ablations.yaml has one",
    5: "a variant that removes whole layers",
    6: "an OPT model under models and grid.models, and accuracy tasks under evaluate.tasks",
    7: "an OPT model under models and grid.models, and perplexity or ROUGE tasks under evaluate.tasks",
    8: "a variant that prunes a model",
    9: "an ablation with `paper: 9`; configs/ablations.yaml has one",
    11: "an ablation with `paper: 11`; configs/ablations.yaml has one",
}
"""The parts of the configuration that each table needs."""


class Table(NamedTuple):
    """One table in the form that tables.render prints."""
    number: int
    caption: str
    frame: pd.DataFrame
    columns: list[str]
    known: dict[str, Column]


class Run(NamedTuple):
    """The data from which the tables are made."""
    summary: pd.DataFrame
    """The data frame of summary.summarise, read from its CSV file."""
    scores: pd.DataFrame
    """The data frame of summary.tidy, read from its CSV file."""
    families: Mapping[str, str]
    """Architecture family of each model, such as `opt`."""
    calibrations: Mapping[str, tuple[int, int]]
    """Sequences and tokens of each calibration set."""
    ablations: Mapping[int, Ablation]
    """The ablations that reproduce a table of the paper; the keys are the numbers of the tables."""


def build(run: Run) -> dict[int, Table]:
    """The tables that can be made from the run; the keys are their numbers. The table NEEDS says what all other tables
    need."""
    made = {number: make(run, number) for number, make in TABLES.items()}
    return {number: table for number, table in made.items() if table is not None}


# Scores by task: Tables 1, 2, 6, 7 ------------------------------------------------------------------------------------

def _accuracy(run: Run, number: int) -> Table | None:
    frame = _rows(run, opt=number == 6)
    columns = {}
    for task in _tasks(run.scores, frame, "acc"):
        frame, columns[task] = _with(frame, run.scores, task, _main(run.scores, task, "acc"))
    if not columns:
        return None
    caption = f"Accuracy by task, mean and retained performance{' of OPT models' * (number == 6)}."
    return Table(number, caption, frame, ["params_removed", *columns, "acc", "rp"], COLUMNS | columns)


def _generation(run: Run, number: int) -> Table | None:
    frame = _rows(run, opt=number == 7)
    texts, rouge = {}, {}
    for task in _tasks(run.scores, frame, "ppl"):
        frame, texts[task] = _with(frame, run.scores, task, _main(run.scores, task, "ppl"))
    for task, metric in _rouge(run.scores, frame):
        frame, rouge[task] = _with(frame, run.scores, task, metric)
    if not texts and not rouge:
        return None
    if rouge:
        frame = _with_rp_rouge(frame, list(rouge))
    last = ["rp_ppl"] * bool(texts) + ["rp_rouge"] * bool(rouge)
    # for a single text, RP(PPL) orders rows as the perplexity does
    own = {"rp_ppl": COLUMNS["rp_ppl"]._replace(test=("ppl", "all"))} if len(texts) == 1 else {}
    caption = f"Perplexity and ROUGE-1, and retained performance of both{' of OPT models' * (number == 7)}."
    return Table(number, caption, frame, ["params_removed", *texts, *rouge, *last], COLUMNS | OWN | own | texts | rouge)


def _rows(run: Run, *, opt: bool) -> pd.DataFrame:
    """The summary's rows of the OPT models, or of all models that are not OPT."""
    chosen = [(run.families.get(model) == "opt") == opt for model in run.summary["model"]]
    return run.summary[chosen].reset_index(drop=True)


def _scored(scores: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """The scores of the dense models that occur in `frame`. The pruned models have scores on the same tasks."""
    return scores[(scores["method"] == DENSE) & scores["model"].isin(frame["model"]) & (scores["task"] != "efficiency")]


def _tasks(scores: pd.DataFrame, frame: pd.DataFrame, kind: str) -> list[str]:
    """The tasks that have a primary metric of the given kind, in the paper's order. If a group has a metric of this
    kind, the members of the group are left out."""
    has = _scored(scores, frame)
    names = set(has[has["metric"].isin(PRIMARY[kind])]["task"])
    return sorted((name for name in names if not any(name.startswith(f"{other}/") for other in names)), key=_place)


def _main(scores: pd.DataFrame, task: str, kind: str) -> str:
    has = set(scores[scores["task"] == task]["metric"])
    return next(metric for metric in PRIMARY[kind] if metric in has)


def _rouge(scores: pd.DataFrame, frame: pd.DataFrame) -> list[tuple[str, str]]:
    """(task, metric) for each task with ROUGE-1; the metric is the first ROUGE-1 of the task."""
    has = _scored(scores, frame)
    found = {row.task: row.metric for row in has[::-1].itertuples() if ROUGE.match(row.metric)}
    return sorted(found.items(), key=lambda item: _place(item[0]))


def _place(task: str) -> tuple[int, str]:
    """The position of a task in the paper's order. If the task contains several names of ORDER, the longest name
    counts."""
    names = [name for name in ORDER if name in task.lower()]
    return (ORDER.index(max(names, key=len)) if names else len(ORDER), task)


def _with(frame: pd.DataFrame, scores: pd.DataFrame, task: str, metric: str) -> tuple[pd.DataFrame, Column]:
    """The frame with a further column that contains the task's score. The new column has the task's name. The
    description of this column is also returned."""
    full = f"{task}:{metric}"
    frame, column = ablations.with_task(frame, scores, full)
    frame = frame.rename(columns={full: task, f"{full}_stderr": f"{task}_stderr"})
    return frame, column._replace(header=task, stderr=f"{task}_stderr")


def _with_rp_rouge(frame: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """The frame with a further column: retained ROUGE in percent.

    The standard error assumes independent tasks and a fixed dense model.
    """
    mean = frame[list(tasks)].mean(axis=1, skipna=False)
    error = frame[[f"{task}_stderr" for task in tasks]].pow(2).sum(axis=1, skipna=False).pow(0.5) / len(tasks)
    own = frame["method"] == DENSE
    dense = frame["model"].map(dict(zip(frame["model"][own], mean[own], strict=True)))
    # RP = 100 * mean_t rouge_t / mean_t rouge_t^dense
    return frame.assign(rp_rouge=[retained(*pair) for pair in zip(mean, dense, strict=True)],
                        rp_rouge_stderr=[retained(*pair) for pair in zip(error, dense, strict=True)])


# Removed layers and data: Tables 5, 8 ---------------------------------------------------------------------------------

def _pruned_layers(run: Run, number: int) -> Table | None:
    frame = run.summary[run.summary["blocks"].notna() & (run.summary["blocks"] != "")].reset_index(drop=True)
    if frame.empty:
        return None
    frame = frame.assign(layers=[_layers(blocks) for blocks in frame["blocks"]])
    return Table(number, "Pruned layers, the last of each run included.", frame, ["params_removed", "layers"],
                 COLUMNS | OWN)


def _layers(blocks: str) -> str:
    """Changes half-open blocks such as `6-8 10-11` to the text `[6,7], [10]`."""
    runs = [tuple(map(int, block.split("-"))) for block in blocks.split()]
    return ", ".join(f"[{start}]" if stop == start + 1 else f"[{start},{stop - 1}]" for start, stop in runs)


def _data_used(run: Run, number: int) -> Table | None:
    frame = run.summary[run.summary["method"] != DENSE].reset_index(drop=True)
    if frame.empty:
        return None
    sizes = [run.calibrations.get(calib, (math.nan, math.nan)) for calib in frame["calib"]]
    frame = frame.assign(
        sequences=[size[0] for size in sizes], tokens=[size[1] for size in sizes],
        trained=["no" if math.isnan(seconds) else "yes" for seconds in frame["fit_seconds"]],
        tuned=["yes" if tuned else "no" for tuned in frame["finetuned"]])
    return Table(number, "Calibration data, and what is trained on it.", frame,
                 ["trained", "tuned", "sequences", "tokens", "fit_seconds"], COLUMNS | OWN)


# Ablations: Tables 3, 4, 9, 11 ----------------------------------------------------------------------------------------

def _ablation(run: Run, number: int) -> Table | None:
    if number not in run.ablations:
        return None
    gathered = ablations.gather(run.summary, run.scores, run.ablations[number])
    return Table(number, f"{gathered.ablation.title}.", gathered.frame, ablations.shown(gathered), gathered.columns)


TABLES: dict[int, Callable[[Run, int], Table | None]] = {
    1: _accuracy, 2: _generation, 3: _ablation, 4: _ablation, 5: _pruned_layers, 6: _accuracy, 7: _generation,
    8: _data_used, 9: _ablation, 11: _ablation,
}


# For print ------------------------------------------------------------------------------------------------------------

def render(table: Table, format: Literal["csv", "md", "tex"], comparisons: pd.DataFrame | None = None) -> str:
    """One table as text. The CSV file has the columns of the table in full precision, with their standard errors."""
    if format == "csv":
        errors = {name: table.known[name].stderr for name in table.columns}
        kept = [column for name in table.columns for column in (name, errors[name]) if column]
        return table.frame[list(dict.fromkeys([*KEYS, *kept]))].to_csv(index=False, lineterminator="\n")
    marked = any(table.known[name].better for name in table.columns)
    return tables.render(table.frame, format, columns=table.columns, known=table.known, comparisons=comparisons,
                         caption=table.caption, label=f"tab:paper-{table.number}", note=NOTE if marked else "",
                         wide=len(table.columns) > 5)


def index(made: Mapping[int, Table], links: Mapping[int, str]) -> str:
    """A list of all twelve tables in Markdown: a link to each table that was made, and what the other tables need.

    `links` has the link of each table, also for Tables 10 and 12.
    """
    captions = {10: "FLOPs and speed-up of the paper's models, from their configurations.",
                12: "Folded blocks beside layers of the paper's models, from their configurations.",
                **{number: table.caption for number, table in made.items()}}
    lines = ["# Tables of the KDP paper", ""]
    for number in range(1, 13):
        lines.append(f"- [Table {number}]({links[number]}): {captions[number]}" if number in captions else
                     f"- Table {number}: left out; it needs {NEEDS[number]}.")
    return "\n".join([*lines, ""])
