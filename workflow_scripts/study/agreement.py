"""Rule `agreement` compares the searches for layers at one ratio.

For each search, rule `agreement` also measures the model without the chosen layers on held-out text.
"""
from job import job

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.study import agreement


def compare(inputs, params, out: str) -> None:
    """Cut the held-out text into windows and compare the searches on them."""
    ids_ST = texts.windows(checkpoints.load_tokenizer(inputs.dense), texts.read_documents(inputs.text, format="jsonl"),
                           length=params.length, vocabulary=store.read(inputs.facts).vocabulary,
                           start=first_token(checkpoints.config_of(inputs.dense)))
    searches = {name: store.read(path).stats for name, path in zip(params.names, inputs.composed, strict=True)}
    store.write(out, agreement.measure(inputs.dense, searches, ids_ST, device=params.device, dtype=params.dtype,
                                       **params.options))


if __name__ == "__main__":
    with job(snakemake):
        compare(snakemake.input, snakemake.params, snakemake.output[0])
