"""Reads the records of all grid points for tables, figures and the report."""
from pathlib import Path

from kdp_core import store
from kdp_core.tables import DENSE, Point


def folder(point: dict[str, str]) -> Path:
    """Where a grid point's results lie."""
    return Path("results", point["model"], point["calib"], point["method"], f"r{point['ratio']}-k{point['k_max']}")


def fitted(point: dict[str, str], steps: dict[str, list[str]]) -> list[tuple[dict, object]]:
    """A grid point's fitted records, each with the keys that name it."""
    blocks = store.read(folder(point) / "plan.json").blocks
    return [({"model": point["model"], "calib": point["calib"], "method": point["method"], "step": step},
             store.read(folder(point).parent / "blocks" / f"{start}-{stop}" / f"{step}.safetensors"))
            for start, stop in blocks for step in steps[point["method"]]]


def points(grid: list[dict[str, str]], steps: dict[str, list[str]]) -> list[Point]:
    """The dense models and all grid points, in the order of the grid."""
    made = [Point(model, "", DENSE, 0.0, 0, None, None, store.read(f"results/{model}/scores.json"),
                  store.read(f"results/{model}/efficiency.json"), None)
            for model in dict.fromkeys(point["model"] for point in grid)]
    for point in grid:
        at = folder(point)
        records = [record for _, record in fitted(point, steps)]
        made.append(Point(point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"]),
                          store.read(at / "pruned.json"), store.read(at / "plan.json"), store.read(at / "scores.json"),
                          store.read(at / "efficiency.json"),
                          sum(record.stats["seconds"] for record in records) if records else None))
    return made
