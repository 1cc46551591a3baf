"""Points and columns of the tables of results: what each column contains, and how values and headings are printed."""
import math
from typing import Any, NamedTuple

from kdp_core.base.measurements import Efficiency, Scores
from kdp_core.base.records import Block, PrunedFacts, Selection

DENSE = "dense"
"""The name that takes the place of a method for the model that is not pruned."""
BASELINE = "remove"
"""The variant that removes the selected layers and replaces them by nothing.

This variant is the baseline with which all other variants are compared.
"""
KEYS = ("model", "calib", "method", "ratio", "k_max")
"""The columns that identify a point."""


class TableError(ValueError):
    """The points cannot be shown in one table."""


class Point(NamedTuple):
    """One evaluated model: a point of the grid, or the dense model itself."""
    model: str
    calib: str
    """Name of the calibration set; empty for the dense model."""
    method: str
    """Name of a variant of the configuration, or `dense`."""
    ratio: float
    """Share of all parameters that should be removed; 0 for the dense model."""
    k_max: int
    """Number of layers in the context of a block; 0 for the dense model."""
    facts: PrunedFacts | None
    """None for the dense model."""
    selection: Selection | None
    scores: Scores
    efficiency: Efficiency | None
    fit_seconds: float | None
    """Time in seconds for fitting the stand-ins and for fine-tuning; None if nothing is fitted."""
    finetuned: bool = False
    """Whether the model was fine-tuned after pruning. A table prints the row of such a model with a dagger."""
    search_seconds: float | None = None
    """Time in seconds of the search, which runs once for all ratios.

    None if the blocks are selected by the similarity of layers.
    """


class Column(NamedTuple):
    """The heading, number format and meaning of a column of a table."""
    header: str
    unit: str
    what: str
    """One plain sentence."""
    digits: int = 2
    scale: float = 1.0
    """Factor from the stored value to the printed value."""
    better: int = 0
    """1 if higher is better, -1 if lower is better, 0 otherwise. If the value is 0, the best number of the column is
    not marked."""
    stderr: str = ""
    """Name of the column with the standard error; empty if there is none."""
    test: tuple[str, str] = ("", "")
    """Metric and task of the paired tests that compare models by this column; empty if there are no such tests."""


COLUMNS: dict[str, Column] = {
    "params_removed": Column("Removed", "%", "Share of all parameters removed; the parameters of stand-ins count as "
                             "put back.", 1, 100),
    "layers_removed": Column("Layers removed", "", "How many decoder layers fewer the model has than the dense one.",
                             0),
    "acc": Column("Accuracy", "%", "Plain mean of the accuracy tasks.", 1, 100, 1, "acc_stderr",
                  ("acc", "all")),
    "rp": Column("Retained", "%", "Mean accuracy as a percentage of the dense model's.", 1, 1, 1, "rp_stderr",
                 ("acc", "all")),
    "ppl": Column("Perplexity", "", "Perplexity per token on held-out text; lower is better.", 2, 1, -1, "ppl_stderr",
                  ("ppl", "all")),
    "ppl_ratio": Column("Perplexity / dense", "", "Perplexity divided by the dense model's.", 2, 1, -1,
                        "ppl_ratio_stderr", ("ppl", "all")),
    "rp_ppl": Column("Retained (ppl)", "%", "Mean over texts of the dense perplexity divided by the pruned one.", 1, 1,
                     1, "rp_ppl_stderr"),
    "speedup_prefill": Column("Speed-up, prefill", "x", "Median of the dense time divided by the pruned time, measured "
                              "in pairs, for a whole prompt.", 2, 1, 1),
    "speedup_decode": Column("Speed-up, decode", "x", "Median of the dense time divided by the pruned time, measured "
                             "in pairs, for one token after a cached prompt.", 2, 1, 1),
    "params_millions": Column("Parameters", "M", "All parameters; tied ones are counted once.", 1),
    "macs_giga": Column("Multiply-adds", "G", "Multiply-adds of the linear layers for one pass over the timed prompt.",
                        2),
    "blocks": Column("Blocks", "", "Replaced layers, from the first to one past the last."),
    "search_seconds": Column("Search", "s", "Time spent on the search, once for all ratios.", 0),
    "fit_seconds": Column("Fit", "s", "Time spent on fitting the stand-ins.", 0),
}
"""The columns of the summary that tables print."""
RELATIVE = ("rp", "ppl_ratio", "rp_ppl")
"""Columns that are printed without standard errors, because their errors follow from those of acc and ppl."""
MAIN = ("params_removed", "layers_removed", "acc", "rp", "ppl", "ppl_ratio", "speedup_prefill", "speedup_decode",
        "params_millions")
"""The columns of the short summary that is printed."""
SUMMARY = (*KEYS, "params_removed", "layers_removed", "ppl", "ppl_stderr", "ppl_ratio", "ppl_ratio_stderr", "acc",
           "acc_stderr", "rp", "rp_stderr", "rp_ppl", "rp_ppl_stderr", "speedup_prefill", "speedup_decode",
           "params_millions", "macs_giga", "blocks", "search_seconds", "fit_seconds", "finetuned",
           "params_zeroed")
"""All columns of the summary, in order."""


def span(block: Block) -> str:
    """The text `5-7` for the half-open block (5, 7), which contains layers 5 and 6."""
    return f"{block[0]}-{block[1]}"


def number(column: Column, value: Any) -> str:
    """A value in its printed form, without the unit. A missing value is printed as an en dash."""
    if isinstance(value, str):
        return value or "–"
    if value is None or math.isnan(value):
        return "–"
    scaled = value * column.scale
    if abs(scaled) < 1e5:
        return f"{scaled:.{column.digits}f}"
    return f"{scaled:.1e}".replace("e+0", "e").replace("e+", "e")


def heading(column: Column) -> str:
    """The heading of a column with its unit, such as `Accuracy (%)`."""
    return f"{column.header} ({column.unit})" if column.unit else column.header
