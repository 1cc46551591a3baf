"""The rules of rules/figures.smk draw one figure as PDF and PNG, and write its data as CSV."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gather import of_points, points, table
from job import job

from kdp_core.base import store
from kdp_core.figures import figure_of
from kdp_core.figures.style import Drawn, save


def by_block(path: Path) -> str:
    """The block of a record, such as `5-7`. The folder that contains `path` has the name of the block."""
    return path.parent.name


def by_point(path: Path) -> tuple[str, int]:
    """The variant and K max of a record. `path` is in the folder of the record's grid point."""
    return path.parts[-3], int(path.parts[-2].split("-k")[1])


def by_ratio(path: Path) -> str:
    """The ratio and K max of a record, as a text. `path` is in the folder of the record's grid point."""
    ratio, k_max = path.parts[-2].removeprefix("r").split("-k")
    return f"ratio {ratio}, K max {k_max}"


def by_model(paths: list[str]) -> Callable[[Path], str]:
    """A function that returns the name of the model of a record, from the path of the record.

    If `paths` belong to several calibration sets, the name also contains the calibration set.
    """
    several = len({Path(path).parts[-2] for path in paths}) > 1
    return lambda path: f"{path.parts[-3]}, {path.parts[-2]}" if several else path.parts[-3]


KEYS = {"kernels": by_block, "inverses": by_block, "kernel_views": by_block, "composed": by_ratio,
        "diagnoses": by_point, "spaces": by_point, "expectations": by_point, "survivals": by_point}
"""Name of a kind of records -> the function that computes the key of a record from its path. A figure reads several
records of such a kind, and each record has another key."""


def read(name: str, found: Any, params: Any) -> Any:
    """The data of one input of a figure.

    `name` names an input in kdp_core.figures, such as `summary`. The name decides whether the function returns a table,
    one record, or a dict of records.
    """
    if name == "points":
        return points(params.points, params.fits)
    if name in ("summary", "scores"):
        return of_points(table(found), params.points) if name == "summary" else table(found)
    if name not in (*KEYS, "similarities"):
        return store.read(found)
    key = KEYS.get(name) or by_model(found)
    return {key(Path(path)): store.read(path) for path in found}


def draw(figure: str, inputs: Any, params: Any) -> Drawn:
    """Draw the figure of this name from the input files of the rule."""
    entry = figure_of(figure)
    return entry.draw(*(read(name, inputs.get(name), params) for name in entry.reads), **params.settings)


if __name__ == "__main__":
    with job(snakemake):
        drawn = draw(snakemake.wildcards.figure, snakemake.input, snakemake.params)
        save(drawn, Path(snakemake.output.png).with_suffix(""), dpi=snakemake.params.dpi)
