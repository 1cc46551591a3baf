"""Wanda and SparseGPT: half of the weights of every linear map in the decoder layers is set to zero.

Wanda (locuslab/wanda): `lib.prune.prune_wanda`. Shims: the loader of C4 returns our sequences; the layers get their
    rotary tables.
SparseGPT (IST-DASLab/sparsegpt): `llama.llama_sequential`. Shims: the rotary tables; no waiting for a GPU. The original
    sets one weight too many to zero in each block of columns.

The zeros of the first layer must be the same. The originals compute in float32, and we compute sums and scores in
float64. If two scores are almost equal, rounding decides which weight becomes zero. The inputs of the later layers then
differ, and with them more of the zeros.
"""
from types import SimpleNamespace
from unittest import mock

import torch
from stage.timing import Row

from kdp_core.base.records import Selection
from kdp_core.methods import sparse
from kdp_core.model import checkpoints
from kdp_core.model.sizes import count_params
from originals import shims
from originals.cases import Case, Original, Pair, Tensors, linear_weights, same_zeros, selection

SHARE = 0.5
"""Share of the weights of each linear map that is set to zero."""
SEQUENCES = 4


def _half(case: Case) -> Selection:
    """The ratio of all parameters at which half of the linear maps is set to zero."""
    model = checkpoints.on_meta(checkpoints.config_of(case.dense))
    scope = sum(weight.numel() for weight in linear_weights(model).values())
    return selection(ratio=SHARE * scope / count_params(model))


def wanda(case: Case) -> Pair:
    """The pair of Wanda."""
    case = case.some(SEQUENCES)
    prune, = shims.imported(case.clone, "lib.prune")
    options = SimpleNamespace(nsamples=case.count, seed=0, sparsity_ratio=SHARE, use_variant=False)

    def original() -> Tensors:
        model = shims.with_positions(case.model(), case.length)
        model.seqlen, model.hf_device_map = case.length, {}
        loaded = [(ids_BT,) for ids_BT in case.batches(1)], None
        with shims.quiet(), mock.patch.object(prune, "get_loaders", lambda *_, **__: loaded):
            prune.prune_wanda(options, model, None, torch.device("cpu"))
        return linear_weights(model)

    def ours() -> Tensors:
        return sparse.wanda(case.dense, case.states([0]), case.tokens, _half(case)).plan.tensors

    return Pair(case, f"half of the weights, {case.work}", ours, original, _compare)


def sparsegpt(case: Case) -> Pair:
    """The pair of SparseGPT."""
    case = case.some(SEQUENCES)
    llama, = shims.imported(case.clone, "llama")
    llama.args = SimpleNamespace(nsamples=case.count, true_sequential=False, minlayer=-1, maxlayer=1000, prune_only="",
                                 invert=False, wbits=16, sparsity=SHARE, prunen=0, prunem=0, percdamp=0.01,
                                 blocksize=128)

    def original() -> Tensors:
        model = shims.with_positions(case.model(), case.length)
        model.seqlen = case.length
        with shims.quiet(), shims.no_waiting():
            llama.llama_sequential(model, [(ids_BT,) for ids_BT in case.batches(1)], "cpu")
        return linear_weights(model)

    def ours() -> Tensors:
        return sparse.sparsegpt(case.dense, case.states([0]), case.tokens, _half(case)).plan.tensors

    return Pair(case, f"half of the weights, {case.work}", ours, original, _compare)


def _compare(ours: Tensors, theirs: Tensors) -> list[Row]:
    first = {name: weight for name, weight in ours.items() if ".layers.0." in name}
    return [same_zeros("of the first layer", first, theirs, 0.999), same_zeros("of all layers", ours, theirs, None)]


ORIGINALS = {
    "wanda": Original("locuslab/wanda", "8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6", wanda),
    "sparsegpt": Original("IST-DASLab/sparsegpt", "147d2159dc4f3e9f73e47b32c04d7b3708f44436", sparsegpt),
}
