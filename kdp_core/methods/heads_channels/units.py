"""Functions for all methods that remove heads and MLP channels: the units, the sizes of layers, and the run of a layer.

A unit of an attention is a key-value head with the consecutive query heads that read this key-value head. The unit
consists of the rows of these heads in q, k and v and of their columns in o. A unit of an MLP is a channel: a row of
gate and up and a column of down (OPT: a row of fc1 and a column of fc2). The biases of removed rows are removed too.
All norms are kept, including the norms of heads. The writers (o and down) multiply the outputs of the units, so each
unit is a set of columns of a writer.

A plan contains the narrow tensors, and the sizes that every layer keeps (`shape: {widths: [...]}`: heads, kv_heads,
intermediate). kdp_core.model.surgery.narrow builds layers of these sizes.

Axes besides those of kdp_core.base.records: U units of a part, C columns of a writer.
"""
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.model import checkpoints
from kdp_core.model.families import (
    CHANNELS,
    FAMILIES,
    HEADS,
    KV_HEADS,
    TRIPLES,
    Family,
    decoder_layers,
    family_of,
    is_known,
    matrix,
    type_of,
)
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PARTS = ("attention", "mlp")


class Coupled(NamedTuple):
    """A tensor of a layer from which units are removed."""
    name: str
    """Name of the tensor within the layer."""
    part: str
    """`attention` or `mlp`."""
    axis: int
    """Axis of the tensor along which its units lie."""
    sections: tuple[int, ...]
    """The axis consists of consecutive sections. For each section: the number of rows or columns that belong to one
    unit. Every section contains all units, in order. A fused matrix has several sections."""


class Sizes(NamedTuple):
    """The sizes of each layer before the layer is pruned."""
    layers: int
    groups: int
    """Key-value heads."""
    channels: int
    group_params: int
    """Parameters of a key-value head and its query heads."""
    channel_params: int

    @property
    def units(self) -> dict[str, int]:
        """Units by part."""
        return {"attention": self.groups, "mlp": self.channels}

    @property
    def unit_params(self) -> dict[str, int]:
        """Parameters of a unit by part."""
        return {"attention": self.group_params, "mlp": self.channel_params}


def no_single_heads(family: Family) -> str:
    """Use this function as `refuses` of a method that removes heads. The result is the reason why no single head of the
    family can be removed, or an empty text if a head can be removed."""
    return "queries and keys pass a norm over all heads together, so that no head can be removed by itself" \
        if family.head_norms == "all" else ""


class Layout(NamedTuple):
    """The facts about a dense model that are known before its weights are read."""
    config: "PretrainedConfig"
    coupled: list[Coupled]
    """The tensors of each layer from which units are removed. All layers have the same sizes."""
    sizes: Sizes
    total: int
    """Number of all parameters of the model."""
    blank: nn.Module
    """The model on the meta device."""


def layout(method: str, dense: Path) -> Layout:
    """The layout of the checkpoint in `dense`. Raises FitError for a model whose heads and channels cannot be
    removed."""
    config = checkpoints.config_of(dense)
    check_family(method, config)
    blank = checkpoints.on_meta(config)
    layer = decoder_layers(blank)[0]
    coupled = coupled_of(layer, config)
    sizes = sizes_of(layer, coupled, config, config.num_hidden_layers)
    return Layout(config, coupled, sizes, count_params(blank), blank)


def check_family(method: str, config: "PretrainedConfig",
                 refuses: Callable[[Family], str] = no_single_heads) -> None:
    """Raise FitError for a model whose heads and channels cannot be removed. `refuses` is the function of this name in
    the method's record."""
    why = refuses(family_of(config)) if is_known(config) else ""
    if why or not is_known(config) or not family_of(config).norms_first(config):
        fits = [name for name, family in FAMILIES.items() if not refuses(family)]
        raise FitError(f"{method} cannot prune this {type_of(config)} model{why and f': {why}'}; it knows models of "
                       f"{', '.join(fits)} whose states pass a part unchanged")


def coupled_of(layer: nn.Module, config: "PretrainedConfig") -> list[Coupled]:
    """The tensors of a layer from which units are removed."""
    found, family = [], family_of(config)
    for part, own in family.parts.items():
        length = matrix(layer.get_submodule(own.writer)).shape[1] // config.num_attention_heads
        # lines of a unit: the query heads of a group, its key-value head, query, key and value of a head; a channel
        lines = {HEADS: length * config.num_attention_heads // _groups(config), KV_HEADS: length, TRIPLES: 3 * length,
                 CHANNELS: 1}
        for name, kinds in own.readers.items():
            sections = tuple(lines[kind] for kind in kinds)
            found += [Coupled(f"{name}.{kind}", part, int(family.transposed and kind == "weight"), sections)
                      for kind, _ in layer.get_submodule(name).named_parameters()]
        columns = lines[HEADS if part == "attention" else CHANNELS]
        found.append(Coupled(f"{own.writer}.weight", part, int(not family.transposed), (columns,)))
    return found


def _groups(config: "PretrainedConfig") -> int:
    """Number of key-value heads. If the configuration does not state the number, each query head has its own key-value
    head."""
    return getattr(config, "num_key_value_heads", config.num_attention_heads)


def sizes_of(layer: nn.Module, coupled: list[Coupled], config: "PretrainedConfig", layers: int) -> Sizes:
    """The sizes of `layers` layers that all have the sizes of this layer."""
    groups = _groups(config)
    channels = matrix(layer.get_submodule(family_of(config).parts["mlp"].writer)).shape[1]
    params = {part: sum(layer.get_parameter(one.name).numel() for one in coupled if one.part == part)
              for part in PARTS}
    return Sizes(layers, groups, channels, params["attention"] // groups, params["mlp"] // channels)


def width_of(config: "PretrainedConfig", sizes: Sizes, groups: int, channels: int) -> dict[str, int]:
    """The sizes of a layer in the configuration, after `groups` head groups and `channels` channels are removed."""
    left, each = sizes.groups - groups, config.num_attention_heads // sizes.groups
    return {HEADS: left * each, KV_HEADS: left, CHANNELS: sizes.channels - channels}


def narrowed(tensor: Tensor, one: Coupled, kept_U: Tensor, units: int) -> Tensor:
    """The tensor with only the kept units."""
    index, start = [], 0
    for length in one.sections:
        index.append(start + columns_of(kept_U, length))
        start += units * length
    return tensor.index_select(one.axis, torch.cat(index).to(tensor.device)).contiguous()


def columns_of(units_U: Tensor, length: int) -> Tensor:
    """Numbers of the columns (or rows) that belong to the units `units_U`. Each unit has `length` columns (or rows)."""
    return (units_U[:, None] * length + torch.arange(length)).flatten()


def narrow_tensors(model: nn.Module, number: int, coupled: list[Coupled], kept: dict[str, Tensor],
                   sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a layer with only the kept units of both parts, on the CPU, by state-dict name."""
    layer, prefix = decoder_layers(model)[number], f"{family_of(model).prefix}{number}."
    return {prefix + one.name: narrowed(layer.get_parameter(one.name).detach(), one, kept[one.part],
                                        sizes.units[one.part]).cpu() for one in coupled}


def first_states(hidden: HiddenStates, sequences: int | None, seed: int) -> Tensor:
    """State 0 of the requested number of sequences. The sequences are drawn by `seed` and keep their order; None means
    all."""
    wanted = hidden.sequences if sequences is None else sequences
    if wanted > hidden.sequences:
        raise FitError(f"compose.sequences {sequences}: there are {hidden.sequences} calibration sequences; lower it "
                       "or add sequences")
    order = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    return hidden.state(0, order[:wanted].sort().values)


@torch.no_grad()
def run_layer(passes: Passes, number: int, h_STD: Tensor, batch: int,
              seen: Callable[[str, Tensor], None]) -> Tensor:
    """Run layer `number` on state `number`. Returns state number + 1, float32 on the CPU.

    `seen` is called once for each part and batch, with (part, inputs x_NC of the part's writer, float32).
    """
    if not torch.isfinite(h_STD).all():
        raise FitError(f"state {number} of the pruned model is not finite; try dtype float32 for the model")
    layer, family = passes.layers[number], family_of(passes.model)

    def caught(part: str, x: Tensor) -> None:
        # a hook that returned a value would change what the writer reads
        seen(part, x.flatten(0, -2).float())

    hooks = [layer.get_submodule(family.parts[part].writer).register_forward_pre_hook(
        lambda _, args, part=part: caught(part, args[0])) for part in PARTS]
    try:
        return passes.run_batches(h_STD, [number], batch)
    finally:
        for hook in hooks:
            hook.remove()
