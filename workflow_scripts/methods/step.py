"""Rule `step` fits one step of one method on one block. KDP has the steps `kernel` and `inverse`."""
import inspect

from job import device_here, job, training

from kdp_core.base import store
from kdp_core.methods import fit_step, method_of
from kdp_core.states import hidden


def fit(method: str, step: str, block: tuple[int, int], inputs, device: str, options: dict, resume, out: str) -> None:
    """Fit the block and write the record.

    Each of the arguments `device`, `model_layers` and `resume` is passed only if the function of the step accepts it.
    """
    known = {"device": device_here(device), "model_layers": store.read(inputs.facts).layers, "resume": resume}
    asked = inspect.signature(method_of(method).steps[step]).parameters
    filled = {name: value for name, value in known.items() if name in asked}
    store.write(out, fit_step(method, step, hidden.read(inputs.hidden), block,
                              [store.read(path) for path in inputs.before], **filled, **options))


if __name__ == "__main__":
    with job(snakemake), training(snakemake) as resume:
        wildcards, params = snakemake.wildcards, snakemake.params
        fit(params.method, wildcards.step, (int(wildcards.start), int(wildcards.stop)), snakemake.input, params.device,
            params.options, resume, snakemake.output[0])
