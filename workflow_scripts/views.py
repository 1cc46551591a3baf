"""Rules `views_heatmaps` and `views_trajectories`: the kernel space of trained blocks, and paths of the states."""
from pathlib import Path

import pandas as pd
from job import job

from kdp_core.base import store
from kdp_core.figures import style
from kdp_core.figures import views as views_figures
from kdp_core.states import hidden
from kdp_core.study import views


def heat_maps(hidden_path: str, kernels: list[str], fitted: dict, options: dict, colormap: str) -> style.Drawn:
    """Features of a held-out sequence after every block, held out as the row's step 1 did."""
    states = hidden.read(hidden_path)
    split = {name: fitted[name] for name in ("heldout", "seed") if name in fitted}
    looks = {Path(path).parent.name: views.kernel_view(states, store.read(path), **split, **options)
             for path in kernels}
    return views_figures.heat_maps(looks, colormap=colormap)


def trajectories(hidden_path: str, options: dict, colormap: str, out: str) -> style.Drawn:
    """Paths of the states, and how straight they are as a table of its own."""
    found = views.paths(hidden.read(hidden_path), **options)
    straight = views.straightness_table(found)
    store.write_text(out, pd.DataFrame(straight).to_csv(index=False, lineterminator="\n"))
    return views_figures.trajectories(found, straight, views.own_neighbour(found), colormap=colormap)


if __name__ == "__main__":
    with job(snakemake):
        inputs, params, output = snakemake.input, snakemake.params, snakemake.output
        drawn = (heat_maps(inputs.hidden, inputs.kernels, params.fitted, params.options, params.colormap)
                 if params.kind == "heatmaps" else
                 trajectories(inputs.hidden, params.options, params.colormap, output.straightness))
        style.save(drawn, Path(output.png).with_suffix(""), dpi=params.dpi)
