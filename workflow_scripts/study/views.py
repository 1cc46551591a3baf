"""Rule `kernel_view` writes the features of a trained block, and rule `trajectories` the paths of the states."""
import pandas as pd
from job import job

from kdp_core.base import store
from kdp_core.states import hidden
from kdp_core.study import views


def write_view(hidden_path: str, kernel: str, split: dict, options: dict, out: str) -> None:
    """Write the features of one sequence on which step 1 of the variant was not fitted."""
    store.write(out, views.kernel_view(hidden.read(hidden_path), store.read(kernel), **split, **options))


def write_trajectories(hidden_path: str, options: dict, out: str, straightness: str) -> None:
    """Write the paths of the states, and a table of the straightness of the paths."""
    found = views.trajectories(hidden.read(hidden_path), **options)
    store.write(out, found)
    store.write_text(straightness, pd.DataFrame(found.straightness).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    with job(snakemake):
        inputs, params, output = snakemake.input, snakemake.params, snakemake.output
        if snakemake.rule == "kernel_view":
            write_view(inputs.hidden, inputs.kernel, params.split, params.options, output[0])
        else:
            write_trajectories(inputs.hidden, params.options, output.record, output.straightness)
