"""Pico models as llama.cpp would write them to a GGUF file, with any further metadata and tensors."""
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
                 "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3": gguf.MODEL_ARCH.GEMMA3, "phi3": gguf.MODEL_ARCH.PHI3,
                 "gpt2": gguf.MODEL_ARCH.GPT2}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Matrices of GPT-2, which a file holds as those of every other family."""


def write_gguf(path: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, pre: str = "gpt-2",
               architecture: str = "llama", fields: dict[str, Any] | None = None,
               tensors: dict[str, np.ndarray] | None = None) -> Path:
    """Write a pico model.

    fields: metadata by full name, beside the sizes and the tokenizer. tensors: further ones by their names in the file.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("/home/someone/model")
    _write_sizes(writer, model.config)
    _write_tokenizer(writer, tokenizer, pre)
    for name, value in (fields or {}).items():
        _write_field(writer, name, value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")),
                              _as_written(name, tensor, model.config, architecture))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, pre: str) -> None:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)


def _write_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    write = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}[type(value)]
    write(name, value)


def _as_written(name: str, tensor: torch.Tensor, config: Any, architecture: str) -> np.ndarray:
    """Llama's q and k rows are interleaved for llama.cpp's rotary embedding, and Gemma's norms hold 1 + weight."""
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if architecture == "llama" and name.split(".")[-2] in counts:
        heads = getattr(config, counts[name.split(".")[-2]])
        tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    if architecture == "gpt2" and name.endswith(TRANSPOSED):
        tensor = tensor.T.contiguous()
    return tensor.detach().numpy()
