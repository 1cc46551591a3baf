"""Rules `spaces_probe` and `spaces` compare a changed model with the dense model, by states, logits and probabilities.

In rule `spaces_probe`, the changed model lacks one layer or part. In rule `spaces`, the changed model is a pruned
model.
"""
import json
from pathlib import Path

from job import job
from torch import Tensor

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.study import spaces


def windows(dense: str, facts: str, text: str, length: int) -> Tensor:
    """The held-out text, cut into windows."""
    return texts.windows(checkpoints.load_tokenizer(dense), texts.read_documents(text, format="jsonl"), length=length,
                         vocabulary=store.read(facts).vocabulary, start=first_token(checkpoints.config_of(dense)))


def items(folder: str) -> list[spaces.Choice]:
    """The multiple-choice items made from held-out text."""
    lines = Path(folder, "heldout_continuation.jsonl").read_text(encoding="utf-8").splitlines()
    return [spaces.Choice(row["context"], row["choices"]) for row in map(json.loads, lines)]


def run(inputs, params, out: str) -> None:
    """Measure the dense model without one layer or part at a time, or compare a pruned model with its dense model."""
    ids_ST = windows(inputs.dense, inputs.facts, inputs.text, params.length)
    same = {"device": params.device, "dtype": params.dtype, **params.options}
    if "checkpoint" not in dict(inputs.items()):
        store.write(out, spaces.probe(inputs.dense, ids_ST, **same))
        return
    dropped = [layer for start, stop in store.read(inputs.pruned).blocks for layer in range(start, stop)]
    store.write(out, spaces.compare(inputs.dense, inputs.checkpoint, ids_ST, items(inputs.tasks), dropped=dropped,
                                    **same))


if __name__ == "__main__":
    with job(snakemake):
        run(snakemake.input, snakemake.params, snakemake.output[0])
