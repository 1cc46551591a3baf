"""Rule `similarity` computes cosine, angular distance and CKA of all pairs of layers."""
from job import device_here, job

from kdp_core.base import store
from kdp_core.states import hidden, similarity

if __name__ == "__main__":
    with job(snakemake):
        params = snakemake.params
        store.write(snakemake.output[0], similarity.similarity(hidden.read(snakemake.input[0]), **params.options,
                                                               device=device_here(params.device)))
