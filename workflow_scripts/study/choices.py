"""Rules `choices_dense` and `choices` compute probabilities of multiple-choice items (dense and pruned model)."""
from job import job

from kdp_core.base import store
from kdp_core.score.benchmarks import Chosen
from kdp_core.study import candidates

if __name__ == "__main__":
    with job(snakemake):
        given, own = snakemake.input, snakemake.params
        same = {"device": own.device, "dtype": own.dtype}
        made = candidates.survive(given.checkpoint, Chosen(**own.chosen), store.read(given.known), **same) \
            if "known" in dict(given.items()) else candidates.of_dense(given.checkpoint, Chosen(**own.chosen), **same)
        store.write(snakemake.output[0], made)
