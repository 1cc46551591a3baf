"""Rule `paper_costs` computes Tables 10 and 12 of the KDP paper from the configurations of the models in the paper."""
from pathlib import Path

from job import job

from kdp_core.base import store
from kdp_core.results import costs

if __name__ == "__main__":
    with job(snakemake):
        for number, frame in ((10, costs.table_10()), (12, costs.table_12())):
            for path in snakemake.output[f"table{number}"]:
                store.write_text(path, costs.render(frame, number, Path(path).suffix[1:]))
