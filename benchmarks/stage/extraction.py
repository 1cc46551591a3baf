"""Compares the extraction of hidden states to Zarr with the bare forward pass through the same layers.

The bare pass runs only the decoder, without output head, hooks and writing, in batches of the same size. Peak memory is
the growth of the resident set during the call. Peak memory is measured twice; the second call has four times as many
sequences as the first call.
"""
from collections.abc import Callable

import torch

from kdp_core.base.records import Tokens
from kdp_core.model.families import base_of, decoder_layers
from kdp_core.score import efficiency
from kdp_core.states import hidden
from stage.setup import Setup, first, made_up
from stage.timing import Row, figure, in_turns

BATCH, STORE = 8, "extracted.zarr"


class _Enough(Exception):
    """Ends a bare pass."""


def measure(setup: Setup) -> list[Row]:
    """Measure the extraction of all states and of the states of one block, and the peak memory."""
    tokens = first(setup.tokens, setup.size(16, 8))
    every, block = list(range(setup.facts.layers + 1)), list(range(setup.block[0], setup.block[1] + 1))
    times = in_turns({"all": extraction(setup, tokens, every), "bare all": bare(setup, tokens, every[-1]),
                      "block": extraction(setup, tokens, block), "bare block": bare(setup, tokens, block[-1])},
                     setup.repeats, before=lambda: setup.scratch(STORE))
    rows = [times.row(f"all {len(every)} states, {tokens.ids_ST.numel()} tokens", "all", "bare all", target=0.95,
                      against="bare forward pass"),
            times.row(f"states {block[0]} to {block[-1]}", "block", "bare block", target=0.95,
                      against="bare forward pass up to there")]
    return [*rows, memory(setup)]


def extraction(setup: Setup, tokens: Tokens, layers: list[int]) -> Callable[[], None]:
    """A function that runs the stage."""
    return lambda: hidden.extract(setup.model, tokens, setup.folder / STORE, layers=layers,
                                  batch_sequences=BATCH)


def bare(setup: Setup, tokens: Tokens, last: int) -> Callable[[], None]:
    """A function that runs only the decoder, up to state `last`."""
    layers, decoder = decoder_layers(setup.model), base_of(setup.model)

    def enough(*_: object) -> None:
        raise _Enough

    @torch.inference_mode()
    def run() -> None:
        hook = layers[last].register_forward_pre_hook(enough) if last < len(layers) else None
        for ids_BT in tokens.ids_ST.split(BATCH):
            try:
                decoder(ids_BT, use_cache=False)
            except _Enough:
                pass
        if hook:
            hook.remove()

    return run


def memory(setup: Setup) -> Row:
    """Compare the peak memory of two extractions, each of three states.

    The second extraction reads four times as many sequences as the first extraction.
    """
    few = setup.size(64, 8)
    peaks = []
    for sequences in (few, 4 * few):
        tokens = made_up(setup.tokens, sequences, setup.facts.vocabulary)
        meter = efficiency.Meter(torch.device("cpu"))
        meter.start_runs(setup.model)
        setup.scratch(STORE)
        extraction(setup, tokens, [0, 1, 2])()
        peaks.append(meter.peak_mib(setup.model)[0])
    return figure(f"peak memory, {4 * few} sequences", peaks[1], "MiB", f"with {few}", peaks[0], target=1.1,
                  at_most=True)
