"""Models with states of reduced width, where each state has its own basis (SliceGPT, Ashkboos et al. 2024, arXiv
2401.15024).

The gain of every norm is multiplied into the matrices that read the norm. Every part of a layer gets an additional
matrix. This matrix rotates the state from the basis in which the part reads to the basis in which the part writes.
"""
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdp_core.model.families import FAMILIES, Family, decoder_layers, family_of, norm_of, output_head, trunk


class SlicedNorm(nn.Module):
    """h divided by its root mean square, where the mean is computed over the width before slicing. The gain of the norm
    is already in the matrices that read the normed state."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, h: Tensor) -> Tensor:
        x = h.float()
        return (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / self.width + self.eps)).to(h.dtype)


class SlicedLayer:
    """Mixin of a family's decoder layer. Before a part adds its output to the state, the state is rotated to the basis
    in which the part writes."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states
        for part in ("attention", "mlp"):
            added = part_output(self, FAMILIES[self.family], part, h, **kwargs)
            added = functional.dropout(added, getattr(self, "dropout", 0.0), self.training)
            h = getattr(self, f"{part}_shortcut")(h) + added
        return h


def part_output(layer: nn.Module, family: Family, part: str, h: Tensor, **kwargs: Any) -> Tensor:
    """The output of a part, which the layer adds to the state; only for layers without norms after their parts.
    `kwargs` are the other arguments of the layer."""
    own, x = family.parts[part], norm_of(layer, family, part)(h)
    module = layer.get_submodule(own.module)
    if part == "attention":
        return module(hidden_states=x, **kwargs)[0]
    if own.module == own.writer:
        # in this family the MLP is not a module: the MLP's two matrices are attributes of the layer
        reader, = own.readers
        return module(layer.activation_fn(layer.get_submodule(reader)(x)))
    return module(x)


def slice_widths(model: nn.Module, sliced: dict[str, Any]) -> None:
    """Change the model to states of these widths: the width that each part of each layer reads, and the final width."""
    family, base, width = family_of(model), trunk(model), model.config.hidden_size
    states = [*sliced["attention"], sliced["final"]]
    for layer, into, middle, out in zip(decoder_layers(model), states[:-1], sliced["mlp"], states[1:], strict=True):
        for part, reads, writes in (("attention", into, middle), ("mlp", middle, out)):
            own = family.parts[part]
            for name in own.readers:
                _of_width(layer.get_submodule(name), columns=reads, bias=_biased(norm_of(layer, family, part)))
            _of_width(layer.get_submodule(own.writer), rows=writes)
            _without_gain(layer, own.norm, width)
            setattr(layer, f"{part}_shortcut", nn.Linear(reads, writes, bias=False))
        # the new class is a subclass of the family's class with the same name, so that transformers records the states
        # of the layer and never splits the layer over devices
        layer.__class__, layer.family = type(type(layer).__name__, (SlicedLayer, type(layer)), {}), family.name
    for name in family.embeddings:
        _of_width(getattr(base, name), columns=states[0])
    _of_width(output_head(model), columns=states[-1], bias=_biased(getattr(base, family.final_norm)))
    _without_gain(base, family.final_norm, width)


def _biased(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def _without_gain(owner: nn.Module, name: str, width: int) -> None:
    norm = getattr(owner, name)
    setattr(owner, name, SlicedNorm(width, norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon))


def _of_width(module: nn.Linear | nn.Embedding, rows: int | None = None, columns: int | None = None,
            bias: bool = False) -> None:
    """Change the shape of a linear map or an embedding. The new weights are zero until the checkpoint fills them."""
    shape = (rows or module.weight.shape[0], columns or module.weight.shape[1])
    module.weight = nn.Parameter(module.weight.new_zeros(shape))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
        return
    module.out_features, module.in_features = shape
    if bias or module.bias is not None:
        module.bias = nn.Parameter(module.weight.new_zeros(shape[0]))
