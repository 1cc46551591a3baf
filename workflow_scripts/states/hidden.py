"""Rule `hidden` extracts the hidden states of a dense model over all calibration sequences.

Rule `hidden_shard` extracts the states of some sequences, and rule `hidden_join` joins the shards.
"""
from job import job
from planning import refusals

from kdp_core.base import store
from kdp_core.states import hidden


def extract_hidden(dense: str, tokens: str, out: str, sequences: tuple[int, int] | None, params) -> None:
    """Load the model, and write its states to disk batch by batch."""
    # imported here, because the models of transformers take seconds to import, and joining shards does not need them
    from kdp_core.model import checkpoints

    model = checkpoints.load_model(dense, device=params.device, dtype=params.dtype)
    hidden.extract(model, store.read(tokens), out, sequences, **params.options)


def join_hidden(shards: list[str], out: str, options: dict) -> None:
    """Join the shards."""
    hidden.join(shards, out, **{key: options[key] for key in options if key == "massive_factor"})


if __name__ == "__main__":
    with job(snakemake):
        inputs, wildcards = snakemake.input, snakemake.wildcards
        if snakemake.rule == "hidden_join":
            join_hidden(inputs, snakemake.output[0], snakemake.params.options)
        else:
            refusals.stop_before_work(dict(wildcards.items()), snakemake.config)
            shard = (int(wildcards.start), int(wildcards.stop)) if "start" in wildcards.keys() else None
            extract_hidden(inputs.dense, inputs.tokens, snakemake.output[0], shard, snakemake.params)
