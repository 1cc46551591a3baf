"""Rule `diagnose` compares the states and outputs of a pruned model and its dense model on held-out windows."""
from job import job

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.score import diagnose


def compare(dense: str, facts: str, checkpoint: str, pruned: str, text: str, length: int, out: str, **options) -> None:
    """Cut the held-out text into windows and compare the two models on them."""
    ids_ST = texts.windows(checkpoints.load_tokenizer(dense), texts.read_documents(text, format="jsonl"), length=length,
                           vocabulary=store.read(facts).vocabulary, start=first_token(checkpoints.config_of(dense)))
    dropped = [layer for start, stop in store.read(pruned).blocks for layer in range(start, stop)]
    store.write(out, diagnose.diagnose(dense, checkpoint, ids_ST, dropped=dropped, **options))


if __name__ == "__main__":
    with job(snakemake):
        inputs, params = snakemake.input, snakemake.params
        compare(inputs.dense, inputs.facts, inputs.checkpoint, inputs.pruned, inputs.text, params.length,
                snakemake.output[0], dtype=params.dtype, device=params.device, **params.options)
