"""Rule `compose`: the stand-ins of one grid point, fitted together."""
from job import job

from kdp_core import hidden, store
from kdp_core.methods import method_of


def compose(method: str, inputs, out: str, **options) -> None:
    """Fit all that stands in for the blocks of the plan."""
    store.write(out, method_of(method).compose(inputs.dense, hidden.read(inputs.hidden), store.read(inputs.tokens),
                                               store.read(inputs.plan), **options))


if __name__ == "__main__":
    with job(snakemake):
        params = snakemake.params
        compose(params.method, snakemake.input, snakemake.output[0], dtype=params.dtype, device=params.device,
                **params.options)
