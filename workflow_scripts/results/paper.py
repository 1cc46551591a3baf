"""Rule `paper` writes each table of the KDP paper for which the run has numbers, and a list of all twelve tables."""
from gather import table
from job import job

from kdp_core.base import store
from kdp_core.results import paper
from kdp_core.results.ablations import Ablation


def write_paper(inputs, params, out) -> None:
    """Write the tables that the run can fill, and the list of all tables."""
    made = paper.build(paper.Run(
        table(inputs.summary), table(inputs.scores), {model: store.read(path).family for model, path in
                                                      zip(params.models, inputs.facts, strict=True)},
        params.calibrations, {number: Ablation(**own) for number, own in params.ablations.items()}))
    comparisons = table(inputs.comparisons)
    with store.atomic(out.folder) as folder:
        for number, one in made.items():
            for form in ("csv", "md", "tex"):
                store.write_text(folder / f"table{number}.{form}", paper.render(one, form, comparisons))
        folder.mkdir(exist_ok=True)
    links = {number: f"measured/table{number}.md" for number in made} | {10: "table10.md", 12: "table12.md"}
    store.write_text(out.index, paper.index(made, links))


if __name__ == "__main__":
    with job(snakemake):
        write_paper(snakemake.input, snakemake.params, snakemake.output)
