"""The record of a figure, and functions that read only this record.

A figure is one entry of the tuple `FIGURES` at the end of a file of this folder. The function `draw` of an entry
receives stored records and returns the drawing with the numbers in it. The positional arguments of `draw` name the
records that the workflow reads for the figure. Keyword-only arguments whose names are in SETTINGS receive values that
the workflow derives from the configuration.
"""
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from kdp_core.figures.style import Drawn, FigureError


class Scope(NamedTuple):
    """The path, the title and the caption of a figure, with the wildcards of the workflow."""
    path: str
    """Path below results/figures, without the suffix. `figure` is the name of the entry."""
    title: str
    """Title in the report. `title` is the title of the entry."""
    caption: str = "{caption}"
    """Caption in the report. `caption` is the caption of the entry."""


SCOPES = {
    "all": Scope("{figure}", "{title}"),
    "ablation": Scope("{figure}-{ablation}", "{title}: {ablation_title}", "{ablation_caption} {caption}"),
    "calibrated": Scope("{model}/{calib}/{figure}", "{title}: {model}, {calib}"),
    "ratio": Scope("{model}/{calib}/{figure}-r{ratio}", "{title} at ratio {ratio}: {model}, {calib}"),
    "variant": Scope("{model}/{calib}/{method}-{figure}", "{title}: {method}, {model}, {calib}"),
}
"""A scope determines how often a figure is drawn. With `all`, the figure is drawn once for the whole run. With
`ablation`, the figure is drawn once for each ablation, and with `calibrated` once for each model and calibration set.

With `ratio`, the figure is drawn once for each ratio of a model and calibration set, and with `variant` once for each
variant of a model and calibration set.
"""

READS = {
    "summary": "the rows of results/summary.csv for the dense models and the shown points",
    "scores": "results/scores.csv",
    "points": "plan, facts, scores and costs of every shown point",
    "similarity": "the similarity of layers of one model and calibration set",
    "similarities": "the similarities of layers of all models and calibration sets, by name",
    "kernels": "what step 1 of a variant of KDP fitted, by block",
    "inverses": "what step 2 of a variant of KDP fitted, by block",
    "composed": "the composed records of a variant, by ratio and K max",
    "diagnoses": "the diagnoses of the shown points of a ratio, by (variant, K max)",
    "theory": "the theorems measured on one model and calibration set",
    "kernel_views": "features after blocks of a variant of KDP, by block",
    "trajectories": "paths of states through the layers",
    "probes": "how the outputs of a model change if single layers are removed",
    "spaces": "the shown points of a ratio in three spaces, by (variant, K max)",
    "survivals": "multiple-choice items of the shown points of a ratio, by (variant, K max)",
    "agreement": "the searches for layers of a ratio, their pairs and the claims",
    "expectations": "what the shown points of a ratio are expected to lose in generation, by (variant, K max)",
}
"""Names that positional arguments of `draw` may have, and what the workflow passes for each name."""

SETTINGS = {
    "colormap": "figures.colormap of the configuration",
    "tasks": "figures.tasks of the configuration; None: all tasks",
    "looks": "variant -> what decides how it looks in every figure, see kdp_core.figures.style.Look",
    "ablation": "the ablation, as the fields of kdp_core.results.ablations.Ablation",
}
"""Names of keyword-only arguments of `draw` that the workflow fills in."""

NEEDS = {
    "": "the report always has the figure",
    "theory": "the configuration has a section `theory`",
    "views": "the configuration has a section `views`",
    "spaces": "the configuration has a section `spaces`",
    "generation": "the configuration has a section `generation`",
    "choices": "the configuration has a section `choices`",
    "agreement": "the configuration has a section `agreement`",
    "trained": "the variants of the grid that train both steps of KDP",
    "trained jointly": "the variants of the grid whose stand-ins are trained together",
    "viewed": "the variants that `views.variants` names",
}
"""For each value of `Entry.needs`: the condition under which the report contains the figure, or the variants for which
the report contains the figure."""


class Entry(NamedTuple):
    """A figure."""
    name: str
    """Name of the figure's files, without the parts that the scope adds."""
    title: str
    """Title of the figure in the report, without the parts that the scope adds."""
    caption: str
    """A description of the picture, with the paper and the number of the figure that the picture reproduces."""
    draw: Callable[..., Drawn]
    """(*records, *settings) -> Drawn."""
    scope: str
    """A key of SCOPES."""
    place: int
    """Position in the report: the figure with the lowest position comes first. Figures with equal positions keep the
    order of their file."""
    needs: str = ""
    """A key of NEEDS."""
    differs: str = ""
    """How the figure differs from the figure of the paper. docs/figures.md prints this text."""

    @property
    def reads(self) -> list[str]:
        """The names of the records that `draw` receives, in order."""
        return [name for name, kind in _arguments(self.draw) if kind is not inspect.Parameter.KEYWORD_ONLY]

    @property
    def settings(self) -> list[str]:
        """The names of the settings that `draw` receives."""
        return [name for name, kind in _arguments(self.draw) if kind is inspect.Parameter.KEYWORD_ONLY
                and name in SETTINGS]


def _arguments(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, one.kind) for name, one in inspect.signature(function).parameters.items()]


def check(entry: Entry) -> None:
    """Raise FigureError for an entry with a scope, a condition or records that the workflow does not have."""
    for what, values, known in (("scope", [entry.scope], SCOPES), ("condition", [entry.needs], NEEDS),
                                ("record", entry.reads, READS)):
        if unknown := [value for value in values if value not in known]:
            raise FigureError(f"figure {entry.name!r} has the unknown {what} {unknown[0]!r}; choose among "
                              f"{', '.join(filter(None, known))}")
