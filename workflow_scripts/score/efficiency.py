"""Rules `efficiency` and `efficiency_dense` measure parameters, multiply-adds, latency and memory."""
from job import job

from kdp_core.base import store
from kdp_core.score import efficiency

if __name__ == "__main__":
    with job(snakemake):
        store.write(snakemake.output[0], efficiency.measure(
            snakemake.input.dense, snakemake.input.checkpoint, dtype=snakemake.params.dtype,
            device=snakemake.params.device, **snakemake.params.options))
