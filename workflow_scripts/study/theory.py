"""Rule `theory` fits step 1 on a long run of layers and measures both theorems on it."""
from job import device_here, job, training

from kdp_core.base import store
from kdp_core.methods.kdp import kernel
from kdp_core.states import hidden
from kdp_core.study import theory


def measure(path: str, run: list[int], fit_options: dict, options: dict, device: str, resume, out: str) -> None:
    """Fit the kernel, then measure both theorems on the fitted sequences and on held-out sequences."""
    states = hidden.read(path)
    fitted = kernel.fit(states, (run[0], run[1]), device=device, resume=resume, **fit_options)
    same = {name: fit_options[name] for name in ("heldout", "seed") if name in fit_options}
    store.write(out, theory.measure(states, fitted, device=device, **same, **options))


if __name__ == "__main__":
    with job(snakemake), training(snakemake) as resume:
        params = snakemake.params
        measure(snakemake.input[0], params.run, params.kernel, params.options, device_here(params.device), resume,
                snakemake.output[0])
