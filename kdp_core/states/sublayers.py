"""The cosine between the states before and after every attention and every MLP, as a mean over tokens.

The forward pass that extracts the hidden states also computes this cosine. LLM-Drop ranks attentions and MLPs by this
cosine. So LLM-Drop needs no forward pass of its own. Axes: B sequences, T tokens, D width, P parts of a layer.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdp_core.model.families import decoder_layers, entrance, family_of


def _mean_cosine(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    """Mean over tokens of the cosine of two states, (B,). On a CPU, torch's cosine_similarity takes 12 times as
    long."""
    dot_BT = torch.linalg.vecdot(x_BTD, y_BTD)
    return (dot_BT / (x_BTD.norm(dim=-1) * y_BTD.norm(dim=-1)).clamp_min(1e-8)).mean(dim=-1)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Observe one forward pass. The list receives one tensor cos_PB (mean over tokens) for every layer that ran to its
    end."""
    found: list[Tensor] = []
    seen: dict[str, Tensor] = {}

    def after(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        x_BTD, end_BTD = seen["x"], output[0] if isinstance(output, tuple) else output
        y_BTD = seen["y"].view(x_BTD.shape)
        # cos(x, y) and cos(y, x'), y = x + attention(norm x), x' = y + mlp(norm y)
        found.append(torch.stack([_mean_cosine(one.float(), other.float())
                                  for one, other in ((x_BTD, y_BTD), (y_BTD, end_BTD))]))

    hooks = []
    # y does not exist if norms follow the sum, as in OPT-350M, or if both parts read x
    family = family_of(model)
    if family.norms_first(model.config) and not family.parallel:
        for layer in decoder_layers(model):
            # the first module of the MLP part reads y
            reader = entrance(layer, family, "mlp")
            hooks += [layer.register_forward_pre_hook(
                          lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]),
                          with_kwargs=True),
                      reader.register_forward_pre_hook(lambda _, args: seen.update(y=args[0])),
                      layer.register_forward_hook(after)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
