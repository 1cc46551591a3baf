"""Folded blocks and folded models with random weights, for measurements of speed, which does not depend on weights."""
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdp_core.base.records import Block, Module
from kdp_core.model.folded import FOLDED
from kdp_core.model.passes import built

FEATURES = 1024
"""Number of features of the kernel, the paper's 2m."""


def options_of(width: int, hidden: int) -> dict[str, Any]:
    """The options of KDP's folded block with `hidden` hidden units; massive tokens bypass it."""
    return {"width": width, "frequencies": FEATURES // 2, "hidden": hidden, "activation": "gelu", "lift_input": "raw",
            "bypass_above": 1e3}


def stand_in(width: int, hidden: int) -> nn.Module:
    """A folded block in float32 for states of this width, with `hidden` hidden units."""
    shapes = {"omega": (FEATURES // 2, width), "phase": (FEATURES // 2,), "w1.weight": (hidden, FEATURES),
              "w1.bias": (hidden,), "w2.weight": (width, hidden), "w2.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return built(Module((0, 2), "rff_mlp", options_of(width, hidden), tensors))


def spread_blocks(layers: int, count: int | None = None) -> list[Block]:
    """Blocks of two layers that are not adjacent. Without `count`, the blocks cover a fifth of all layers."""
    count = count or max(1, layers // 10)
    starts = [1 + place * (layers - 3) // count for place in range(count)]
    return [(start, start + 2) for start in starts]


def folded_like(config: PretrainedConfig, blocks: list[Block], hidden: int | None) -> PreTrainedModel:
    """A model of this shape in which folded blocks replace `blocks`; if `hidden` is None, the layers are only removed.

    The weights are random, in torch's default precision and on torch's default device at the call.
    """
    config_class, model_class = FOLDED[config.model_type]
    removed = [layer for block in blocks for layer in range(*block)]
    # a stand-in is placed before the layer that follows its block
    places = [stop - sum(layer < stop for layer in removed) for _, stop in blocks]
    stand_ins = [] if hidden is None else [
        {"layer": place, "after": False, "kind": "rff_mlp", "options": options_of(config.hidden_size, hidden)}
        for place in places]
    given = {name: value for name, value in config.to_dict().items()
             if name not in ("model_type", "architectures", "layer_types", "num_hidden_layers", "dtype")}
    own = config_class(**given, num_hidden_layers=config.num_hidden_layers - len(removed), stand_ins=stand_ins)
    own._attn_implementation = config._attn_implementation
    return model_class(own).eval()
