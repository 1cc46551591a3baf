"""Dense checkpoints: conversion keeps the function, faults are named, counts are the paper's."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, OPTConfig, T5Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kdp_core.base import texts
from kdp_core.base.records import Plan
from kdp_core.model import checkpoints, folded
from kdp_core.model.assets import sha256_of
from kdp_core.model.checkpoints import ModelError, convert, facts, load_model, load_tokenizer, on_meta
from kdp_core.model.sizes import count_macs, count_params, params_of
from kdp_core.prune.fold import fold
from kdp_core.study import planner
from tests import pico

IDS_ST = torch.arange(2, 26).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS_ST.to(model.device)).logits


def edit(folder, **values):
    """Change entries of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def checkpoint(llama_folder, tmp_path):
    """A pico Llama checkpoint to damage."""
    return shutil.copytree(llama_folder, tmp_path / "checkpoint")


def test_conversion_keeps_the_function_of_every_family(pico_folder, tmp_path):
    found = convert(pico_folder, tmp_path / "dense", dtype="float32", source="hf:org/name@abc")
    model, before = load_model(tmp_path / "dense"), load_model(pico_folder)
    assert torch.equal(logits(model), logits(before)) and not model.training
    assert found == facts(model, source="hf:org/name@abc", sha256=sha256_of(pico_folder))
    assert (found.layers, found.width, found.vocabulary) == (10, 32, 384)
    assert load_tokenizer(tmp_path / "dense")("rain on the coast").input_ids == \
        pico.tokenizer()("rain on the coast").input_ids
    written = "".join(p.read_text() for p in (tmp_path / "dense").glob("*.json"))
    assert str(tmp_path) not in written and str(pico_folder) not in written


def test_published_sampling_options_do_not_stop_the_saving(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}))
    convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    kept = json.loads((tmp_path / "dense/generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"], kept["eos_token_id"], kept["do_sample"]) == (0.9, 0.6, 1, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint, tmp_path, value):
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda weights: weights[name][5].fill_(value))
    with pytest.raises(ModelError, match=f"NaN or infinite weights.*{name}"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    assert not (tmp_path / "dense").exists()


def test_missing_weights_are_not_made_up(checkpoint, tmp_path):
    edit_weights(checkpoint, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first model\.layers\.3\.mlp\.up_proj\.weight"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_tokenizer_entries_beyond_the_embedding_are_warned_of(checkpoint, tmp_path, caplog):
    """Gemma 3 1B and LLaMA-2 with a padding token are published so; only an id that a text gives is an error."""
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(checkpoint)
    convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    assert "386 entries and the model 384 embedding rows" in caplog.text and "such as <one>" in caplog.text
    kept = load_tokenizer(tmp_path / "dense")
    assert len(kept) == 386
    ids_ST = texts.windows(kept, ["rain on the coast"], length=4, vocabulary=384)
    assert int(ids_ST.max()) < 384
    with pytest.raises(texts.TextError, match="gives id 385"):
        texts.windows(kept, ["rain on the <two> coast"], length=1, vocabulary=384)


def untie(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.5


ROTARY = {
    "linear": {"factor": 4.0}, "dynamic": {"factor": 4.0}, "yarn": {"factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 5.0], "factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    "proportional": {"partial_rotary_factor": 0.5},
}
"""Every type of scaling of the rotation that transformers knows."""


@pytest.mark.parametrize("kind", ROTARY)
def test_the_scaling_of_the_rotation_is_kept_through_conversion_and_folding(tmp_path, kind):
    """At 200 tokens of a model of 64, where each type changes the logits; `dynamic` at such lengths only."""
    assert set(ROTARY) == set(ROPE_INIT_FUNCTIONS)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **ROTARY[kind]}
    plain = pico.model("llama", layers=3)
    config = LlamaConfig.from_dict({**plain.config.to_dict(), "max_position_embeddings": 64, "rope_parameters": rope})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict(plain.state_dict())
    ids_ST = torch.randint(384, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, unscaled = model(ids_ST).logits, plain(ids_ST).logits
        assert (expected - unscaled).abs().max() > 0.05
        model.save_pretrained(tmp_path / "source")
        pico.tokenizer().save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "dense", dtype="float32", source="x")
        fold(Plan("m", [(1, "whole")], [], {}), tmp_path / "dense", tmp_path / "pruned")
        del model.model.layers[1]
        for folder, wanted in (("dense", expected), ("pruned", model(ids_ST, use_cache=False).logits)):
            assert torch.allclose(load_model(tmp_path / folder)(ids_ST, use_cache=False).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("family, adds, expected", [("gemma3_text", False, [0]), ("gemma3_text", True, [0]),
                                                    ("llama", False, []), ("llama", True, [0])])
def test_the_tokenizer_adds_the_first_token_that_the_family_needs(tmp_path, family, adds, expected):
    """lm-eval and other tools ask the tokenizer; of the others it stays as it is."""
    folder, own = pico.save(tmp_path / "source", family, layers=1), pico.tokenizer()
    own.add_bos_token = adds
    own.save_pretrained(folder)
    convert(folder, tmp_path / "dense", dtype="float32", source="x")
    kept = load_tokenizer(tmp_path / "dense")
    assert kept("rain").input_ids == expected + kept("rain", add_special_tokens=False).input_ids


def test_a_head_of_its_own_under_a_tied_flag(checkpoint, tmp_path):
    """A merge of adapters leaves the flag true (huggingface/transformers#45127)."""
    embedding = 384 * 32
    tied = convert(checkpoint, tmp_path / "tied", dtype="float32", source="x")
    edit_weights(checkpoint, untie)
    assert json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    found = convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model, weights = load_model(tmp_path / "dense"), load_file(checkpoint / "model.safetensors")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    on_disk = sum(tensor.numel() for tensor in load_file(tmp_path / "dense/model.safetensors").values())
    assert found.params_total == tied.params_total + embedding == on_disk


def test_all_who_count_a_model_count_the_same(checkpoint, tmp_path):
    """Facts, fold's count of the dense model, the planner, and the arithmetic that the workflow's estimate uses."""
    edit_weights(checkpoint, untie)
    dense = tmp_path / "dense"
    found = convert(checkpoint, dense, dtype="float32", source="x")
    record = fold(Plan("remove", [(3, "whole"), (4, "whole")], [], {}), dense, tmp_path / "pruned")
    described = json.loads((dense / "config.json").read_text())
    assert {found.params_total, record.params_before, planner.facts_of("x", dense).params_total,
            params_of(described), count_params(load_model(dense))} == {found.params_total}
    assert record.params_removed == pytest.approx(2 * found.params_per_layer[3] / found.params_total)


def pickled(checkpoint, shards=1):
    """The checkpoint's weights as PyTorch wrote them before safetensors."""
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, checkpoint / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-0000{1 + n % shards}-of-0000{shards}.bin" for n, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, checkpoint / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_older_weights_become_safetensors(checkpoint, tmp_path, shards):
    before = logits(load_model(checkpoint))
    pickled(checkpoint, shards)
    convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    assert torch.equal(logits(load_model(tmp_path / "dense")), before)
    assert (tmp_path / "dense/model.safetensors").is_file() and not list((tmp_path / "dense").glob("*.bin"))


class Planted:
    """It touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_but_tensors_is_unpickled(checkpoint, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights | {"more": Planted(tmp_path / "ran")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.*more than tensors.*convert"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "dense").exists()
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the plant works


def test_other_pickles_are_refused(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.pth")
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors or pytorch_model.*convert to safetensors"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_a_missing_tokenizer_is_named(checkpoint, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json .*; copy tokenizer\.json .* into it$"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    (checkpoint / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"vocab\.json and no merges\.txt; copy merges\.txt"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_forms_that_do_not_serve(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    cut = checkpoint / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:2000])
    for path, message in ((tmp_path / "empty", r"no config\.json"), (tmp_path / "absent", "neither a"),
                          (tmp_path / "absent.gguf", "does not exist"), (checkpoint, "cannot load it")):
        with pytest.raises(ModelError, match=message):
            convert(path, tmp_path / "dense", dtype="float32", source="x")


@pytest.mark.parametrize("config, message", [
    (OPTConfig(do_layer_norm_before=False), "do_layer_norm_before.*residual stream"),
    (T5Config(), "encoder-decoder"),
    (AutoConfig.for_model("gptj"), "family 'gptj' is not supported; choose one of llama"),
    (LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
])
def test_architectures_that_do_not_serve(checkpoint, tmp_path, config, message):
    (checkpoint / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with pytest.raises(ModelError, match=message):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_dtypes_and_devices(llama_folder):
    assert load_model(llama_folder, dtype="float16").dtype == torch.float16
    with pytest.raises(ModelError, match="dtype 'int8' is unknown"):
        load_model(llama_folder, dtype="int8")
    assert checkpoints.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, message in (("cuda:99", "CUDA devices"), ("meta", "not here"), ("gpu", "unknown")):
        with pytest.raises(ModelError, match=message):
            load_model(llama_folder, device=name)


@pytest.mark.parametrize("options, params_million, macs_billion", [
    ({}, 6738.4, 845.71),
    (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40), 13015.9, 1645.01),
    (dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8), 8030.3, None),
    (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
          num_key_value_heads=3, tie_word_embeddings=True), 134.515008, None),
], ids=["LLaMA-2-7B", "LLaMA-2-13B", "LLaMA-3-8B", "SmolLM2-135M"])
def test_counts_of_published_models(options, params_million, macs_billion):
    """Multiply-adds for 128 tokens as printed in the KDP paper, Table 10, dense rows."""
    model = on_meta(LlamaConfig(**options))
    found = facts(model, source="", sha256="")
    digits = 6 if params_million < 1000 else 1
    assert round(found.params_total / 1e6, digits) == params_million
    if macs_billion:
        assert round(found.macs_per_token * 128 / 1e9, 2) == macs_billion
    outside = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    assert sum(found.params_per_layer) + outside == found.params_total
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_macs_are_those_of_a_pass(pico_folder):
    """Independent route: widths in and out of every linear layer, as seen during a forward pass."""
    model = load_model(pico_folder)
    done = []

    def measure(layer, args, output):
        done.append(args[0].shape[-1] * output.shape[-1])

    handles = [layer.register_forward_hook(measure) for layer in model.modules() if isinstance(layer, nn.Linear)]
    logits(model)
    for handle in handles:
        handle.remove()
    assert count_macs(model) == sum(done)


def test_folded_checkpoints_load_and_are_counted(llama_folder, tmp_path):
    """One affine stand-in: what it adds to the dense model's counts is known by hand."""
    dense = load_model(llama_folder)
    config_class, model_class = folded.FOLDED["llama"]
    entry = {"layer": 4, "after": False, "kind": "affine", "options": {"width": 32}}
    values = {key: value for key, value in dense.config.to_dict().items() if key != "model_type"}
    model_class(config_class(**values, stand_ins=[entry])).save_pretrained(tmp_path / "folded")
    pruned = load_model(tmp_path / "folded")
    assert type(pruned) is model_class and not pruned.training
    assert count_macs(pruned) - count_macs(dense) == 32 * 32
    assert count_params(pruned) - count_params(dense) == 32 * 32 + 32


def test_modules_that_report_their_own_macs():
    class Stand(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.macs_per_token = nn.Linear(7, 7), 1000

    assert count_macs(nn.Sequential(nn.Linear(3, 5), Stand(), nn.Sequential(nn.Linear(5, 2, bias=False)))) == 1025
