"""Rule `tasks` makes evaluation tasks from a held-out text."""
from job import job

from kdp_core.base import texts
from kdp_core.score import tasks

if __name__ == "__main__":
    with job(snakemake):
        tasks.write_tasks(texts.read_documents(snakemake.input[0], format="jsonl"), snakemake.output[0],
                          **snakemake.params.options)
