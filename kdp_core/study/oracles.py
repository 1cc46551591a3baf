"""Selections of layers from papers and released code, and how far kdp's selections agree with them.

A selection is listed if the publication gives its set of layers, or at least the beginning of its order. A selection
depends on the calibration text and on the precision. Publications do not always name the calibration text. The
precision of their weights is between 4 and 16 bits. Therefore kdp may order layers with nearly equal scores differently
from the publication. Layers are numbered from 0. `python benchmarks/oracles.py` makes kdp's selections for a model on
this machine and compares them.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdp_core.base.records import ModelFacts, Similarity, Tokens
from kdp_core.methods import METHODS
from kdp_core.states.hidden import HiddenStates


class Oracle(NamedTuple):
    """A selection of layers that was published."""
    model: str
    method: str
    """The name of the method in kdp that should make this selection."""
    source: str
    layers: list[int]
    """The published layers in the order of removal; ascending if only the set is known."""
    ordered: bool
    options: dict[str, dict[str, int | str]]
    """Options, for each part of the method, whose values in the publication differ from kdp's defaults."""


LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_8B = "LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-3-8B"
MISTRAL, MISTRAL_INSTRUCT = "Mistral-7B", "Mistral-7B-Instruct-v0.2"
SHORTENED, DROP = "Nota-NetsPresso/shortened-llm 4031a92", "CASE-Lab-UMD/LLM-Drop 28b5dd1"
K_MAX = 3
"""A placeholder, because no method with a published selection reads this value."""
_UNPROTECTED = {"search": {"keep_first": 0, "keep_last": 0}}
ORACLES = (
    Oracle(LLAMA_2_7B, "shortgpt", "Men et al. 2024", [27, 26, 25, 28, 24, 29, 23, 21, 22], True, {}),
    Oracle(LLAMA_2_7B, "shortgpt", "sramshetty/ShortGPT 78d9615", [25, 27, 24, 26, 28, 29, 23, 22, 21], True,
           {"search": {"last_state": "final_norm"}}),
    Oracle(LLAMA_2_7B, "shortened_ppl", SHORTENED, [11, 8, 24, 21, 12, 7, 9, 10, 18, 27, 14, 23, 25, 15], True,
           _UNPROTECTED),
    Oracle(LLAMA_2_7B, "shortened_taylor", SHORTENED, [0, 28, 27, 25, 29, 26, 24, 23, 21, 22, 30, 20], True,
           _UNPROTECTED),
    Oracle(LLAMA_3_8B, "shortened_ppl", SHORTENED, [8, 23, 9, 11, 10, 25, 26, 12, 22, 19, 24, 14, 7, 21], True,
           _UNPROTECTED),
    Oracle(LLAMA_3_8B, "shortened_taylor", SHORTENED, [24, 25, 26, 28, 29, 23, 27, 22, 20, 19, 21, 30], True,
           _UNPROTECTED),
    Oracle(LLAMA_3_8B, "angular", "short-transformers, README", [23, 24, 25, 26, 27], False, {}),
    Oracle(MISTRAL_INSTRUCT, "angular", "arcee-ai/PruneMe faee6c9", list(range(21, 29)), False,
           {"block": {"keep_first": 1}}),
    Oracle(MISTRAL, "attn_drop", DROP, [25, 26, 24, 22], True, {}),
    Oracle(MISTRAL, "mlp_drop", DROP, [26, 27, 25, 24], True, {}),
    Oracle(MISTRAL, "mlp_drop", DROP, [26, 27, 25, 24, 23, 22, 29, 28], True, {}),
    Oracle(MISTRAL, "block_drop", DROP, [26, 25, 24, 27], True, {}),
    Oracle(LLAMA_2_13B, "block_drop", DROP, [33, 32, 31, 34, 30, 35, 29, 28], True, {}),
)


class Agreement(NamedTuple):
    """How far kdp's selection agrees with a published selection of the same number of layers."""
    shared: float
    """Share of the published layers that kdp also selects."""
    same_order: bool | None
    """Whether kdp's order of these layers is the published order; None if the publication gives no order."""
    chosen: list[int]


def agreement(oracle: Oracle, chosen: Sequence[int]) -> Agreement:
    """How far a selection agrees with an oracle. `chosen` is in the order of removal. If the oracle has k layers, the
    first k layers of `chosen` are compared."""
    first = list(chosen[:len(oracle.layers)])
    shared = len(set(first) & set(oracle.layers)) / len(oracle.layers)
    return Agreement(shared, first == oracle.layers if oracle.ordered else None, first)


def choose(oracle: Oracle, dense: Path, hidden: HiddenStates, tokens: Tokens, similarity: Similarity,
           facts: ModelFacts, *, device: str = "cpu", dtype: str = "float32") -> list[int]:
    """The layers that kdp selects: in the order of removal, or ascending if the method selects all of them at once."""
    method, options = METHODS[oracle.method], oracle.options
    where = {"device": device, "dtype": dtype}
    if method.search:
        return method.search(dense, hidden, tokens, facts, k_max=K_MAX, **where, **options.get("search", {})).order
    # the ratio is that of the published number of whole layers; parts are smaller, so more parts are chosen, best first
    ratio = sum(facts.params_per_layer[layer] for layer in oracle.layers) / facts.params_total
    selection = method.select(similarity, facts, ratio=ratio, k_max=K_MAX, module_params=0, **options.get("block", {}))
    if method.compose:
        composed = method.compose(dense, hidden, tokens, selection, **where, **options.get("compose", {}))
        return [one["layer"] for one in composed.stats["order"]]
    return [layer for start, stop in selection.blocks for layer in range(start, stop)]
