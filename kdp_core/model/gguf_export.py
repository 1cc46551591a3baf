"""Writes a checkpoint of an ordinary model as a GGUF file, which llama.cpp can run.

The file has the form that llama.cpp's converter writes (gguf-py/gguf/constants.py; convert_hf_to_gguf.py, LlamaModel).
Matrices have llama.cpp's names and the precision of the checkpoint, and norms and biases are float32. The rows of
queries and keys have the order of llama.cpp's rotary embedding. This module writes only models whose GGUF files
`gguf_file` can read back with equal logits. For any other model the error recommends llama.cpp's own converter.
"""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdp_core.base.store import atomic
from kdp_core.model import checkpoints
from kdp_core.model.families import Family, family_of, is_known, type_of
from kdp_core.model.gguf_file import PUBLISHED_ROPE, meta_factors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
OTHERWISE = "convert it with llama.cpp's convert_hf_to_gguf.py"
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""Regular expressions that split text before a byte-level BPE -> llama.cpp's name of this split
(tokenizer.ggml.pre)."""


class ExportError(ValueError):
    """A checkpoint that cannot be written as a GGUF file."""


def export(folder: str | Path, out: str | Path) -> None:
    """Write the checkpoint in `folder` to the GGUF file `out` (atomic).

    Raises ExportError, before any weight is read, in three cases: the model has its own code, the family cannot be
    written as GGUF here, or a GGUF file cannot represent the positions or the tokenizer.
    """
    folder, out = Path(folder), Path(out)
    config = checkpoints.config_of(folder)
    family = _family(folder, config)
    reader = checkpoints.load_tokenizer(folder)
    pre = _pre(folder, json.loads(reader.backend_tokenizer.to_str()))
    factors = _rope_factors(folder, config)
    _check_tensors(folder, config)
    with atomic(out) as temporary:
        # the tensors are written to a temporary file first, so that a large model needs little memory
        writer = GGUFWriter(temporary, family.gguf, use_temp_file=True)
        writer.add_name(out.stem)
        _write_sizes(writer, config)
        _write_tokenizer(writer, reader, pre, config.vocab_size)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        _write_tensors(writer, folder, family, config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _family(folder: Path, config: "PretrainedConfig") -> Family:
    if not is_known(config):
        raise ExportError(f"{folder} is a {type_of(config)} model with code of its own, and llama.cpp knows no such "
                          "model; export a checkpoint whose layers are only removed or merged")
    family = family_of(config)
    if not family.gguf:
        raise ExportError(f"{folder} is a {family.name} model, whose GGUF form is not written here; {OTHERWISE}")
    return family


def _write_sizes(writer: GGUFWriter, config: "PretrainedConfig") -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(folder: Path, config: "PretrainedConfig") -> np.ndarray | None:
    """Divisors of the rotary frequencies as in Llama 3.1; None if the frequencies are not scaled in this way. Raises
    ExportError for other scalings."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or any(rope.get(name) != value for name, value in PUBLISHED_ROPE.items()):
        raise ExportError(f"{folder} scales its positions by {kind}, which is not written here; {OTHERWISE}")
    return meta_factors(_head_dim(config) // 2, rope["rope_theta"], rope)


def _head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _pre(folder: Path, state: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a tokenizer splits text before its byte-level BPE."""
    split = state.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    plain = state["model"]["type"] == "BPE" and not state["model"].get("byte_fallback") and not state.get("normalizer")
    last = steps[-1] if plain and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space") else {}
    if last.get("use_regex"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    elif last and kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
        return name
    raise ExportError(f"{folder}: how its tokenizer splits text ({', '.join(map(str, kinds))}) is not written here; "
                      f"{OTHERWISE}")


def _write_tokenizer(writer: GGUFWriter, reader: "PreTrainedTokenizerBase", pre: str, rows: int) -> None:
    """Write vocabulary, merges and special tokens. Embedding rows without a token get a name and are marked as
    unused."""
    state = json.loads(reader.backend_tokenizer.to_str())
    names = {index: token for token, index in reader.get_vocab().items()}
    special = {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
               for token in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([special.get(index, TokenType.NORMAL) if index in names else TokenType.UNUSED
                            for index in range(rows)])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]])
    for kind in ("bos", "eos", "pad", "unk"):
        if (index := getattr(reader, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(reader("a")["input_ids"][0] == reader.bos_token_id)
    if reader.chat_template:
        writer.add_chat_template(reader.chat_template)


def _check_tensors(folder: Path, config: "PretrainedConfig") -> None:
    """Raise ExportError if the safetensors files of a folder cannot be read, or lack a tensor of the model."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= set(file.keys())
        except SafetensorError as error:
            raise ExportError(f"{path} cannot be read ({error}); get the checkpoint again, complete") from error
    model = checkpoints.on_meta(config)
    tied = set(model.all_tied_weights_keys)
    if missing := sorted(set(model.state_dict()) - found - tied):
        raise ExportError(f"{folder} has no tensor {missing[0]} in its *.safetensors files, and {len(missing)} are "
                          "missing in all; get the checkpoint again, complete, or convert it to safetensors")


def _write_tensors(writer: GGUFWriter, folder: Path, family: Family, config: "PretrainedConfig") -> None:
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if (written := known.get_name(name, (".weight", ".bias"))) is None:
                    raise ExportError(f"{folder}: llama.cpp has no place for the tensor {name}; {OTHERWISE}")
                tensor = _in_order(name, file.get_tensor(name), config)
                kind = Kind.F32 if tensor.ndim == 1 else KINDS[tensor.dtype]
                values = gguf.quants.quantize(tensor.float().numpy(), kind)
                writer.add_tensor(written, values, raw_dtype=kind)


def _in_order(name: str, tensor: Tensor, config: "PretrainedConfig") -> Tensor:
    """Reorder the rows of queries and keys from two halves of a head to pairs. Other tensors are returned unchanged."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
