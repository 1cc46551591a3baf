"""Rule `finetune` fine-tunes a pruned checkpoint and copies the plan that both checkpoints share."""
from pathlib import Path

from job import job, training

from kdp_core.base import provenance, store
from kdp_core.prune import finetune


def tune(inputs, params, resume, outputs) -> None:
    """Fine-tune the checkpoint and write facts and record.

    The plan of the fine-tuned checkpoint is a copy of the plan of the pruned checkpoint.
    """
    facts, record = finetune.finetune(inputs.dense, inputs.checkpoint, outputs.checkpoint, store.read(inputs.tokens),
                                      store.read(inputs.pruned), params.device, params.dtype, resume,
                                      **params.options)
    about = {**provenance.here(), "inputs": provenance.hashes({path: path for path in (inputs.plan, inputs.tokens)})}
    store.write_json(Path(outputs.checkpoint) / provenance.MADE, {**about, "pruned": facts._asdict()})
    store.write(outputs.pruned, facts)
    store.write(outputs.finetuned, record)
    store.write(outputs.plan, store.read(inputs.plan))


if __name__ == "__main__":
    with job(snakemake), training(snakemake) as resume:
        tune(snakemake.input, snakemake.params, resume, snakemake.output)
