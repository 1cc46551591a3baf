"""GGUF files: the converted model gives the logits of the safetensors original, or the file is refused in one line."""
import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from kdp_core.model import gguf_file
from kdp_core.model.assets import sha256_of
from kdp_core.model.checkpoints import ModelError, convert, load_model, load_tokenizer
from tests import pico
from tests.kdp_core.model.gguf_writer import write_gguf

IDS_ST = torch.randint(2, 384, (2, 200), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS_ST).logits


def with_config(model, **entries):
    """The model of the same weights under a configuration with other entries."""
    config = type(model.config).from_dict({**model.config.to_dict(), **entries})
    made = AutoModelForCausalLM.from_config(config).float().eval()
    made.load_state_dict(model.state_dict())
    return made


def assert_same_model(model, tmp_path, architecture="llama", **written):
    """Convert the file of a model and compare logits at 200 positions."""
    path = write_gguf(tmp_path / "pico.gguf", model, pico.tokenizer(), architecture=architecture, **written)
    convert(path, tmp_path / "dense", dtype="float32", source="x")
    back = load_model(tmp_path / "dense")
    assert torch.allclose(logits(back), logits(model), atol=2e-4)
    return back


def refused(tmp_path, match, **written):
    model = written.pop("model", None) or pico.model("llama", layers=2)
    path = write_gguf(tmp_path / "pico.gguf", model, pico.tokenizer(), **written)
    with pytest.raises(ModelError, match=match) as error:
        convert(path, tmp_path / "dense", dtype="float32", source="x")
    assert "\n" not in str(error.value) and not (tmp_path / "dense").exists()


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


GEMMA_2 = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 8,
           "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}
READ = {"qwen2": ("qwen2", {}), "gemma2": ("gemma2", GEMMA_2), "gpt2": ("gpt2", {}),
        "phi3": ("phi3", {"rope.dimension_count": 8, "attention.sliding_window": 8})}
"""Families that no other test of this file converts -> llama.cpp's name of the architecture, and its own fields."""


@pytest.mark.parametrize("family", READ)
def test_every_family_that_is_read_becomes_the_same_model(tmp_path, family):
    architecture, fields = READ[family]
    assert_same_model(pico.lively(pico.model(family, layers=3)), tmp_path, architecture,
                      fields={f"{architecture}.{name}": value for name, value in fields.items()})


@pytest.mark.parametrize("architecture", ["olmo2", "smollm3", "gptneox", "never-heard-of"])
def test_architectures_that_are_not_read_are_named(architecture):
    """transformers reads no GGUF files of three families; OPT has none."""
    header = gguf_file.Header(Path("x.gguf"), architecture, {}, {}, frozenset(), 384)
    with pytest.raises(ModelError, match=f"architecture '{architecture}', which is not read from GGUF; use the orig"):
        gguf_file.check(header)


def test_a_rotation_of_a_model_that_has_none_is_refused(tmp_path):
    refused(tmp_path, r"gpt2\.rope\.freq_base is 10000", model=pico.model("gpt2", layers=1), architecture="gpt2",
            fields={"gpt2.rope.freq_base": 10000.0})


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    made = []

    class Counted(gguf.GGUFReader):
        def __init__(self, *given):
            made.append(given)
            super().__init__(*given)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    path = write_gguf(tmp_path / "pico.gguf", pico.model("llama"), pico.tokenizer())
    convert(path, tmp_path / "dense", dtype="float32", source="x")
    assert len(made) == 1 and gguf.GGUFReader is Counted


def test_gguf_of_smollm_splits_digits(tmp_path):
    """Its published pre-tokenizer splits digits first, so a space before a digit stands alone."""
    path = write_gguf(tmp_path / "pico.gguf", pico.model("llama", layers=1), pico.tokenizer(), pre="smollm")
    convert(path, tmp_path / "dense", dtype="float32", source="pico")
    backend = load_tokenizer(tmp_path / "dense").backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in  20")] == ["in", "ĠĠ", "2", "0"]


@pytest.mark.parametrize("pre, says, expected", [("gpt-2", True, [0]), ("gpt-2", False, []), ("gpt-2", None, []),
                                                 ("llama-bpe", None, [0]), ("llama-bpe", False, [])])
def test_a_text_begins_as_the_file_says_or_as_llama_cpp_does(tmp_path, pre, says, expected):
    """Older files of Llama 3 hold no add_bos_token; llama.cpp goes by the name of the pre-tokenizer."""
    fields = {} if says is None else {"tokenizer.ggml.add_bos_token": says}
    path = write_gguf(tmp_path / "pico.gguf", pico.model("llama", layers=1), pico.tokenizer(), pre=pre, fields=fields)
    convert(path, tmp_path / "dense", dtype="float32", source="x")
    kept = load_tokenizer(tmp_path / "dense")
    assert kept("rain").input_ids == expected + kept("rain", add_special_tokens=False).input_ids


def meta_factors(rope, head_dim=8):
    """The divisors that convert_hf_to_gguf.py writes for Llama 3.1, frequency by frequency."""
    found = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        if wave < old / high:
            found.append(1)
        elif wave > old / low:
            found.append(rope["factor"])
        else:
            smooth = (old / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(found)}


LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
OTHER = LLAMA_31 | {"rope_theta": 10000.0, "factor": 5.0, "high_freq_factor": 2.0,
                    "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 5.0], "attention_factor": 1.19}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SCALED = {
    "linear": ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
               {"scaling.type": "linear", "scaling.factor": 4.0}, {}),
    "linear of older files": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, {"scale_linear": 2.0}, {}),
    "none": ({"rope_type": "default", "rope_theta": 10000.0}, {"scaling.type": "none", "scaling.factor": 4.0}, {}),
    "yarn": (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64}, {}),
    "yarn with all options": (
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.8 * (0.1 * math.log(4) + 1)},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64,
         "scaling.yarn_beta_fast": 16.0, "scaling.yarn_beta_slow": 2.0, "scaling.attn_factor": 0.8,
         "scaling.yarn_ext_factor": 1.0}, {}),
    "llama3 as published": (LLAMA_31, {}, meta_factors(LLAMA_31)),
    "llama3 with other numbers": (OTHER, {}, meta_factors(OTHER)),
    "longrope": (LONG, {"scaling.type": "longrope", "scaling.original_context_length": 64, "scaling.attn_factor": 1.19},
                 {"rope_factors_short.weight": np.array(LONG["short_factor"]),
                  "rope_factors_long.weight": np.array(LONG["long_factor"])}),
}
"""rope_parameters of the original -> the fields below `rope.` and the tensors that llama.cpp writes for them."""
NO_FORM = {"dynamic", "proportional"}
"""Types of transformers that GGUF has no value for. A file that names one anyway is refused.

`dynamic` changes the base frequency with the length of each sequence, which llama.cpp does not compute
(ggml-org/llama.cpp#8361). `proportional` is Gemma 4's, and its files hold the frequencies as factors of rope_freqs.
"""


@pytest.mark.parametrize("name", SCALED)
def test_rotary_scaling_is_carried_over(tmp_path, name):
    rope, fields, tensors = SCALED[name]
    plain = pico.model("llama", layers=3)
    model = with_config(plain, rope_parameters=rope)
    if name != "none":
        # the scaling matters at these lengths, so that its loss would be seen
        assert (logits(model) - logits(plain)).abs().max() > 0.05
    back = assert_same_model(model, tmp_path, tensors=tensors,
                             fields={f"llama.rope.{key}": value for key, value in fields.items()})
    assert (back.config.rope_parameters["rope_type"] == rope["rope_type"]) != (name == "llama3 with other numbers")


def test_every_scaling_type_of_transformers_is_tried():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) - NO_FORM == {rope["rope_type"] for rope, _, _ in SCALED.values()} - {"default"}
    # llama3 has no value either: its factors lie in a tensor
    assert {kind.value for kind in gguf.RopeScalingType} == {"none", "linear", "yarn", "longrope"}


@pytest.mark.parametrize("kind", sorted(NO_FORM))
def test_scaling_types_without_a_form_in_gguf_are_refused(tmp_path, kind):
    refused(tmp_path, rf"llama\.rope\.scaling\.type is {kind}, which changes the model and cannot be carried over",
            fields={"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 2.0})


def test_gemma_keeps_windows_caps_scale_and_both_frequencies(tmp_path):
    plain = pico.model("gemma3_text", layers=4)
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0}}
    kinds = ["sliding_attention", "full_attention"] * 2
    model = with_config(plain, rope_parameters=rope, layer_types=kinds, sliding_window=16, query_pre_attn_scalar=8,
                        final_logit_softcapping=7.0, attn_logit_softcapping=3.0)
    assert (logits(model) - logits(plain)).abs().max() > 0.05
    fields = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 16,
              "attention.sliding_window_pattern": 2, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
              "rope.freq_base_swa": 3000.0, "final_logit_softcapping": 7.0, "attn_logit_softcapping": 3.0}
    assert_same_model(model, tmp_path, "gemma3", fields={f"gemma3.{name}": value for name, value in fields.items()})


def test_a_window_may_be_given_layer_by_layer_and_the_scale_of_queries_too(tmp_path):
    slides = [True, True, False]
    model = with_config(pico.model("gemma3_text", layers=3), sliding_window=16, query_pre_attn_scalar=25,
                        final_logit_softcapping=None,
                        layer_types=["sliding_attention" if slide else "full_attention" for slide in slides])
    fields = {"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 16,
              "attention.sliding_window_pattern": slides, "attention.scale": 0.2}
    back = assert_same_model(model, tmp_path, "gemma3",
                             fields={f"gemma3.{name}": value for name, value in fields.items()})
    assert back.config.query_pre_attn_scalar == 25


def test_the_largest_gemma_scales_queries_by_its_width(tmp_path):
    """Its 62 layers are all that the file says of it."""
    path = write_gguf(tmp_path / "pico.gguf", pico.model("gemma3_text", layers=1), pico.tokenizer(),
                      architecture="gemma3")
    for layers, expected in ((62, 5376 // 32), (48, 128)):
        config = Gemma3TextConfig(num_hidden_layers=layers, hidden_size=5376, num_attention_heads=32, head_dim=128)
        gguf_file.complete(gguf_file.read(path), config)
        assert config.query_pre_attn_scalar == expected


def test_heads_of_another_width_than_the_default(tmp_path):
    """transformers drops `attention.key_length` of this family and takes 128."""
    model = pico.model("qwen3", layers=2)
    back = assert_same_model(model, tmp_path, "qwen3",
                             fields={"qwen3.attention.key_length": 8, "qwen3.attention.value_length": 8})
    assert back.config.head_dim == 8


def test_biases_are_kept(tmp_path):
    model = pico.lively(with_biases())
    back = assert_same_model(model, tmp_path)
    assert back.config.attention_bias


def with_biases():
    torch.manual_seed(0)
    plain = pico.model("llama", layers=2)
    config = type(plain.config).from_dict({**plain.config.to_dict(), "attention_bias": True})
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("fields, match", [
    ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "mixture of 8 experts"),
    ({"llama.attention.max_alibi_bias": 8.0}, r"llama\.attention\.max_alibi_bias is 8\.0, which changes the model"),
    ({"llama.attention.sliding_window": 16}, r"sliding_window is 16"),
    ({"llama.attention.scale": 0.5}, r"attention\.scale is 0\.5"),
    ({"llama.attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50"),
    ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type is longrope"),
    ({"llama.rope.scaling.alpha": 1000.0}, r"rope\.scaling\.alpha is 1000"),
    ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count is 4"),
    ({"llama.rope.freq_base_swa": 10.0}, r"freq_base_swa is 10"),
    ({"llama.attention.value_length": 16}, r"value_length is 16"),
    ({"llama.logit_scale": 0.5}, r"logit_scale is 0\.5"),
    ({"llama.never_heard_of": 1}, r"never_heard_of is 1, which changes the model.*original safetensors checkpoint"),
    ({"whole.new.section": 1}, r"whole\.new\.section is 1"),
    ({"split.count": 3, "split.no": 0}, "one of 3 files of a split model"),
    ({"general.type": "adapter"}, "holds a adapter, not a model"),
])
def test_what_cannot_be_carried_over_is_refused(tmp_path, fields, match):
    refused(tmp_path, match, fields=fields)


def test_sizes_layer_by_layer_are_refused():
    """llama-quantize --prune-layers leaves the lists of a pruned file as long as they were (llama.cpp#27976)."""
    header = gguf_file.Header(Path("pruned.gguf"), "llama", {
        "tokenizer.ggml.model": "gpt2", "llama.block_count": 2, "llama.attention.head_count_kv": [2, 2, 2]}, {},
        frozenset(), 384)
    with pytest.raises(ModelError, match=r"head_count_kv is \[2, 2, 2\]"):
        gguf_file.check(header)


def test_fields_that_change_nothing_are_taken(tmp_path):
    model = pico.model("llama", layers=2)
    assert_same_model(model, tmp_path, fields={
        "llama.expert_count": 0, "llama.logit_scale": 1.0, "llama.rope.scaling.finetuned": True,
        "llama.attention.causal": True, "llama.attention.sliding_window": 4096, "general.quantized_by": "someone",
        "quantize.imatrix.file": "x", "llama.tensor_data_layout": "Meta AI original pth"})


def test_tensors_without_a_place_are_refused(tmp_path):
    refused(tmp_path, "1 tensors .* no place for, the first blk.0.attn_sinks.weight",
            tensors={"blk.0.attn_sinks.weight": np.ones(4)})


def test_a_way_to_split_text_that_is_not_known(tmp_path):
    refused(tmp_path, r"tokenizer\.ggml\.pre is 'poro-chat'", pre="poro-chat")


def test_a_file_without_a_tokenizer_and_a_damaged_one(tmp_path):
    path = write_gguf(tmp_path / "pico.gguf", pico.model("llama", layers=1), pico.tokenizer())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"tokenizer.ggml.model", b"tokenizer.else.model"))
    with pytest.raises(ModelError, match=r"holds no tokenizer \(tokenizer\.ggml\.model"):
        convert(path, tmp_path / "dense", dtype="float32", source="x")
    path.write_bytes(whole[:3000])
    with pytest.raises(ModelError, match="no complete GGUF file"):
        convert(path, tmp_path / "dense", dtype="float32", source="x")
