"""GGUF files are read only if every metadata field that changes the forward pass is known; other files are refused.

transformers reads sizes, norms and the base frequency of a GGUF file, and ignores fields that it does not know. This
module therefore compares the fields of the file with three tables. transformers or this module reads the fields in
FIELDS. Fields in IDLE do not change the forward pass. Fields in NEUTRAL may only have a value with which they do not
change the forward pass. A file with any other field is refused. The meaning of the fields is that of llama.cpp
(gguf-py/gguf/constants.py, src/llama-model.cpp; rotary scaling: rope_yarn in ggml-cpu/ops.cpp).
"""
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np

from kdp_core.model.families import family_of
from kdp_core.model.intake import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIELDS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window",
    "attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping", "rope.dimension_count",
    "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor",
}
"""Fields after the prefix with the architecture's name, such as `llama.`; transformers or this module reads these
fields."""
IDLE = {"tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}
"""Fields that only describe the file and do not change the forward pass."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,),
    "embedding_scale": (0.0, 1.0), "expert_count": (0,), "expert_used_count": (0,), "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,), "residual_scale": (0.0, 1.0), "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
"""Fields that no supported family uses -> the values with which they do not change the forward pass."""
PREFIXES = ("general.", "tokenizer.", "quantize.", "imatrix.", "split.", "GGUF.")
"""Prefixes of fields that do not describe the architecture: names, licences, the tokenizer, and how the file was
made."""
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PUBLISHED_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Parameters of the rotary scaling that Meta published; they are equal for every Llama from 3.1 on. A GGUF file does
not contain these parameters, but only the divisors that are computed from them."""
WIDE_LAYERS = (46, 62)
"""Numbers of layers of the 27B models of Gemma 2 and Gemma 3. Only these 27B models scale queries by hidden_size /
heads. A GGUF file does not state this scale, so llama.cpp, too, recognises the 27B models by their number of layers."""
BYTE_LEVEL = {
    "default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "mpt", "olmo", "jais", "trillion", "granite-docling",
    "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe", "dbrx", "tekken", "qwen2", "deepseek-r1-qwen",
    "gpt-4o", "llama4", "smollm",
}
"""Pre-tokenizers of byte-level vocabularies whose texts are split here in the same way as in llama.cpp, by transformers
or by `checkpoints`."""


TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token")
"""Fields of the tokenizer that this module reads."""
FIRST_TOKEN = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"}
"""Pre-tokenizers of byte-level vocabularies. If a model has one of these pre-tokenizers, its texts begin with the token
for the beginning of a text, unless the file states otherwise."""


class Header(NamedTuple):
    """The metadata of a GGUF file, without its weights."""
    path: Path
    architecture: str
    fields: Mapping[str, Any]
    """All metadata by full name, without the arrays of the tokenizer."""
    tensors: Mapping[str, np.ndarray]
    """Rotary factors, by name."""
    names: frozenset[str]
    """Names of all tensors."""
    vocabulary: int
    """Number of entries of the tokenizer."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an architecture field, or `default` if the file lacks the field."""
        return self.fields.get(f"{self.architecture}.{name}", default)


def read(path: Path) -> Header:
    """The header of a GGUF file. Raises ModelError for a damaged file."""
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path} is no complete GGUF file ({error}); get it again") from error
    # the arrays of a tokenizer contain hundreds of thousands of entries, and are not needed here
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    fields |= {name: reader.fields[name].contents() for name in TOKENIZER if name in reader.fields}
    rope = {tensor.name: np.array(tensor.data, dtype=np.float64).reshape(-1) for tensor in reader.tensors
            if tensor.name in ROPE_TENSORS}
    names = frozenset(tensor.name for tensor in reader.tensors)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return Header(path, str(fields.get("general.architecture", "")), fields, rope, names,
                  0 if tokens is None else len(tokens.data))


def check(header: Header) -> None:
    """Raise ModelError if a file is not a complete model, or if a checkpoint cannot represent one of the file's
    fields."""
    _check_kinds(header)
    if header.fields.get("general.type", "model") != "model":
        raise ModelError(f"{header.path} holds a {header.fields['general.type']}, not a model; name the model's file")
    if header.fields.get("split.count", 1) > 1:
        raise ModelError(f"{header.path} is one of {header.fields['split.count']} files of a split model; join them "
                         "with llama-gguf-split --merge")
    _check_architecture(header)
    _check_tokenizer(header)
    if (experts := header.get("expert_count", 0)) > 1:
        raise ModelError(f"{header.path} is a mixture of {experts} experts, which is not supported; choose a dense "
                         "model")
    for name, value in header.fields.items():
        own = name.removeprefix(f"{header.architecture}.")
        if own == name:
            if not name.startswith(PREFIXES):
                raise _unknown(header, name, value)
        elif own in NEUTRAL:
            if value not in NEUTRAL[own]:
                raise _unknown(header, name, value)
        elif own not in FIELDS | IDLE or (isinstance(value, list) and own != "attention.sliding_window_pattern"):
            raise _unknown(header, name, value)


def _check_kinds(header: Header) -> None:
    """Raise ModelError if a field that this module reads as a number is not a number."""
    own = {*FIELDS, *NEUTRAL} - {"rope.scaling.type"}
    numbers = {"split.count"} | {f"{header.architecture}.{name}" for name in own}
    for name in sorted(numbers & set(header.fields)):
        value = header.fields[name]
        if not isinstance(value, bool | int | float | list):
            raise ModelError(f"{header.path}: {name} is {value!r}, which is no number; get the file again")


def complete(header: Header, config: "PretrainedConfig") -> None:
    """Write into a configuration the fields of a GGUF file that transformers did not read.

    Raises ModelError if the configuration has no entry for a field, or if the model does not have a tensor of the file.
    """
    _complete_sizes(header, config)
    _complete_heads(header, config)
    _complete_attention(header, config)
    if not hasattr(config, "rope_parameters"):
        _check_without_rope(header)
        return
    scaling = _rope(header, config)
    slow = header.get("rope.freq_base_swa")
    if not isinstance(next(iter(config.rope_parameters.values()), None), Mapping):
        if slow is not None:
            raise _unknown(header, f"{header.architecture}.rope.freq_base_swa", slow)
        config.rope_parameters = config.rope_parameters | scaling
        return
    # each kind of layer has its own entries; llama.cpp scales only the layers that attend to all positions
    kinds = {kind: dict(entries) for kind, entries in config.rope_parameters.items()}
    kinds["full_attention"] |= scaling
    if slow is not None:
        kinds["sliding_attention"]["rope_theta"] = slow
    config.rope_parameters = kinds


def adds_first_token(header: Header) -> bool:
    """Whether the tokenizer adds the token for the beginning of a text. If the file has no field
    `tokenizer.ggml.add_bos_token`, llama.cpp's rule is used."""
    kind, split = header.fields["tokenizer.ggml.model"], header.fields.get("tokenizer.ggml.pre", "default")
    return bool(header.fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or split in FIRST_TOKEN))


def unused_tensors(header: Header, model: Any) -> list[str]:
    """Tensors of the file that transformers does not load, because the model has no such parameter."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    used = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    return sorted(header.names - used - set(ROPE_TENSORS))


def _complete_sizes(header: Header, config: "PretrainedConfig") -> None:
    """Set sizes that transformers stores under a wrong name in some families, such as GPT-2."""
    names = family_of(config).names
    for field, name in (("feed_forward_length", "intermediate_size"), ("context_length", "max_position_embeddings")):
        if (value := header.get(field)) is not None:
            setattr(config, names.get(name, name), value)


def _complete_heads(header: Header, config: "PretrainedConfig") -> None:
    length, values = header.get("attention.key_length"), header.get("attention.value_length")
    if length is None and header.get("rope.dimension_count"):
        # transformers wrongly uses the size of the rotated part of a head as the size of the whole head
        length = config.hidden_size // config.num_attention_heads
    if values is not None and values != (length or _head_dim(config)):
        raise _unknown(header, f"{header.architecture}.attention.value_length", values)
    if length is not None:
        if not hasattr(config, "head_dim") and length != _head_dim(config):
            raise _unknown(header, f"{header.architecture}.attention.key_length", length)
        if hasattr(config, "head_dim"):
            config.head_dim = length
    rotated = header.get("rope.dimension_count", _head_dim(config))
    if rotated != _head_dim(config):
        raise _unknown(header, f"{header.architecture}.rope.dimension_count", rotated)
    if any(name.endswith(("attn_q.bias", "attn_output.bias")) for name in header.names) \
            and getattr(config, "attention_bias", None) is False:
        config.attention_bias = True
    if any(name.endswith("ffn_up.bias") for name in header.names) and getattr(config, "mlp_bias", None) is False:
        config.mlp_bias = True


def _complete_attention(header: Header, config: "PretrainedConfig") -> None:
    scale, heads = header.get("attention.scale", 0.0), config.num_attention_heads
    if hasattr(config, "query_pre_attn_scalar"):
        wide = config.num_hidden_layers in WIDE_LAYERS
        config.query_pre_attn_scalar = round(scale ** -2) if scale else \
            config.hidden_size // heads if wide else _head_dim(config)
    scalar = getattr(config, "query_pre_attn_scalar", _head_dim(config))
    if scale and not math.isclose(scale, scalar ** -0.5, rel_tol=1e-5):
        raise _unknown(header, f"{header.architecture}.attention.scale", scale)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := header.get(name, 0.0):
            if not hasattr(config, name):
                raise _unknown(header, f"{header.architecture}.{name}", value)
            setattr(config, name, value)
    _complete_windows(header, config)


def _complete_windows(header: Header, config: "PretrainedConfig") -> None:
    window, pattern = header.get("attention.sliding_window", 0), header.get("attention.sliding_window_pattern")
    if not window or (window >= config.max_position_embeddings and not hasattr(config, "sliding_window")):
        return
    if not hasattr(config, "sliding_window") or hasattr(config, "use_sliding_window"):
        raise _unknown(header, f"{header.architecture}.attention.sliding_window", window)
    config.sliding_window = window
    if pattern is None:
        return
    if not getattr(config, "layer_types", None):
        raise _unknown(header, f"{header.architecture}.attention.sliding_window_pattern", pattern)
    slides = pattern if isinstance(pattern, list) else \
        [(layer + 1) % pattern != 0 for layer in range(config.num_hidden_layers)]
    config.layer_types = ["sliding_attention" if slide else "full_attention" for slide in slides]


def _rope(header: Header, config: "PretrainedConfig") -> dict[str, Any]:
    """All entries of `rope_parameters` except rope_theta."""
    # llama.cpp's rules: a factor without a type (in older files) is linear, and a factor of 0 means no scaling
    kind = header.get("rope.scaling.type", "linear")
    factor = header.get("rope.scaling.factor", 0.0) or header.get("rope.scale_linear", 0.0) or 1.0
    factor = 1.0 if kind == "none" else factor
    near, far = (header.tensors.get(f"rope_factors_{name}.weight") for name in ("short", "long"))
    factors = header.tensors.get("rope_freqs.weight")
    if near is not None and far is not None:
        return _longrope(header, config, near * factor, far * factor, header.get("rope.scaling.attn_factor", 1.0))
    if kind == "yarn" and factors is None:
        return _yarn(header, config, factor)
    if kind not in ("none", "linear"):
        raise _unknown(header, f"{header.architecture}.rope.scaling.type", kind)
    if factors is not None and not np.allclose(factors, 1):
        return _factors(header, config, factors * factor)
    return {"rope_type": "linear", "factor": factor} if factor != 1 else {}


def _yarn(header: Header, config: "PretrainedConfig", factor: float) -> dict[str, Any]:
    extrapolated = header.get("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolated not in (1.0, -1.0):  # -1 means the default of the type
        raise _unknown(header, f"{header.architecture}.rope.scaling.yarn_ext_factor", extrapolated)
    gain = header.get("rope.scaling.attn_factor", 1.0) * header.get("rope.scaling.yarn_attn_factor", 1.0)
    return {"rope_type": "yarn", "factor": factor,
            "original_max_position_embeddings": header.get("rope.scaling.original_context_length",
                                                           config.max_position_embeddings),
            "attention_factor": gain * (0.1 * math.log(factor) + 1) if factor > 1 else gain,
            "beta_fast": header.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": header.get("rope.scaling.yarn_beta_slow", 1.0)}


def _factors(header: Header, config: "PretrainedConfig", factors: np.ndarray) -> dict[str, Any]:
    """The entries of `rope_parameters` that give these divisors of the rotary frequencies: those of Meta's
    configuration if they give these divisors, otherwise those of LongRoPE, which can give any divisors."""
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **PUBLISHED_ROPE}
    base = config.rope_parameters.get("rope_theta", 0.0)
    if base and np.allclose(meta_factors(len(factors), base, scaling), factors, rtol=1e-5):
        return scaling
    return _longrope(header, config, factors, factors, 1.0)


def meta_factors(count: int, base: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """Divisors of the rotary frequencies in Llama 3.1 (convert_hf_to_gguf.py, generate_extra_tensors)."""
    frequencies = base ** -(np.arange(count) / count)
    waves, context = 2 * np.pi / frequencies, scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _longrope(header: Header, config: "PretrainedConfig", near: np.ndarray, far: np.ndarray,
              gain: float) -> dict[str, Any]:
    if len(near) != _head_dim(config) // 2 or len(far) != len(near):
        raise ModelError(f"{header.path}: {len(near)} rotary factors for heads of {_head_dim(config)} channels, which "
                         "cannot be carried over; use the original safetensors checkpoint")
    known = header.get("rope.scaling.original_context_length", config.max_position_embeddings)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = known
    return {"rope_type": "longrope", "short_factor": near.tolist(), "long_factor": far.tolist(),
            "attention_factor": gain, "original_max_position_embeddings": known}


def _check_without_rope(header: Header) -> None:
    """Raise ModelError if a file scales rotary positions although the model learns its positions, as GPT-2 does."""
    for name, value in header.fields.items():
        if name.startswith(f"{header.architecture}.rope."):
            raise _unknown(header, name, value)


def _check_architecture(header: Header) -> None:
    # imported here, because the import takes seconds; the conversion of a file needs transformers anyway
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if header.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ModelError(f"{header.path} holds a model of architecture {header.architecture!r}, which is not read from "
                         "GGUF; use the original safetensors checkpoint")


def _check_tokenizer(header: Header) -> None:
    kind, split = header.fields.get("tokenizer.ggml.model"), header.fields.get("tokenizer.ggml.pre", "default")
    if kind is None or not header.vocabulary:
        raise ModelError(f"{header.path} holds no tokenizer (tokenizer.ggml.model, tokenizer.ggml.tokens); use a file "
                         "with a tokenizer, or the original safetensors checkpoint")
    if kind == "gpt2" and split not in BYTE_LEVEL:
        raise ModelError(f"{header.path}: tokenizer.ggml.pre is {split!r}, and how it splits text is not known here; "
                         "use the original safetensors checkpoint")


def _head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _unknown(header: Header, name: str, value: Any) -> ModelError:
    return ModelError(f"{header.path}: {name} is {value}, which changes the model and cannot be carried over; use the "
                      "original safetensors checkpoint")
