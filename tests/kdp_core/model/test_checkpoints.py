"""Dense checkpoints: conversion keeps the function, faults are named, counts are the paper's."""
import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, OPTConfig, T5Config

from kdp_core.model import checkpoints, folded
from kdp_core.model.assets import sha256_of
from kdp_core.model.checkpoints import ModelError, convert, facts, load_model, load_tokenizer, on_meta
from kdp_core.model.sizes import count_macs, count_params
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


def write_gguf(path, model, tokenizer, pre="gpt-2"):
    """The pico Llama as llama.cpp would write it: q and k rows interleaved for its form of the rotary embedding."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("/home/someone/model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_the_same_model(tmp_path):
    model, tokenizer = pico.model("llama", layers=3), pico.tokenizer()
    path = write_gguf(tmp_path / "pico.gguf", model, tokenizer)
    found = convert(path, tmp_path / "dense", dtype="float32", source="/data/secret/pico.gguf")
    back = load_model(tmp_path / "dense")
    assert torch.allclose(logits(back), logits(model), atol=1e-5)
    assert (found.source, found.sha256) == ("pico.gguf", sha256_of(path))
    assert back.config.eos_token_id == 1 and back.generation_config.eos_token_id == 1
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config) and config["tie_word_embeddings"]
    text = "The council said rain  12 3\n\nwould"
    kept = load_tokenizer(tmp_path / "dense")
    assert len(kept) == len(tokenizer) == 384 and kept.eos_token == "</s>"
    assert kept(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_gguf_of_smollm_splits_digits(tmp_path):
    """Its published pre-tokenizer splits digits first, so a space before a digit stands alone."""
    path = write_gguf(tmp_path / "pico.gguf", pico.model("llama", layers=1), pico.tokenizer(), pre="smollm")
    convert(path, tmp_path / "dense", dtype="float32", source="pico")
    backend = load_tokenizer(tmp_path / "dense").backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in  20")] == ["in", "ĠĠ", "2", "0"]


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
    with pytest.raises(ModelError, match=f"NaN weights.*{name}"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")
    assert not (tmp_path / "dense").exists()


def test_missing_weights_are_not_made_up(checkpoint, tmp_path):
    edit_weights(checkpoint, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first model\.layers\.3\.mlp\.up_proj\.weight"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_vocabulary_mismatch(checkpoint, tmp_path):
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match=r"vocabulary mismatch.*386 entries.*384 embedding"):
        convert(checkpoint, tmp_path / "dense", dtype="float32", source="x")


def test_pickles_are_refused(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors.*convert to safetensors"):
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
    (AutoConfig.for_model("gpt2"), "family 'gpt2' is not supported; choose one of llama"),
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
