"""Reads the records of all grid points for tables, figures and the report."""
from pathlib import Path

import pandas as pd

from kdp_core.base import store
from kdp_core.results.columns import DENSE, Point


def folder(point: dict[str, str]) -> Path:
    """Where a grid point's results lie."""
    return Path("results", point["model"], point["calib"], point["method"], f"r{point['ratio']}-k{point['k_max']}")


def fitted(point: dict[str, str], steps: dict[str, list[str]]) -> list[tuple[dict, object]]:
    """A grid point's fitted records, each with the keys that name it; a fine-tuned one shares those of its source."""
    names = steps[point["method"]]
    point = point | {"method": point.get("source", point["method"])}
    keys = {key: point[key] for key in ("model", "calib", "method")}
    if names == ["compose"]:
        # fitted for this one point, where a step's records serve every point with the block
        return [({**keys, "step": "compose", "ratio": point["ratio"], "k_max": point["k_max"]},
                 store.read(folder(point) / "composed.safetensors"))]
    blocks = store.read(folder(point) / "plan.json").blocks
    return [({**keys, "step": step},
             store.read(folder(point).parent / "blocks" / f"{start}-{stop}" / f"{step}.safetensors"))
            for start, stop in blocks for step in names]


def table(path: str) -> pd.DataFrame:
    """A CSV file of the results, where an empty field alone is no value."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def of_grid(summary: pd.DataFrame, grid: list[dict[str, str]]) -> pd.DataFrame:
    """The summary's rows of the dense models and of these points."""
    wanted = {(p["model"], p["calib"], p["method"], float(p["ratio"]), int(p["k_max"])) for p in grid}
    kept = [row.method == DENSE or tuple(row)[1:6] in wanted for row in summary.itertuples()]
    return summary[kept].reset_index(drop=True)


def points(grid: list[dict[str, str]], steps: dict[str, list[str]]) -> list[Point]:
    """The dense models and all grid points, in the order of the grid."""
    made = [Point(model, "", DENSE, 0.0, 0, None, None, store.read(f"results/{model}/scores.json"),
                  store.read(f"results/{model}/efficiency.json"), None)
            for model in dict.fromkeys(point["model"] for point in grid)]
    for point in grid:
        at = folder(point)
        seconds = [record.stats["seconds"] for _, record in fitted(point, steps)]
        seconds += [store.read(at / "finetuned.json").seconds] if "source" in point else []
        search = store.read(at.parents[1] / point["search"] / f"search-k{point['k_max']}.json") \
            if "search" in point else None
        made.append(Point(point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"]),
                          store.read(at / "pruned.json"), store.read(at / "plan.json"), store.read(at / "scores.json"),
                          store.read(at / "efficiency.json"),
                          sum(seconds) if seconds else None, "source" in point,
                          search.stats["seconds"] if search else None))
    return made
