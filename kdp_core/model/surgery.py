"""Changes a loaded or empty model in place: stand-ins, layers without a part, layers of other sizes, a head adapter,
rows of rare tokens of low rank.

A stand-in belongs to the layer after it. Before this layer reads the hidden state, the stand-in maps this state
(`stand_in`). After the last layer, a stand-in maps the output of the last layer (`stand_in_after`).
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdp_core.model.families import (
    CHANNELS,
    HEADS,
    KV_HEADS,
    TRIPLES,
    WRITER_BIAS,
    Family,
    decoder_layers,
    family_of,
    matrix,
    output_head,
    trunk,
)
from kdp_core.model.stand_ins import MODULES, LowRank, NoAttention, NoMlp, RareEmbedding, RareHead


def _before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (layer.stand_in(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.stand_in(kwargs["hidden_states"])}


def _after(layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):
        return (layer.stand_in_after(output[0]), *output[1:])
    return layer.stand_in_after(output)


def attach(model: nn.Module, stand_ins: list[dict[str, Any]]) -> None:
    """Attach the stand-ins of a configuration to the layers of the model. The weights of the stand-ins are loaded later
    from the checkpoint.

    If several stand-ins are before the same layer, or after the last layer, they run in the given order. This occurs if
    neighbouring blocks have one stand-in each.
    """
    layers = decoder_layers(model)
    for entry in stand_ins:
        layer, name = layers[entry["layer"]], "stand_in_after" if entry["after"] else "stand_in"
        if not hasattr(layer, name):
            setattr(layer, name, nn.Sequential())
            if entry["after"]:
                layer.register_forward_hook(_after)
            else:
                layer.register_forward_pre_hook(_before, with_kwargs=True)
        getattr(layer, name).append(MODULES[entry["kind"]](**entry["options"]))


def drop_parts(model: nn.Module, dropped: dict[str, list[int]]) -> None:
    """Remove the attentions and MLPs that a configuration lists. Where a part is removed, the state passes
    unchanged."""
    layers = decoder_layers(model)
    for part, numbers in dropped.items():
        found = family_of(model).parts[part]
        for number in numbers:
            for name in found.beside:
                setattr(layers[number], name, nn.Identity())
            setattr(layers[number], found.module, NoAttention(number) if part == "attention" else NoMlp())


@contextmanager
def without(layer: nn.Module, family: Family, part: str) -> Iterator[None]:
    """Disable a part in this `with` block: the attention or MLP of the layer adds nothing to the state. For the part
    `whole` nothing is disabled here, because the caller does not run this layer."""
    if part == "whole":
        yield
        return
    adding = layer.get_submodule(family.parts[part].module)

    def nothing(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hook = adding.register_forward_hook(nothing)
    try:
        yield
    finally:
        hook.remove()


def narrow(model: nn.Module, widths: list[dict[str, int]]) -> None:
    """Give every layer the numbers of heads and MLP channels that a configuration states. The weights are loaded later
    from the checkpoint."""
    for layer, sizes in zip(decoder_layers(model), widths, strict=True):
        parts = family_of(model).parts
        attention = layer.get_submodule(parts["attention"].module)
        # GPT-NeoX uses the name head_size for the size of a head
        length = getattr(attention, "head_dim", None) or attention.head_size
        rows = {HEADS: sizes[HEADS] * length, KV_HEADS: sizes[KV_HEADS] * length, TRIPLES: 3 * sizes[HEADS] * length,
                CHANNELS: sizes[CHANNELS]}
        for name, part in parts.items():
            for reader, kinds in part.readers.items():
                _resize(layer, reader, rows=sum(rows[kind] for kind in kinds))
            _resize(layer, part.writer, columns=rows[HEADS if name == "attention" else CHANNELS],
                    bias=bool(sizes.get(WRITER_BIAS)))
        _count_heads(attention, sizes[HEADS], sizes[KV_HEADS], rows[HEADS])


def _count_heads(attention: nn.Module, heads: int, kv_heads: int, columns: int) -> None:
    """Set the number of heads of an attention module, in all attributes that store this number. The names of the
    attributes differ by family."""
    for name, count in (("num_heads", heads), ("num_key_value_heads", kv_heads),
                        ("num_key_value_groups", heads // kv_heads), ("split_size", columns)):
        if hasattr(attention, name):
            setattr(attention, name, count)
    # Phi-3's attention reads the number of query heads from the configuration of the whole model
    if hasattr(attention, "config"):
        attention.config = LayerConfig(attention.config, heads)


class LayerConfig:
    """The configuration of a model, but with the number of heads of one layer. All entries except the number of heads
    are read from the configuration of the model."""

    def __init__(self, config: Any, heads: int) -> None:
        self.config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        # while an object is copied, attributes are read before the configuration is set
        if name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)


def _resize(layer: nn.Module, name: str, rows: int | None = None, columns: int | None = None,
            bias: bool = False) -> None:
    """Replace a linear map by a linear map of the same class and another size. The new map has a bias if the old map
    has a bias, or if `bias` is true."""
    old = layer.get_submodule(name)
    shape = (rows or matrix(old).shape[0], columns or matrix(old).shape[1])
    with old.weight.device:
        # the first argument of Conv1D is the number of outputs, and Conv1D always has a bias
        new = type(old)(*shape) if hasattr(old, "nx") else nn.Linear(*shape[::-1], bias or old.bias is not None)
    layer.set_submodule(name, new.to(old.weight.dtype))


def attach_head_adapter(model: nn.Module, rank: int) -> None:
    """Insert an adapter of rank `rank` before the output head. The weights are loaded later from the checkpoint."""
    head = output_head(model)
    model.head_adapter = LowRank(head.in_features, rank)
    head.register_forward_pre_hook(model.head_adapter.before)


def reduce_rare(model: nn.Module, frequent: int, rank: int) -> None:
    """Give the model an embedding of this kind and a head that reads it. The weights are loaded later from the
    checkpoint."""
    family = family_of(model)
    name, base = family.embeddings[0], trunk(model)
    old = getattr(base, name)
    with old.weight.device:
        new = RareEmbedding(*old.weight.shape, frequent, rank, scale_of(old)).to(old.weight.dtype)
        head = RareHead(new)
    setattr(base, name, new)
    owner, _, last = family.head.rpartition(".")
    setattr(model.get_submodule(owner), last, head)


def scale_of(embedding: nn.Module) -> float:
    """The factor by which an embedding of a family multiplies its rows."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def head_is_tied(model: nn.Module) -> bool:
    """Whether the output head has the weights of the embedding."""
    head = output_head(model)
    return isinstance(head, RareHead) or head.weight is model.get_input_embeddings().weight
