"""All rules of rules/figures.smk: one figure as PDF and PNG, its data beside it as CSV."""
from pathlib import Path

from gather import of_grid, points, table
from job import job

from kdp_core import figures, store, theory_figures


def blocks(paths: list[str]) -> dict:
    """Records of one step by block, such as `5-7`."""
    return {Path(path).parent.name: store.read(path) for path in paths}


def draw(kind: str, inputs, params) -> figures.Drawn:
    """The figure of one rule."""
    if kind == "similarity":
        return figures.similarity_maps(store.read(inputs[0]), colormap=params.colormap)
    if kind == "training":
        return figures.training_curves(blocks(inputs.kernels), blocks(inputs.inverses))
    if kind == "operators":
        return figures.operator_norms(blocks(inputs.kernels))
    if kind == "joint":
        return figures.joint_training({label: store.read(path)
                                       for label, path in zip(params.labels, inputs, strict=True)})
    if kind == "score_ratio":
        return figures.score_against_ratio(of_grid(table(inputs[0]), params.grid))
    if kind == "theory":
        return theory_figures.theory(store.read(inputs[0]))
    if kind == "layers":
        return figures.pruned_layers(points(params.grid, params.steps))
    return figures.error_by_layer({label: store.read(path) for label, path in zip(params.labels, inputs, strict=True)})


if __name__ == "__main__":
    with job(snakemake):
        drawn = draw(snakemake.params.kind, snakemake.input, snakemake.params)
        figures.save(drawn, Path(snakemake.output.png).with_suffix(""), dpi=snakemake.params.dpi)
