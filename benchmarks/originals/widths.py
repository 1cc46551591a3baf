"""SliceGPT, LLM-Pruner and FLAP: states, heads and channels become narrower.

SliceGPT (microsoft/TransformerCompression): `replace_layers`, `fuse_modules` and `rotate_and_slice`, without the random
    rotation of the bases. Shims: the attention returns three results; `ml_collections` is absent; `cleanup_memory`,
    which takes most of the time for a small model, does nothing. The original subtracts the mean of the embedding. This
    changes the outputs of models like LLaMA, so the results differ. The matrices W Q Q' W' of all query maps are
    compared, because they do not depend on the signs of the directions.
LLM-Pruner (horseee/LLM-Pruner): `llama3.main` with `param_first` on layers 4 to N - 3. Shims: the loaders return our
    model and tokens; the model returns no cache; the log and the perplexity at the end are left out. On both sides each
    of these layers loses one of three key-value heads and 34 % of its channels. The kept channels are compared. The
    heads are not, because the original adds the scores of query heads to the wrong key-value heads.
FLAP (CASIA-IVA-Lab/FLAP): `lib.prune.prune_flap` with its defaults (WIFV, AL-AM). The code assumes heads of 128
    numbers, each with its own keys and values. The embedded model has no such heads, so a made-up model with random
    weights is pruned. Shims: the loader returns our sequences; the rotary tables; writers get zero biases, as in
    `main.get_llm`; means stay in single precision. The original leaves the first sequence out of its variances, so the
    kept channels are only almost the same.
"""
from types import SimpleNamespace
from unittest import mock

import torch
from stage.timing import Row, figure
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdp_core.methods import slicegpt
from kdp_core.methods.heads_channels import flap, llm_pruner
from kdp_core.methods.heads_channels.units import layout
from originals import shims
from originals.cases import Case, Original, Pair, Tensors, difference, selection

SLICING = 0.25
"""Share of the width that SliceGPT removes."""
PARTS = 0.2
"""Share of the parameters of all heads and channels that FLAP removes."""
SHARE = 0.34
"""Share of the channels and of the heads that LLM-Pruner removes. If no head is removed, the original fails."""
BATCH = 8
HEAD = 128
"""Width of a head that FLAP's code assumes."""


def narrow_states(case: Case) -> Pair:
    """The pair of SliceGPT."""
    case = case.some(4)
    rotate, fusion, adapters, scheduler, utils = shims.imported(
        case.clone / "src", *(f"slicegpt.{name}" for name in ("rotate", "layernorm_fusion", "adapters.llama_adapter",
                                                              "slicing_scheduler", "utils")),
        bare=("slicegpt", "slicegpt.adapters"), absent={"ml_collections": {"ConfigDict": SimpleNamespace}})
    rotate.cleanup_memory = utils.cleanup_memory = lambda: None
    width = slicegpt.cut(case.facts.width, SLICING, 8)

    def original() -> Tensors:
        adapter = adapters.LlamaModelAdapter(case.model())
        batches = [{"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)} for ids_BT in case.batches(BATCH)]
        with shims.quiet():
            fusion.replace_layers(adapter)
            fusion.fuse_modules(adapter)
            shims.three_results(adapter.model.model.layers)
            rotate.rotate_and_slice(adapter, batches, scheduler.ConstSlicingScheduler(width))
        return {name: weight.detach() for name, weight in adapter.model.state_dict().items()}

    def ours() -> Tensors:
        return slicegpt.compose(case.dense, case.states([0]), case.tokens, selection(), slicing=SLICING).plan.tensors

    return Pair(case, f"width {width} of {case.facts.width}, {case.work}", ours, original, _compare_slices)


def _compare_slices(ours: Tensors, theirs: Tensors) -> list[Row]:
    # W Q Q' W'
    squares = [{name: side[name].double() @ side[name].double().T for name in ours if name.endswith("q_proj.weight")}
               for side in (ours, theirs)]
    return [difference(*squares, None, "the squares of query maps")]


def narrow_layers(case: Case) -> Pair:
    """The pair of LLM-Pruner."""
    case = case.some(10)
    script, = shims.imported(case.clone, "llama3", bare=("LLMPruner",))
    _, _, sizes, total, _ = layout("llm_pruner", case.dense)
    pruned = llm_pruner.between(case.facts.layers, None, None)
    lost = {"attention": int(sizes.groups * SHARE), "mlp": sizes.channels - int(sizes.channels * (1 - SHARE))}
    ratio = len(pruned) * sum(count * sizes.unit_params[part] for part, count in lost.items()) / total

    def original() -> Tensors:
        model = case.model()
        model.config.use_cache = False
        options = SimpleNamespace(
            seed=0, save_ckpt_log_name="", base_model="", device="cpu", eval_device="cpu", test_before_train=False,
            test_after_train=False, save_model=False, max_seq_len=case.length, pruner_type="taylor", block_wise=True,
            grouping_strategy="sum", taylor="param_first", global_pruning=False, iterative_steps=1,
            pruning_ratio=SHARE, num_examples=case.count, block_attention_layer_start=pruned.start,
            block_attention_layer_end=pruned.stop, block_mlp_layer_start=pruned.start,
            block_mlp_layer_end=pruned.stop)
        changed = {"LlamaForCausalLM": SimpleNamespace(from_pretrained=lambda *_, **__: model),
                   "AutoTokenizer": SimpleNamespace(from_pretrained=lambda _: SimpleNamespace()),
                   "LoggerWithDepth": lambda **_: SimpleNamespace(log=lambda _: None),
                   "PPLMetric": lambda *_, **__: {}, "get_examples": lambda *_, **__: case.tokens.ids_ST}
        with shims.quiet(), mock.patch.multiple(script, **changed):
            script.main(options)
        return {name: weight.detach() for name, weight in model.state_dict().items()}

    def ours() -> Tensors:
        return llm_pruner.compose(case.dense, None, case.tokens, selection(ratio=ratio), sequences=None,
                                  batch_sequences=case.count).plan.tensors

    return Pair(case, f"{lost['mlp']} channels and a head of {len(pruned)} layers, {case.work}", ours, original,
                _compare_channels)


def narrow_parts(case: Case) -> Pair:
    """The pair of FLAP."""
    case = _made_up(case.some(16))
    prune, = shims.imported(case.clone, "lib.prune")
    _, _, sizes, total, blank = layout("flap", case.dense)
    units = sum(sizes.layers * count * sizes.unit_params[part] for part, count in sizes.units.items())
    options = SimpleNamespace(nsamples=case.count, seed=0, metrics="WIFV", structure="AL-AM", pruning_ratio=PARTS,
                              unstr=False)

    def original() -> Tensors:
        model = shims.with_positions(case.model(), case.length)
        model.seqlen = case.length
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.bias = nn.Parameter(torch.zeros(writer.out_features))
        loaded = [(ids_BT,) for ids_BT in case.batches(1)], None
        with shims.quiet(), mock.patch.object(prune, "get_loaders", lambda *_, **__: loaded), \
                mock.patch.object(torch, "half", torch.float32):
            prune.prune_flap(options, model, None, torch.device("cpu"))
        return {name: weight.detach() for name, weight in model.state_dict().items()}

    def ours() -> Tensors:
        ratio = (PARTS * units - flap._bias_params(blank)) / total
        return flap.compose(case.dense, case.states([0]), case.tokens, selection(ratio=ratio)).plan.tensors

    return Pair(case, f"made-up model of {sizes.layers} layers, {case.work}", ours, original,
                lambda mine, theirs: _compare_channels(mine, theirs, None))


def _made_up(case: Case) -> Case:
    """The case with a made-up model of 12 layers, whose heads have the width that FLAP's code assumes."""
    config = LlamaConfig(vocab_size=case.facts.vocabulary, hidden_size=4 * HEAD, num_hidden_layers=12,
                         num_attention_heads=4, num_key_value_heads=4, intermediate_size=1536, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(case.folder / "made-up")
    return case._replace(dense=case.folder / "made-up")


def _compare_channels(ours: Tensors, theirs: Tensors, least: float | None = 0.9999) -> list[Row]:
    names = [name for name in ours if name.endswith("gate_proj.weight")]
    equal = sum(len(_rows(ours[name]) & _rows(theirs[name])) for name in names)
    return [figure("channels kept on both sides", equal, "", "of", sum(len(ours[name]) for name in names),
                   target=least)]


def _rows(weight: torch.Tensor) -> set[bytes]:
    """The rows of a matrix, as bytes."""
    return {row.numpy().tobytes() for row in weight.contiguous()}


ORIGINALS = {
    "slicegpt": Original("microsoft/TransformerCompression", "6b12cdee6ad51791d7c776b3a046bc408b9e77e9", narrow_states),
    "flap": Original("CASIA-IVA-Lab/FLAP", "3bb57db3449dd2fa04a5c2192de80e87e33be2b1", narrow_parts),
    "llm_pruner": Original("horseee/LLM-Pruner", "128a07d977f9b205d60ab14cfbc6a78f8a8e39d2", narrow_layers),
}
