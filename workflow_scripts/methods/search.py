"""Rule `search` orders the layers to remove by the method's own criterion."""
from job import job
from planning import refusals

from kdp_core.base import store
from kdp_core.methods import method_of
from kdp_core.states import hidden


def search(method: str, inputs, k_max: int, out: str, **options) -> None:
    """Run the method's own search on the stored states and their tokens, and on the similarity if the rule has it."""
    if inputs.similarity:
        options["similarity"] = store.read(inputs.similarity)
    store.write(out, method_of(method).search(inputs.dense, hidden.read(inputs.hidden), store.read(inputs.tokens),
                                              store.read(inputs.facts), k_max=k_max, **options))


if __name__ == "__main__":
    with job(snakemake):
        params = snakemake.params
        refusals.stop_before_work(dict(snakemake.wildcards.items()), snakemake.config)
        search(params.method, snakemake.input, int(snakemake.wildcards.k_max), snakemake.output[0], dtype=params.dtype,
               device=params.device, **params.options)
