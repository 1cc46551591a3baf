"""The kernel space of KDP: features phi of states, the operators A_i between them, and the loss of step 1.

Paper: KDP (ICLR 2026), equations 2 and 5.
    phi(h) = (cos(Omega' x + b), sin(Omega' x + b)) / sqrt(m),   Omega = D^1/2 Z + L V,   D = diag(exp(lambda)),
    Z ~ N(0, 1) of d x m and V ~ N(0, 1) of r x m are drawn once; lambda and L are learned;
    phi(h_{l+i}) ~ A_i phi(h_{l+i-1}).
Equation 2 names the kernel exp(-(x - y)' Sigma^-1 (x - y) / 2). However, frequencies with covariance Sigma give the
kernel with Sigma in the place of Sigma^-1. The module `kernel` fits these parts and lists what the paper leaves open.
"""
import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.states.block import gram, ridge_solve

Weight = Literal["none", "position", "position_depth", "step"]
"""The weights W of the cosine term of equation 5; see `cosine_weights`."""


class Lift(nn.Module):
    """phi with learnable lambda and L. The generator draws Z, V and b, which then stay fixed. The input is divided by
    `scale`."""

    def __init__(self, width: int, features: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        m = features // 2
        self.scale = scale
        self.register_buffer("z_DM", torch.randn(width, m, generator=generator))
        self.register_buffer("v_RM", torch.randn(rank, m, generator=generator))
        self.register_buffer("b_M", 2 * math.pi * torch.rand(m, generator=generator))
        self.lambda_D = nn.Parameter(torch.zeros(width))
        self.l_DR = nn.Parameter(torch.zeros(width, rank))

    def omega(self) -> Tensor:
        """Frequencies omega_DM, per unit of the lift's input."""
        # Omega = D^1/2 Z + L V,  D = diag(exp(lambda))
        return ((0.5 * self.lambda_D).exp()[:, None] * self.z_DM + self.l_DR @ self.v_RM) / self.scale

    def forward(self, x_ND: Tensor) -> Tensor:
        return features_of(x_ND, self.omega(), self.b_M)


def features_of(x_ND: Tensor, omega_DM: Tensor, b_M: Tensor) -> Tensor:
    """The features phi(x) as a matrix phi_NF, with F = 2 M. Every row of phi_NF has norm 1."""
    # phi(x) = (cos(Omega' x + b), sin(Omega' x + b)) / sqrt(m)
    angle_NM = x_ND @ omega_DM + b_M
    return torch.cat((angle_NM.cos(), angle_NM.sin()), dim=-1).div_(math.sqrt(len(b_M)))


class Operators(nn.Module):
    """A_i = I + gamma_i B_i for the layers of a block, one operator for each layer."""

    def __init__(self, layers: int, features: int) -> None:
        super().__init__()
        self.gamma_K = nn.Parameter(torch.ones(layers))
        self.b_KFF = nn.Parameter(torch.zeros(layers, features, features))

    def forward(self) -> Tensor:
        # A_i = I + gamma_i B_i
        return torch.eye(self.b_KFF.shape[-1], device=self.b_KFF.device) + self.gamma_K[:, None, None] * self.b_KFF

    @torch.no_grad()
    def start(self, a_KFF: Tensor) -> None:
        """Set B_i so that A_i is `a_KFF`. gamma_i is kept, unless it is nearly zero."""
        gamma_K = torch.where(self.gamma_K.abs() < 1e-3, torch.full_like(self.gamma_K, 1e-3), self.gamma_K)
        self.gamma_K.copy_(gamma_K)
        self.b_KFF.copy_((a_KFF - torch.eye(a_KFF.shape[-1], device=a_KFF.device)) / gamma_K[:, None, None])


class Loss(NamedTuple):
    """Equation 5 with means over tokens and sums over operators."""
    total: Tensor
    mse: Tensor
    """Sum over operators of the mean of |A_i phi - phi|^2."""
    cos: Tensor
    """Unweighted mean cosine over tokens and operators."""


def equation_5(a_KFF: Tensor, phi_KNF: Tensor, weight_KN: Tensor, *, chained: bool = False) -> Loss:
    """Loss of step 1, from K operators and from the features of K + 1 states.

    chained: whether only the last state is predicted, from the first state; otherwise each state is predicted from the
        previous one.
    """
    # one product for each operator: batched products take twice as long on a CPU, and slices have gradients of zeros
    states = phi_KNF.unbind()
    if chained:
        # phi^(h_{l+k}) = A_k ... A_1 phi(h_l)
        last_NF = functools.reduce(lambda phi_NF, a_FF: phi_NF @ a_FF.T, a_KFF, states[0])
        pairs, weight_KN = [(last_NF, states[-1])], weight_KN[-1:]
    else:
        pairs = [(before_NF @ a_FF.T, after_NF) for a_FF, before_NF, after_NF in
                 zip(a_KFF, states[:-1], states[1:], strict=True)]
    found = [_Compared.apply(predicted_NF, after_NF) for predicted_NF, after_NF in pairs]
    square_KN, cos_KN = (torch.stack(values) for values in zip(*found, strict=True))
    # |A_i phi(h_{l+i-1}) - phi(h_{l+i})|^2 + (1 - W * cos(A_i phi(h_{l+i-1}), phi(h_{l+i})))
    mse = square_KN.mean(-1).sum()
    return Loss(mse + (1 - weight_KN * cos_KN).mean(-1).sum(), mse, cos_KN.mean())


class _Compared(torch.autograd.Function):
    """|p - q|^2 and cos(p, q) of each row. The gradients are written by hand, because torch's own take three times as
    long."""

    @staticmethod
    def forward(ctx: Any, p_NF: Tensor, q_NF: Tensor) -> tuple[Tensor, Tensor]:
        r_NF = p_NF - q_NF
        p_N, q_N = (x_NF.norm(dim=-1).clamp_min(1e-8) for x_NF in (p_NF, q_NF))
        cos_N = torch.linalg.vecdot(p_NF, q_NF) / (p_N * q_N)
        ctx.save_for_backward(p_NF, q_NF, r_NF, p_N, q_N, cos_N)
        return torch.linalg.vecdot(r_NF, r_NF), cos_N

    @staticmethod
    def backward(ctx: Any, square_N: Tensor, slope_N: Tensor) -> tuple[Tensor, Tensor]:
        p_NF, q_NF, r_NF, p_N, q_N, cos_N = ctx.saved_tensors
        # d|r|^2 / dp = 2 r = -d|r|^2 / dq
        to_p_NF = r_NF * (2 * square_N)[:, None]
        to_q_NF = -to_p_NF
        # dcos / dp = q / (|p| |q|) - cos p / |p|^2, and the same for q
        both_N1 = (slope_N / (p_N * q_N))[:, None]
        to_p_NF.addcmul_(q_NF, both_N1).addcmul_(p_NF, (-slope_N * cos_N / p_N.square())[:, None])
        to_q_NF.addcmul_(p_NF, both_N1).addcmul_(q_NF, (-slope_N * cos_N / q_N.square())[:, None])
        return to_p_NF, to_q_NF


def cosine_weights(kind: Weight, positions_N: Tensor, length: int, layers: int, model_layers: int) -> Tensor:
    """W of equation 5 for each operator and token, weight_KN. The mean of W over a full sequence is 1; for `step` the
    mean over the operators is 1.

    The weights have base 2 and exponents from 0 to n - 1. `position` spreads the exponents over the positions of a
    sequence, and n is the number of the block's layers. `position_depth` differs from `position` only in n, which is
    the number of the model's layers. With 128 tokens and n = 32, half of the total weight is on the last four tokens.
    `step` gives the operator A_i the exponent i - 1. With `none`, W is 1 everywhere.
    """
    if kind == "none":
        return torch.ones(layers, len(positions_N))
    if kind == "step":
        weight_K = 2.0 ** torch.arange(layers)
        return (weight_K / weight_K.mean())[:, None].expand(layers, len(positions_N))
    top = (layers if kind == "position" else model_layers) - 1
    weight_T = 2.0 ** (top * torch.linspace(0, 1, length, dtype=torch.float64))
    return (weight_T / weight_T.mean()).float()[positions_N].expand(layers, -1)


def ols(phi_KNF: Tensor, ridge: float) -> Tensor:
    """Least-squares operators a_KFF: A_i = argmin |phi_{i-1} A_i' - phi_i|^2 + ridge, solved in float64."""
    return torch.stack([ridge_solve(gram(before_NF, before_NF), gram(before_NF, after_NF), ridge).T.float()
                        for before_NF, after_NF in itertools.pairwise(phi_KNF)])


def chain(a_KFF: Tensor) -> Tensor:
    """The product of all operators as one matrix, in float64: A_k ... A_1."""
    product_FF = torch.eye(a_KFF.shape[-1], dtype=torch.float64, device=a_KFF.device)
    for a_FF in a_KFF.double():
        product_FF = a_FF @ product_FF
    return product_FF
