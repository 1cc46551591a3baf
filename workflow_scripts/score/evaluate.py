"""Rules `evaluate` and `score` score a pruned checkpoint with lm-eval. Rules `evaluate_dense` and `score_dense` score
the dense model with lm-eval.

`score` scores one task and writes a record of the scores. `evaluate` scores all tasks without such a record, and writes
the answers to every item.
"""
from job import job

from kdp_core.base import store
from kdp_core.score import evaluate
from kdp_core.score.benchmarks import Chosen


def score(checkpoint: str, task_folders: list[str], chosen: dict, options: dict, out: str, **settings: object) -> None:
    """Evaluate a checkpoint."""
    store.write(out, evaluate.evaluate(checkpoint, task_folders=task_folders, **settings, **options,
                                       chosen=Chosen(**chosen) if chosen else None))


if __name__ == "__main__":
    with job(snakemake):
        own = snakemake.params
        score(snakemake.input.checkpoint, [snakemake.input.tasks, *own.task_folders], own.benchmarks, own.options,
              snakemake.output.scores, dtype=own.dtype, device=own.device, records_folder=own.records, code=own.code,
              samples_folder=snakemake.output.get("samples"), kept_only=bool(snakemake.input.get("scored")))
