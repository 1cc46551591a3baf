"""Rule `answers` lets the dense model and pruned models of one calibration set continue the same prompts."""
from pathlib import Path

from job import job

from kdp_core.base import store
from kdp_core.study import answers

if __name__ == "__main__":
    with job(snakemake):
        own = snakemake.params
        folders = {name: Path(folder) for name, folder in zip(
            own.names, [snakemake.input.dense, *snakemake.input.checkpoints], strict=True)}
        store.write(snakemake.output[0], answers.answers(folders, device=own.device, dtype=own.dtype, **own.options))
