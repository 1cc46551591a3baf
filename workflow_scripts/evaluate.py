"""Rules `evaluate` and `evaluate_dense`: lm-eval scores of one checkpoint, with its answer to every item."""
from job import job

from kdp_core import evaluate, store


def score(checkpoint: str, task_folders: list[str], dtype: str, device: str, options: dict, out: str,
          samples: str) -> None:
    """Evaluate a checkpoint."""
    store.write(out, evaluate.evaluate(checkpoint, task_folders=task_folders, dtype=dtype, device=device,
                                       samples_folder=samples, **options))


if __name__ == "__main__":
    with job(snakemake):
        score(snakemake.input.checkpoint, [snakemake.input.tasks, *snakemake.params.task_folders],
              snakemake.params.dtype, snakemake.params.device, snakemake.params.options, snakemake.output.scores,
              snakemake.output.samples)
