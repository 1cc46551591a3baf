"""Rule `seeds` writes the mean and the variation of the results over calibration seeds."""
from pathlib import Path

from gather import table
from job import job

from kdp_core.base import store
from kdp_core.results import seeds

if __name__ == "__main__":
    with job(snakemake):
        frame = seeds.over_seeds(table(snakemake.input[0]), snakemake.params.families)
        for path in snakemake.output:
            store.write_text(path, seeds.render(frame, Path(path).suffix[1:]))
