"""Rule `comparisons` compares all pairs of models within each group of models, on the same items."""
from pathlib import Path

from gather import folder
from job import job

from kdp_core.base import store
from kdp_core.results import compare
from kdp_core.results.columns import DENSE
from kdp_core.results.compare import Entry, Outcomes


def entries(grid: list[dict[str, str]]) -> list[Entry]:
    """The dense models and all grid points with their outcomes on every item, in the order of the grid."""
    made = [Entry((model, "", DENSE, 0.0, 0), False, outcomes(Path("results", model)))
            for model in dict.fromkeys(point["model"] for point in grid)]
    return made + [Entry((point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"])),
                         store.read(folder(point) / "pruned.json").params_zeroed > 0, outcomes(folder(point)))
                   for point in grid]


def outcomes(at: Path) -> list[Outcomes]:
    """The outcomes of one model on every item."""
    return compare.read_outcomes(at / "samples", store.read(at / "scores.json"))


if __name__ == "__main__":
    with job(snakemake):
        frame = compare.compare(entries(snakemake.params.grid))
        store.write_text(snakemake.output[0], frame.to_csv(index=False, lineterminator="\n"))
