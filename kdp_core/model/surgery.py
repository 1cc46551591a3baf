"""Changes of a loaded or empty model in place: stand-ins, layers without a part, layers of other sizes, a head adapter.

A stand-in belongs to the layer that follows it: it maps the hidden state before that layer reads it (`stand_in`), or,
after the last layer, what that layer returns (`stand_in_after`).
"""
from typing import Any

from torch import Tensor, nn

from kdp_core.model.families import CHANNELS, HEADS, KV_HEADS, WRITER_BIAS, decoder_layers, family_of, output_head
from kdp_core.model.stand_ins import MODULES, LowRank, NoAttention, NoMlp


def _before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (layer.stand_in(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.stand_in(kwargs["hidden_states"])}


def _after(layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):
        return (layer.stand_in_after(output[0]), *output[1:])
    return layer.stand_in_after(output)


def attach(model: nn.Module, stand_ins: list[dict[str, Any]]) -> None:
    """Give layers their stand-ins, as configurations name them; the checkpoint fills the weights later.

    Stand-ins of one place follow each other in the order given: neighbouring blocks may each have one.
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
    """Remove attention or MLP from layers, as configurations name them; the state passes such a part unchanged."""
    layers = decoder_layers(model)
    for part, numbers in dropped.items():
        found = family_of(model).parts[part]
        for number in numbers:
            for name in found.beside:
                setattr(layers[number], name, nn.Identity())
            setattr(layers[number], found.module, NoAttention(number) if part == "attention" else NoMlp())


def narrow(model: nn.Module, widths: list[dict[str, int]]) -> None:
    """Give every layer the heads and MLP channels that configurations name; the checkpoint fills the weights later."""
    for layer, sizes in zip(decoder_layers(model), widths, strict=True):
        parts = family_of(model).parts
        attention, heads, kv_heads = layer.get_submodule(parts["attention"].module), sizes[HEADS], sizes[KV_HEADS]
        length = {HEADS: attention.head_dim, KV_HEADS: attention.head_dim, CHANNELS: 1}
        for name, part in parts.items():
            for reader, kinds in part.readers.items():
                _resize(layer, reader, rows=sum(sizes[kind] * length[kind] for kind in kinds))
            columns = HEADS if name == "attention" else CHANNELS
            _resize(layer, part.writer, columns=sizes[columns] * length[columns], bias=bool(sizes.get(WRITER_BIAS)))
        # OPT's attention holds the first of these counts, that of the other families the second
        for name, count in (("num_heads", heads), ("num_key_value_groups", heads // kv_heads)):
            if hasattr(attention, name):
                setattr(attention, name, count)


def _resize(layer: nn.Module, name: str, rows: int | None = None, columns: int | None = None,
            bias: bool = False) -> None:
    """Replace a linear map by one of another size, with a bias if it had one or is given one."""
    old = layer.get_submodule(name)
    layer.set_submodule(name, nn.Linear(columns or old.in_features, rows or old.out_features,
                                        bias or old.bias is not None, device=old.weight.device,
                                        dtype=old.weight.dtype))


def attach_head_adapter(model: nn.Module, rank: int) -> None:
    """Put an adapter of this rank before the output head; the checkpoint fills the weights later."""
    head = output_head(model)
    model.head_adapter = LowRank(head.in_features, rank)
    head.register_forward_pre_hook(model.head_adapter.before)
