"""Distances of all pairs of tokens, and their median. The median sets the width of every RBF kernel of this library.

Axes: L layers, B tokens of a minibatch, N tokens, D width.
"""
import torch
from torch import Tensor


def squared_distances(x_LBD: Tensor, gram_LBB: Tensor) -> Tensor:
    """|x_i - x_j|^2 of all pairs of tokens of a batch, (L, B, B), in squared units of the states. `gram_LBB` has the
    inner products of all pairs."""
    square_LB = x_LBD.square().sum(-1)
    # |x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 <x_i, x_j>
    return (square_LB[:, :, None] + square_LB[:, None, :]).sub_(gram_LBB, alpha=2).clamp_min_(0)


def median_distance(x_ND: Tensor) -> float:
    """Median distance of two different tokens, in the units of the states. The result is at least 1e-12, so that it is
    never zero."""
    return torch.pdist(x_ND.double()).median().clamp_min(1e-12).item()


def sampled_median_distance(x_ND: Tensor, generator: torch.Generator, sample: int = 1024) -> float:
    """Median distance of two different tokens, measured on a random sample of the tokens."""
    return median_distance(x_ND[torch.randperm(len(x_ND), generator=generator)[:sample]])
