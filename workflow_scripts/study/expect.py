"""Rule `expect` predicts how much a pruned model loses in text generation.

The prediction is made from next-token predictions of the pruned and the dense model on held-out text.
"""
from job import job

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.study import expect, single_step


def run(inputs, params, out: str) -> None:
    """Measure the next-token predictions of a pruned model and write the expected losses."""
    ids_ST = texts.windows(checkpoints.load_tokenizer(inputs.dense), texts.read_documents(inputs.text, format="jsonl"),
                           length=expect.LENGTH, vocabulary=store.read(inputs.facts).vocabulary,
                           start=first_token(checkpoints.config_of(inputs.dense)))
    measured = single_step.measure(inputs.dense, inputs.checkpoint, ids_ST, device=params.device, dtype=params.dtype,
                                   **params.options)
    store.write(out, expect.expectation(measured, store.read(inputs.predictor)))


if __name__ == "__main__":
    with job(snakemake):
        run(snakemake.input, snakemake.params, snakemake.output[0])
