"""Fold: a pruned checkpoint computes what the plan says, by hand, in every family, with and without kdp at hand."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPTJConfig

from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.folded import FOLDED
from kdp_core.model.sizes import count_params
from kdp_core.prune.fold import FoldError, fold
from tests import pico

FAMILIES = pico.DIFFERENT
WIDTH, LAYERS = 32, 10
IDS_ST = torch.arange(2, 26).view(2, 12)
EVERYWHERE = dict(blocks=[(0, 2), (3, 5), (5, 7), (8, 10)])
"""Before the first layer, two before one, after the last."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(block, seed=0):
    """A stand-in not far from the identity."""
    seed += 7 * block[0]
    weight_DD = torch.eye(WIDTH) + 0.1 * randn(WIDTH, WIDTH, seed=seed)
    return Module(block, "affine", {"width": WIDTH, "bypass_above": None},
                  {"map.weight": weight_DD, "map.bias": randn(WIDTH, seed=seed + 1)})


def rff_mlp(block, frequencies=6, hidden=5):
    options = {"width": WIDTH, "frequencies": frequencies, "hidden": hidden, "activation": "gelu", "lift_input": "rms",
               "bypass_above": None}
    shapes = {"omega": (frequencies, WIDTH), "phase": (frequencies,), "w1.weight": (hidden, 2 * frequencies),
              "w1.bias": (hidden,), "w2.weight": (WIDTH, hidden), "w2.bias": (WIDTH,)}
    tensors = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors["omega"] *= 0.2  # as wide as a fitted kernel: a narrow one magnifies the rounding of its input
    return Module(block, "rff_mlp", options, tensors)


def plan(dropped=(), blocks=(), make=affine, tensors=None):
    """A plan that drops these layers and those of the blocks, with a stand-in for each block."""
    layers = sorted({*dropped, *(layer for start, stop in blocks for layer in range(start, stop))})
    return Plan("made_up", [(layer, "whole") for layer in layers], [make(block) for block in blocks], tensors or {})


def made(family):
    """A pico model of a family."""
    return pico.model(family, layers=LAYERS, width=WIDTH)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Checkpoint folders by family."""
    root = tmp_path_factory.mktemp("dense")
    for family in FAMILIES:
        made(family).save_pretrained(root / family)
    return root


def logits(model):
    with torch.no_grad():
        return model(IDS_ST.to(model.device)).logits.float()


def folded(the_plan, source, out, **options):
    facts = fold(the_plan, source, out, **options)
    return facts, checkpoints.load_model(out)


def by_hand(model, steps):
    """Logits of a dense model of which these steps run: numbers are its layers, the others affine stand-ins.

    Each layer is called by itself with the mask and the positions that it receives in the dense model.
    """
    received = {}

    def keep(layer, args, kwargs):
        received[layer] = (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"},
                           args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder_layers(model)]
    with torch.no_grad():
        model(IDS_ST, use_cache=False)
        for hook in hooks:
            hook.remove()
        h = received[decoder_layers(model)[0]][2]
        for step in steps:
            if isinstance(step, Module):
                h = h @ step.tensors["map.weight"].T + step.tensors["map.bias"]
                continue
            args, kwargs, _ = received[decoder_layers(model)[step]]
            h = decoder_layers(model)[step](h, *args, **kwargs)
            h = h[0] if isinstance(h, tuple) else h
        base = model.model
        norm = base.decoder.final_layer_norm if hasattr(base, "decoder") else base.norm
        logits_STV = model.lm_head(norm(h))
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits_STV if cap is None else cap * torch.tanh(logits_STV / cap)


def steps_of(the_plan):
    """What runs: remaining layers, each block's stand-in where the block's end was."""
    dropped = {layer for layer, _ in the_plan.drop}
    places = {module.block[1]: module for module in the_plan.modules}
    found = []
    for layer in range(LAYERS + 1):
        found += [places[layer]] if layer in places else []
        found += [layer] if layer < LAYERS and layer not in dropped else []
    return found


# what the pruned model computes

@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_the_dense_model(dense, tmp_path, family):
    facts, model = folded(plan(), dense / family, tmp_path / "out")
    assert torch.equal(logits(model), logits(made(family)))
    assert (facts.params_removed, facts.layers_removed, facts.params_added, facts.blocks) == (0.0, 0, 0, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_layers_deletes_them_from_the_list(dense, tmp_path, family):
    facts, model = folded(plan(dropped=[2, 3, 6]), dense / family, tmp_path / "out")
    other = made(family)
    layers = decoder_layers(other)
    for index in (6, 3, 2):
        del layers[index]
    # the masks of a family with sliding windows follow the list of layer types, which goes with the layers
    other.config.num_hidden_layers = 7
    if getattr(other.config, "layer_types", None):
        other.config.layer_types = [kind for k, kind in enumerate(other.config.layer_types) if k not in (2, 3, 6)]
    with torch.no_grad():
        expected = other(IDS_ST, use_cache=False).logits
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert type(model) is type(other) and facts.blocks == [(2, 4), (6, 7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_stand_ins_everywhere_by_hand(dense, tmp_path, family):
    the_plan = plan(**EVERYWHERE)
    _, model = folded(the_plan, dense / family, tmp_path / "out")
    expected = by_hand(made(family), steps_of(the_plan))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(made(family))).abs().max() > 0.1


@pytest.mark.parametrize("given, steps", [
    (dict(blocks=[(3, 5)]), [0, 1, 2, "3-5", 5, 6, 7, 8, 9]),
    (dict(blocks=[(3, 5), (5, 7)]), [0, 1, 2, "3-5", "5-7", 7, 8, 9]),
    (dict(blocks=[(5, 7), (3, 5)]), [0, 1, 2, "3-5", "5-7", 7, 8, 9]),
    (dict(blocks=[(0, 2)]), ["0-2", 2, 3, 4, 5, 6, 7, 8, 9]),
    (dict(blocks=[(8, 10)]), [0, 1, 2, 3, 4, 5, 6, 7, "8-10"]),
    (dict(blocks=[(6, 8), (8, 10)]), [0, 1, 2, 3, 4, 5, "6-8", "8-10"]),
    (dict(blocks=[(2, 4)], dropped=[4, 8]), [0, 1, "2-4", 5, 6, 7, 9]),
    (dict(blocks=[(1, 10)]), [0, "1-10"]),
    (dict(blocks=[(0, 9)]), ["0-9", 9]),
])
def test_stand_ins_stand_where_their_blocks_were(dense, tmp_path, given, steps):
    the_plan = plan(**given)
    named = {"-".join(map(str, module.block)): module for module in the_plan.modules}
    _, model = folded(the_plan, dense / "llama", tmp_path / "out")
    expected = by_hand(made("llama"), [named.get(step, step) for step in steps])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_replaced_tensors_arrive_under_their_new_names(dense, tmp_path):
    name = "model.layers.7.mlp.down_proj.weight"
    _, model = folded(plan(dropped=[2, 3], tensors={name: torch.zeros(WIDTH, 64)}), dense / "llama", tmp_path / "out")
    other = made("llama")
    with torch.no_grad():
        decoder_layers(other)[7].mlp.down_proj.weight.zero_()
    steps = [0, 1, 4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(logits(model), by_hand(other, steps), atol=1e-5, rtol=1e-5)
    assert (logits(model) - by_hand(made("llama"), steps)).abs().max() > 1e-3


# generation, saving, configuration

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [dict(dropped=[2, 3, 8]), dict(EVERYWHERE, make=rff_mlp)], ids=["plain", "stand-ins"])
def test_greedy_tokens_are_the_same_with_and_without_cache(dense, tmp_path, family, given):
    _, model = folded(plan(**given), dense / family, tmp_path / "out")
    runs = [model.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=10, min_new_tokens=10,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs) and runs[0].shape == (2, 22)
    if family != "opt":
        assert [layer.self_attn.layer_idx for layer in decoder_layers(model)] == list(range(len(decoder_layers(model))))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [dict(dropped=[2, 3]), EVERYWHERE], ids=["plain", "stand-ins"])
def test_save_load_save_changes_nothing(dense, tmp_path, family, given):
    _, model = folded(plan(**given), dense / family, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    checkpoints.load_model(tmp_path / "b").save_pretrained(tmp_path / "c")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b") == config_of(tmp_path / "c")
    for path in (tmp_path / "a").glob("*.py"):
        assert {(tmp_path / name / path.name).read_bytes() for name in "bc"} == {path.read_bytes()}
    assert len({frozenset(path.name for path in (tmp_path / name).iterdir()) - {"generation_config.json"}
                for name in "abc"}) == 1


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_lists_with_an_entry_a_layer_are_cut_with_the_layers(dense, tmp_path, family):
    before = config_of(dense / family)["layer_types"]
    fold(plan(dropped=[1, 5]), dense / family, tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert after["layer_types"] == [kind for layer, kind in enumerate(before) if layer not in (1, 5)]
    assert after["num_hidden_layers"] == 8
    if family == "gemma3_text":
        assert before[5] == "full_attention" and "full_attention" not in after["layer_types"]


def test_only_lists_of_the_record_are_cut_with_the_layers(tmp_path):
    """SmolLM3's list may be longer than its layers; a list that happens to be as long is another thing."""
    source = pico.save(tmp_path / "dense", "smollm3", layers=3)
    before = config_of(source)
    before["eos_token_id"] = [1, 2, 3]
    (source / "config.json").write_text(json.dumps(before), encoding="utf-8")
    fold(plan(dropped=[1]), source, tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert before["no_rope_layers"][:4] == [1, 0, 1, 1] and after["no_rope_layers"] == [1, 1]
    assert after["eos_token_id"] == [1, 2, 3]


@pytest.mark.parametrize("given", [dict(dropped=[2]), EVERYWHERE], ids=["plain", "stand-ins"])
def test_checkpoint_tells_nothing_of_this_machine(dense, tmp_path, given):
    fold(plan(**given), dense / "llama", tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(dense).encode() not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


def test_other_files_of_the_checkpoint_go_along(tmp_path):
    source = pico.save(tmp_path / "dense", "llama")
    fold(plan(dropped=[2]), source, tmp_path / "out")
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_same_plan_same_bytes_and_the_old_folder_is_replaced(dense, tmp_path):
    fold(plan(dropped=[2]), dense / "llama", tmp_path / "a")
    fold(plan(**EVERYWHERE), dense / "llama", tmp_path / "a")
    fold(plan(**EVERYWHERE), dense / "llama", tmp_path / "b")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and "modeling_kdp.py" in files[0]


def test_shards_load(dense, tmp_path):
    facts, model = folded(plan(**EVERYWHERE), dense / "qwen3", tmp_path / "shards", shard_size="50KB")
    whole = fold(plan(**EVERYWHERE), dense / "qwen3", tmp_path / "whole")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2 and facts == whole
    assert torch.equal(logits(model), logits(checkpoints.load_model(tmp_path / "whole")))


def test_a_sharded_dense_checkpoint_folds_alike(dense, tmp_path):
    made("llama").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    models_of = [folded(plan(**EVERYWHERE), source, tmp_path / f"out{i}")[1]
                 for i, source in enumerate((tmp_path / "shards", dense / "llama"))]
    assert torch.equal(*map(logits, models_of))
    assert not (tmp_path / "out0" / "model.safetensors.index.json").exists()


def test_half_precision_stays(dense, tmp_path):
    rounding = (logits(made("llama").half()) - logits(made("llama"))).norm() / logits(made("llama")).norm()
    made("llama").half().save_pretrained(tmp_path / "half")
    fold(plan(**EVERYWHERE, make=rff_mlp), tmp_path / "half", tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    half, whole = (checkpoints.load_model(tmp_path / "out", dtype=dtype) for dtype in ("float16", "float32"))
    assert half.dtype == torch.float16
    difference = (logits(half) - logits(whole)).norm() / logits(whole).norm()
    assert 0 < difference < 10 * rounding


# counts

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make, each", [(affine, WIDTH * (WIDTH + 1)),
                                        (rff_mlp, 6 * (WIDTH + 1) + 5 * (2 * 6 + 1) + WIDTH * (5 + 1))])
def test_counts_are_dense_less_layers_plus_modules(dense, tmp_path, family, make, each):
    facts = fold(plan(blocks=[(3, 5), (5, 7)], dropped=[8], make=make), dense / family, tmp_path / "out")
    counted = checkpoints.facts(made(family), source="", sha256="")
    removed = sum(counted.params_per_layer[layer] for layer in (3, 4, 5, 6, 8))
    assert facts.params_before == counted.params_total and facts.params_added == 2 * each
    assert facts.params_after == counted.params_total - removed + 2 * each
    assert facts.params_removed == 1 - facts.params_after / facts.params_before
    assert (facts.layers_before, facts.layers_removed, facts.blocks) == (10, 5, [(3, 5), (5, 7)])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == facts.params_after


# away from kdp

ALONE = '''
import sys
from pathlib import Path

sys.modules["kdp_core"] = None  # any import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

root, found = Path(sys.argv[1]), {}
ids = torch.arange(2, 26).view(2, 12)
stands = {path: (path / "modeling_kdp.py").exists() for path in sorted(root.iterdir()) if path.is_dir()}
for folder in (path for path in stands if stands[path]):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit(f"{folder} was loaded without trust")
for folder in stands:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=stands[folder]).eval()
    with torch.no_grad():
        found[folder.name] = model(ids).logits.contiguous()
        found[folder.name + "-tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                                                        min_new_tokens=4, do_sample=False)
    if stands[folder]:
        model.save_pretrained(folder / "again")
        files = [(where / "modeling_kdp.py").read_bytes() for where in (folder, folder / "again")]
        assert files[0] == files[1], f"{folder} is saved with another file"
assert not any(name.startswith("kdp_core.") for name in sys.modules)
save_file(found, root / "found.safetensors")
'''


def test_checkpoints_load_without_kdp(dense, tmp_path):
    """In a fresh process: plain ones as they are, those with stand-ins by the code they carry and with trust only."""
    expected, root = {}, tmp_path / "checkpoints"
    # the fresh process multiplies matrices by the library that PyTorch chooses
    torch.set_float32_matmul_precision("highest")
    for family in FAMILIES:
        for name, given in (("plain", plan(dropped=[2, 3])), ("stand_ins", plan(**EVERYWHERE, make=rff_mlp)),
                            *([] if family == "gemma3_text" else [("sliced", sliced(family))])):
            _, model = folded(given, dense / family, root / f"{family}_{name}")
            expected[f"{family}_{name}"] = logits(model)
            expected[f"{family}_{name}-tokens"] = model.generate(
                IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", ALONE, str(root)], env=environment, cwd=tmp_path, text=True,
                         stdin=subprocess.DEVNULL, capture_output=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = load_file(root / "found.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# layers without attention or MLP

PARTS = Plan("m", [(0, "attention"), (2, "whole"), (3, "mlp"), (5, "attention"), (9, "mlp")], [], {})
ADDED = {"gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"), "opt": ("self_attn", "fc2")}
"""What each family adds to the state: of the attention, of the MLP."""


@torch.no_grad()
def without_parts(model, family, ids_ST):
    """Logits of the whole model whose dropped parts add zeros, and whose dropped layers return what they read."""
    names = dict(zip(("attention", "mlp"), ADDED.get(family, ("self_attn", "mlp")), strict=True))

    def silent(_, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    layers, hooks = decoder_layers(model), []
    for layer, part in PARTS.drop:
        if part == "whole":
            hooks.append(layers[layer].register_forward_hook(lambda _, args, kwargs, output: args[0],
                                                             with_kwargs=True))
        else:
            hooks.append(layers[layer].get_submodule(names[part]).register_forward_hook(silent))
    found = model(ids_ST, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_parts_add_nothing_and_their_weights_are_gone(dense, tmp_path, family):
    facts, model = fold(PARTS, dense / family, tmp_path / "out"), checkpoints.load_model(dense / family)
    pruned = checkpoints.load_model(tmp_path / "out")
    ids_ST = torch.arange(2, 42).view(2, 20)  # longer than the sliding windows
    torch.testing.assert_close(pruned(ids_ST).logits, without_parts(model, family, ids_ST), atol=1e-5, rtol=1e-5)
    parts = family_of(family).parts
    gone = sum(count_params(decoder_layers(model)[layer].get_submodule(name))
               for layer, part in PARTS.drop if part != "whole" for name in (*parts[part].beside, parts[part].module))
    assert facts.params_before - facts.params_after == gone + count_params(decoder_layers(model)[2])
    assert facts.parts == [drop for drop in PARTS.drop if drop[1] != "whole"] and facts.blocks == [(2, 3)]
    assert facts.layers_removed == 1 and facts.params_zeroed == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_without_attention_generate_alike_with_cache_and_save_again(dense, tmp_path, family):
    """The first layer has none: its cache is asked for the length of the text."""
    fold(PARTS, dense / family, tmp_path / "out")
    model = checkpoints.load_model(tmp_path / "out")
    runs = [model.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=8, min_new_tokens=8,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(checkpoints.load_model(tmp_path / "again")(IDS_ST).logits, model(IDS_ST).logits)


def test_parts_and_stand_ins_in_one_model(dense, tmp_path):
    both = plan(blocks=[(4, 6)])
    fold(both._replace(drop=[(1, "mlp"), *both.drop, (7, "attention")]), dense / "llama", tmp_path / "out")
    config = checkpoints.load_model(tmp_path / "out").config
    assert config.dropped_parts == {"attention": [5], "mlp": [1]} and config.stand_ins[0]["layer"] == 4


def test_weights_set_to_zero_count_as_removed(dense, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(dense / "llama" / "model.safetensors")[name].clone()
    tensor[:, ::2] = 0
    facts = fold(Plan("m", [], [], {name: tensor}, sparse=True), dense / "llama", tmp_path / "out")
    assert facts.params_zeroed == tensor.numel() // 2 and facts.params_after == facts.params_before
    assert facts.params_removed == pytest.approx(tensor.numel() / 2 / facts.params_before)
    # a merge of quantised weights holds zeros by chance; they remove nothing
    facts = fold(Plan("m", [], [], {name: tensor}), dense / "llama", tmp_path / "merged")
    assert facts.params_zeroed == 0 and facts.params_removed == 0


# other shapes

SLICED = {"sliced": {"attention": [16] * LAYERS, "mlp": [24] * LAYERS, "final": WIDTH}, "tie_word_embeddings": False}


def sliced(family):
    """A plan of reduced width with random tensors: all but what such a model takes over from the dense one."""
    config_class, model_class = FOLDED[family]
    config = {**made(family).config.to_dict(), "model_type": config_class.model_type, **SLICED}
    with torch.device("meta"):
        state, kept = model_class(config_class.from_dict(config)).state_dict(), made(family).state_dict()
    tensors = {name: 0.2 * randn(*meta.shape, seed=seed) for seed, (name, meta) in enumerate(state.items())
               if name == "lm_head.weight" or name not in kept or kept[name].shape != meta.shape}
    return Plan("m", [], [], tensors, shape=SLICED)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "qwen3"])
def test_a_plan_with_shapes_writes_the_tensors_of_its_model_and_no_other(dense, tmp_path, family):
    the_plan = sliced(family)
    facts, model = folded(the_plan, dense / family, tmp_path / "out")
    written, kept = load_file(tmp_path / "out" / "model.safetensors"), made(family).state_dict()
    assert set(written) == set(model.state_dict()) and model.config.sliced == SLICED["sliced"]
    for name, tensor in written.items():
        assert torch.equal(tensor, the_plan.tensors.get(name, kept.get(name))), name
    assert facts.params_after == sum(tensor.numel() for tensor in written.values()) == model.num_parameters()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not any("norm" in name for name in written if family != "qwen3")


@pytest.mark.parametrize("change, message", [
    ({"lm_head.weight": None}, r"plan of m lacks tensors of its model: lm_head\.weight$"),
    ({"model.layers.3.mlp_shortcut.weight": None}, r"lacks tensors of its model: model\.layers\.3\.mlp_shortcut"),
    ({"model.layers.3.mlp.up_proj.weight": None},
     r"gives model\.layers\.3\.mlp\.up_proj\.weight the shape \[64, 32\]; its model has \[64, 24\]"),
    ({"model.norm.gain": torch.ones(WIDTH)}, r"holds tensors that its model lacks: model\.norm\.gain"),
    ({"lm_head.weight": torch.zeros(384, 16)},
     r"gives lm_head\.weight the shape \[384, 16\]; its model has \[384, 32\]"),
])
def test_tensors_that_do_not_fit_the_shapes_of_a_plan_are_refused(dense, tmp_path, change, message):
    the_plan = sliced("llama")
    tensors = {name: tensor for name, tensor in {**the_plan.tensors, **change}.items() if tensor is not None}
    with pytest.raises(FoldError, match=message):
        fold(the_plan._replace(tensors=tensors), dense / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# refusals

@pytest.mark.parametrize("the_plan, message", [
    (Plan("m", [(2, "norm")], [], {}), "plan of m removes 'norm' of a layer; a part is whole, attention or mlp"),
    (Plan("m", [(2, "attention"), (2, "mlp")], [], {}), r"layers \[2, 2\].*both parts of a layer: drop it whole"),
    (Plan("m", [(3, "whole"), (4, "whole")], [affine((3, 5))], {}, shape={"widths": []}),
     "plan of m changes widths and also has stand-ins"),
    (Plan("m", [(10, "whole")], [], {}), r"plan of m drops layers \[10\]; the model has layers 0 to 9, each once"),
    (Plan("m", [(-1, "whole")], [], {}), r"layers \[-1\]; the model has layers 0 to 9"),
    (Plan("m", [(2, "whole"), (2, "whole")], [], {}), r"layers \[2, 2\].*each once"),
    (Plan("m", [(k, "whole") for k in range(10)], [], {}), "drops all 10 layers; at least one must stay"),
    (Plan("m", [(3, "whole")], [affine((3, 5))], {}),
     "stand-in of block 3-5: the plan does not drop all of its layers"),
    (Plan("m", [(3, "whole"), (4, "whole"), (5, "whole")], [affine((3, 5)), affine((4, 6))], {}),
     "stand-ins of blocks 3-5 and 4-6 have layers in common"),
    (plan(dropped=[2], tensors={"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}),
     r"replaces tensors that the pruned model lacks: model\.layers\.2\.mlp"),
    (plan(dropped=[2], tensors={"model.norm.weight": torch.full((WIDTH,), float("nan"))}),
     r"holds values that are not finite in model\.norm\.weight"),
    (plan(dropped=[2], tensors={"model.norm.weight": torch.ones(WIDTH + 1)}),
     r"replaces model\.norm\.weight, of shape \[32\], by one of shape \[33\]"),
])
def test_plans_that_do_not_fit_are_refused_and_leave_nothing(dense, tmp_path, the_plan, message):
    with pytest.raises(FoldError, match=message):
        fold(the_plan, dense / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_a_record_is_named(tmp_path):
    (tmp_path / "dense").mkdir()
    GPTJConfig(num_hidden_layers=10).save_pretrained(tmp_path / "dense")
    with pytest.raises(FoldError, match="method made_up cannot fold a gptj model; choose a model of llama, mistral"):
        fold(plan(blocks=[(3, 5)]), tmp_path / "dense", tmp_path / "out")
