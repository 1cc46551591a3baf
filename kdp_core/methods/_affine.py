"""Affine maps of states, fitted by weighted ridge regression, and the stand-in made from such a map."""
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.base.records import Block, Module
from kdp_core.states.block import TokenWeight, ridge_solve


class Map(NamedTuple):
    """y = W x + b, float64."""
    w_DD: Tensor
    b_D: Tensor


def regress(x_ND: Tensor, y_ND: Tensor, ridge: float, residual: bool, token_weight: TokenWeight) -> Map:
    """Weighted ridge regression of y on x with an unpenalised intercept, in float64."""
    x_ND, y_ND = x_ND.double(), y_ND.double()
    weight_N = 1 / y_ND.square().sum(-1).clamp_min(1e-12) if token_weight == "inverse_norm" else torch.ones(len(x_ND))
    weight_N1 = (weight_N / weight_N.sum())[:, None].double()
    goal_ND = y_ND - x_ND if residual else y_ND
    mean_x_D, mean_goal_D = (weight_N1 * x_ND).sum(0), (weight_N1 * goal_ND).sum(0)
    centred_ND = x_ND - mean_x_D
    # W = (X' w X + ridge)^-1 X' w Y
    w_DD = ridge_solve(centred_ND.T @ (weight_N1 * centred_ND), centred_ND.T @ (weight_N1 * (goal_ND - mean_goal_D)),
                       ridge).T
    bias_D = mean_goal_D - w_DD @ mean_x_D
    return Map(w_DD + torch.eye(len(w_DD), dtype=torch.float64) if residual else w_DD, bias_D)


def stand_in(block: Block, fitted: Map, bypass_above: float | None) -> Module:
    """The stand-in of an affine map, in float32."""
    return Module(block, "affine", {"width": len(fitted.b_D), "bypass_above": bypass_above},
                  {"map.weight": fitted.w_DD.float(), "map.bias": fitted.b_D.float()})
