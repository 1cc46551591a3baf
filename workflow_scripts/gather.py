"""Reads the records of all grid points for tables, figures and the report."""
import itertools
from pathlib import Path

import pandas as pd
from planning import grid

from kdp_core.base import store
from kdp_core.results.columns import DENSE, Point


def folder(point: dict[str, str]) -> Path:
    """The folder of a grid point's results."""
    return Path(grid.folder(point))


def fitted(point: dict[str, str], fits: dict[str, list[str]]) -> list[tuple[dict, object]]:
    """The fitted records of a grid point, each with its keys. The records of a fine-tuned point are the records of the
    point from which the fine-tuning started.

    `fits` contains the names of the fits of each variant: its steps, or `compose`. A record of `compose` belongs to one
    point. A record of a step belongs to all points with the same block.
    """
    names, source = fits[point["method"]], grid.source_point(point)
    keys, own = ({key: source[key] for key in part} for part in (grid.KEYS[:3], grid.KEYS[3:]))
    return [(keys | {"step": name} | (own if name == "compose" else {}), store.read(path))
            for name, path in zip(itertools.cycle(names), grid.fitted_files(point, names), strict=False)]


def table(path: str) -> pd.DataFrame:
    """A CSV file of the results. Only an empty field is parsed as a missing value; a text such as `NA` stays a text."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def of_points(summary: pd.DataFrame, chosen: list[dict[str, str]]) -> pd.DataFrame:
    """The rows of the summary for all dense models and for the chosen points."""
    wanted = {(p["model"], p["calib"], p["method"], float(p["ratio"]), int(p["k_max"])) for p in chosen}
    kept = [row.method == DENSE or tuple(row)[1:6] in wanted for row in summary.itertuples()]
    return summary[kept].reset_index(drop=True)


def points(run: list[dict[str, str]], fits: dict[str, list[str]]) -> list[Point]:
    """The dense models and all grid points, in the order of the grid."""
    made = [Point(model, "", DENSE, 0.0, 0, None, None, store.read(f"results/{model}/scores.json"),
                  store.read(f"results/{model}/efficiency.json"), None)
            for model in dict.fromkeys(point["model"] for point in run)]
    for point in run:
        at = folder(point)
        seconds = [record.stats["seconds"] for _, record in fitted(point, fits)]
        seconds += [store.read(at / "finetuned.json").seconds] if "source" in point else []
        search = store.read(file) if (file := grid.search_file(point)) else None
        made.append(Point(point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"]),
                          store.read(at / "pruned.json"), store.read(at / "plan.json"), store.read(at / "scores.json"),
                          store.read(at / "efficiency.json"),
                          sum(seconds) if seconds else None, "source" in point,
                          search.stats["seconds"] if search else None))
    return made
