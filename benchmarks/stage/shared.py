"""Functions for the CPU and the GPU measurement of kdp_residual: counts of operations, stand-ins, bare passes."""
from collections.abc import Callable

import torch
from torch import Tensor

from kdp_core.base.records import Block, Module
from kdp_core.methods.kdp_residual.dictionaries import Dictionary
from kdp_core.model.passes import Passes, Step

BATCH, POSITIONS = 4, 32
"""Two defaults of joint training: the sequences of an update, and the tokens of each sequence at which outputs are
compared."""


def operations(tokens: int, width: int, dictionary: Dictionary) -> float:
    """Number of floating-point operations that compute the features, the Gram matrix and the cross matrix."""
    F = width + dictionary.entries + 1
    return tokens * (2 * width * len(dictionary.v_RD) + 2 * F * F + 2 * F * width)


def linear_stand_ins(D: int, blocks: list[Block]) -> list[Module]:
    """Stand-ins that consist of a linear part only; all weights are zero.

    The cost of joint training does not depend on the weights.
    """
    options = {"width": D, "entries": 0, "dictionary": "mlp", "activation": "relu", "norm": "rms",
               "bypass_above": 1e9}
    return [Module(block, "residual", options, {"linear.weight": torch.zeros(D, D), "linear.bias": torch.zeros(D)})
            for block in blocks]


def bare(passes: Passes, path: list[Step], start_BTD: Tensor, final_BTD: Tensor) -> Callable[[], None]:
    """A function that runs the bare passes.

    The function computes the dense model's logits, then a forward and a backward pass through `path` and the output
    head.
    """
    chosen = torch.arange(min(POSITIONS, start_BTD.shape[1] - 1))

    def run() -> None:
        with torch.no_grad():
            passes.head(passes.to_head(final_BTD[:, chosen]))
        passes.head(passes.to_head(passes.run(start_BTD, path)[:, chosen])).sum().backward()

    return run
