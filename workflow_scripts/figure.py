"""All rules of rules/figures.smk: one figure as PDF and PNG, its data beside it as CSV."""
from pathlib import Path

from gather import of_points, points, table
from job import job

from kdp_core.base import store
from kdp_core.figures import locality as locality_figures
from kdp_core.figures import scores as score_figures
from kdp_core.figures import spaces as spaces_figures
from kdp_core.figures import style
from kdp_core.figures import theory as theory_figures


def blocks(paths: list[str]) -> dict:
    """Records of one step by block, such as `5-7`."""
    return {Path(path).parent.name: store.read(path) for path in paths}


def labelled(paths: list[str], labels: list) -> dict:
    """Records by their labels: texts, or (row, K max)."""
    return {label if isinstance(label, str) else tuple(label): store.read(path)
            for label, path in zip(labels, paths, strict=True)}


def draw(kind: str, inputs, params) -> style.Drawn:
    """The figure of one rule."""
    if kind == "similarity":
        return style.similarity_maps(store.read(inputs[0]), colormap=params.colormap)
    if kind == "models":
        return locality_figures.side_by_side(labelled(inputs, params.labels), colormap=params.colormap)
    if kind == "locality":
        return locality_figures.by_distance(labelled(inputs, params.labels))
    if kind == "training":
        return style.training_curves(blocks(inputs.kernels), blocks(inputs.inverses))
    if kind == "operators":
        return style.operator_norms(blocks(inputs.kernels))
    if kind == "joint":
        return style.joint_training(labelled(inputs, params.labels))
    if kind == "score_ratio":
        return score_figures.score_against_ratio(of_points(table(inputs.summary), params.grid), rows=params.rows)
    if kind == "tasks":
        return score_figures.tasks_against_ratio(table(inputs.scores), of_points(table(inputs.summary), params.grid),
                                                 tasks=params.tasks, rows=params.rows)
    if kind == "theory":
        return theory_figures.theory(store.read(inputs[0]))
    if kind == "layers":
        return score_figures.pruned_layers(points(params.grid, params.steps), rows=params.rows)
    if kind in ("by_layer", "split_by_layer", "estimates"):
        return getattr(spaces_figures, kind)(store.read(inputs[0]))
    if kind in ("by_step", "choices"):
        return getattr(spaces_figures, kind)(labelled(inputs, params.labels), rows=params.rows)
    return score_figures.error_by_layer(labelled(inputs, params.labels), rows=params.rows)


if __name__ == "__main__":
    with job(snakemake):
        drawn = draw(snakemake.params.kind, snakemake.input, snakemake.params)
        style.save(drawn, Path(snakemake.output.png).with_suffix(""), dpi=snakemake.params.dpi)
