"""Rule `ablation` writes one ablation as a table in three file formats."""
from pathlib import Path

from gather import table
from job import job

from kdp_core.base import store
from kdp_core.results import ablations


def write_ablation(inputs, ablation: dict, out: list[str]) -> None:
    """Collect the results of the ablation's points and write them as a table in every format."""
    gathered = ablations.gather(table(inputs.summary), table(inputs.scores), ablations.Ablation(**ablation))
    for path in out:
        store.write_text(path, ablations.render(gathered, Path(path).suffix[1:], table(inputs.comparisons)))


if __name__ == "__main__":
    with job(snakemake):
        write_ablation(snakemake.input, snakemake.params.ablation, snakemake.output)
