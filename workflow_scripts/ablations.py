"""Rule `ablation`: one ablation as a table and a figure."""
from pathlib import Path

from gather import table
from job import job

from kdp_core.base import store
from kdp_core.figures import ablations as ablation_figures
from kdp_core.figures import style
from kdp_core.results import ablations


def write_ablation(inputs, ablation: dict, tables: list[str], figure: Path, rows: dict, dpi: int) -> None:
    """Gather the ablation's points, print and draw them."""
    gathered = ablations.gather(table(inputs.summary), table(inputs.scores), ablations.Ablation(**ablation))
    for path in tables:
        store.write_text(path, ablations.render(gathered, Path(path).suffix[1:], table(inputs.comparisons)))
    style.save(ablation_figures.against(gathered, rows=rows), figure, dpi=dpi)


if __name__ == "__main__":
    with job(snakemake):
        write_ablation(snakemake.input, snakemake.params.ablation, snakemake.output.table,
                       Path(snakemake.output.png).with_suffix(""), snakemake.params.rows, snakemake.params.dpi)
