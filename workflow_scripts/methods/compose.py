"""Rule `compose` fits all stand-ins of one grid point together."""
from job import job, training

from kdp_core.base import store
from kdp_core.methods import arguments, method_of
from kdp_core.states import hidden


def compose(method: str, inputs, resume, out: str, **options) -> None:
    """Fit all stand-ins of the plan. A fit with training saves its state, so that it can be resumed."""
    fit = method_of(method).compose
    trains = {"resume": resume} if "resume" in arguments(fit, filled=()) else {}
    store.write(out, fit(inputs.dense, hidden.read(inputs.hidden), store.read(inputs.tokens), store.read(inputs.plan),
                         **trains, **options))


if __name__ == "__main__":
    with job(snakemake), training(snakemake) as resume:
        params = snakemake.params
        compose(params.method, snakemake.input, resume, snakemake.output[0], dtype=params.dtype, device=params.device,
                **params.options)
