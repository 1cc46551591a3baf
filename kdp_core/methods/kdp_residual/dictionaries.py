"""The dictionary of a stand-in of kdp_residual. Each entry is a nonlinear function f(V x + c) of a normalised state x.

A variant of kdp_residual may choose any of these dictionaries, as in extended dynamic mode decomposition:
    neurons      neurons of the block's own MLPs; the fit keeps those whose removal would raise its loss most
    rff          random Fourier features, as in KDP
    rff_learned  the same with learned frequencies (kdp_core.methods.kdp_residual.projection)
    none         no entries, so that only the linear part remains
"""
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Block
from kdp_core.methods.kdp_residual import projection
from kdp_core.model.families import Family, activation_of, decoder_layers, family_of, matrix, norm_of
from kdp_core.model.stand_ins import normalised
from kdp_core.states.block import TokenWeight
from kdp_core.states.hidden import HiddenStates
from kdp_core.states.pairwise import sampled_median_distance

Kind = Literal["neurons", "rff", "rff_learned", "none"]
"""The dictionaries that a variant can choose."""
BANDWIDTH_SCALE = 3.0
"""Default of `compose` and of the search: kernel width of the random features, as a multiple of the median distance."""
RIDGE = 1e-4
"""Default of `compose` and of the search: the ridge of the regression, for features that are scaled to unit
variance."""
TOKEN_WEIGHT: TokenWeight = "inverse_norm"
"""Default of `compose` and of the search: how the squared errors of tokens are weighted."""
THETA_STEPS, THETA_LR = 30, 0.2
"""Defaults of `compose` and of the search for learned frequencies: the number of updates, and the learning rate."""


class Dictionary(NamedTuple):
    """Entries f(V x + c), where x is a normalised state; see kdp_core.model.stand_ins.Residual."""
    kind: str
    """glu, mlp or rff."""
    v_RD: Tensor
    """Each row is an entry. For glu, v_RD contains all rows of the gates V_1, followed by all rows of the factors
    V_2."""
    c_R: Tensor
    activation: str

    @property
    def entries(self) -> int:
        """Number of entries of the dictionary."""
        return len(self.v_RD) // (2 if self.kind == "glu" else 1)

    def only(self, entries: Tensor) -> "Dictionary":
        """A dictionary that contains only the entries with these numbers."""
        rows = torch.cat((entries, entries + self.entries)) if self.kind == "glu" else entries
        return self._replace(v_RD=self.v_RD[rows], c_R=self.c_R[rows])


class Fit(NamedTuple):
    """The options of `compose` that the fit in closed form needs."""
    dictionary: Kind
    entries: int
    bandwidth_scale: float
    ridge: float
    token_weight: TokenWeight
    norm: str
    massive_factor: float
    batch_sequences: int
    seed: int
    theta_steps: int = THETA_STEPS
    theta_lr: float = THETA_LR
    device: str | torch.device = "cpu"
    """The device on which products are computed and linear systems are solved."""


def closed_form_options(model: nn.Module, hidden: HiddenStates, *, dictionary: Kind, entries: int, seed: int) -> Fit:
    """The default options of `compose` for a single stand-in, which is fitted in batches of 8 sequences."""
    return Fit(dictionary, entries, BANDWIDTH_SCALE, RIDGE, TOKEN_WEIGHT, family_of(model).reads, hidden.massive_factor,
               8, seed, device=model.device)


def neurons(model: nn.Module, block: Block) -> Dictionary:
    """All MLP neurons of a block's layers. The weights include the gain and bias of the norm before the MLP."""
    family = family_of(model)
    parts = [_neurons_of(family, layer) for layer in decoder_layers(model)[slice(*block)]]
    kind = "glu" if family.gated else "mlp"
    halves = 2 if kind == "glu" else 1
    v_RD = torch.cat([v_RD.chunk(halves)[half] for half in range(halves) for v_RD, _ in parts])
    c_R = torch.cat([c_R.chunk(halves)[half] for half in range(halves) for _, c_R in parts])
    return Dictionary(kind, v_RD, c_R, activation_of(model))


@torch.no_grad()
def _neurons_of(family: Family, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weights v_RD and biases c_R of one layer's MLP neurons. The neurons read normalised states without gain and
    bias."""
    norm, linears = norm_of(layer, family, "mlp"), [layer.get_submodule(name) for name in family.parts["mlp"].readers]
    v_RD = torch.cat([matrix(linear) for linear in linears]).float()
    c_R = torch.cat([torch.zeros(len(matrix(linear))) if linear.bias is None else linear.bias.float().cpu()
                     for linear in linears])
    if norm is None:
        return v_RD.cpu(), c_R
    bias_D = getattr(norm, "bias", None)
    gain_D, bias_D = norm.weight + family.gain_offset, torch.zeros_like(norm.weight) if bias_D is None else bias_D
    # V (g * x + b) + c = (V g) x + (V b + c)
    return (v_RD * gain_D.float()).cpu(), v_RD.cpu() @ bias_D.float().cpu() + c_R


def random_features(x_ND: Tensor, entries: int, bandwidth_scale: float, seed: int) -> Dictionary:
    """Random Fourier features of an RBF kernel, whose width is `bandwidth_scale` times the states' median distance."""
    generator = torch.Generator().manual_seed(seed)
    width = bandwidth_scale * sampled_median_distance(x_ND, generator)
    v_RD = torch.randn(entries, x_ND.shape[1], generator=generator) / width
    return Dictionary("rff", v_RD, 2 * math.pi * torch.rand(entries, generator=generator), "relu")


def counted(h_STD: Tensor, y_STD: Tensor, massive_factor: float) -> tuple[Tensor, float]:
    """Two results: bool (S, T), true for tokens that are massive neither before nor after the block; and the limit of
    the norm above which a token bypasses the block."""
    norm_ST, goal_ST = h_STD.norm(dim=-1), y_STD.norm(dim=-1)
    above = massive_factor * norm_ST.median().item()
    return (norm_ST <= above) & (goal_ST <= massive_factor * goal_ST.median()), above


def candidates(model: nn.Module, block: Block, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Dictionary | None:
    """A block's dictionary, made from the sequences to fit on. The dictionary may contain more neurons than the final
    stand-in."""
    if fit.dictionary == "none":
        return None
    if fit.dictionary == "neurons":
        return neurons(model, block)
    h_ND = h_STD.flatten(0, 1)
    h_ND = h_ND[h_ND.norm(dim=1) <= fit.massive_factor * h_ND.norm(dim=1).median()]
    drawn = random_features(normalised(h_ND, fit.norm), fit.entries, fit.bandwidth_scale, fit.seed)
    return drawn if fit.dictionary == "rff" else _learned(drawn, h_STD, y_STD, fit)


def _learned(drawn: Dictionary, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Dictionary:
    """Learn the frequencies and phases of a random dictionary. The training uses the same tokens and token weights as
    the fit of the stand-in."""
    keep_ST, _ = counted(h_STD, y_STD, fit.massive_factor)
    h_ND, y_ND = h_STD[keep_ST], y_STD[keep_ST]
    weight_N = y_ND.square().sum(dim=1).reciprocal() if fit.token_weight == "inverse_norm" else torch.ones(len(y_ND))
    sequence_N = torch.arange(len(h_STD))[:, None].expand_as(keep_ST)[keep_ST]
    sample = projection.Sample(normalised(h_ND, fit.norm), y_ND - h_ND, weight_N, sequence_N)
    found = projection.learn(sample, drawn.v_RD, drawn.c_R, ridge=fit.ridge, steps=fit.theta_steps, lr=fit.theta_lr,
                             seed=fit.seed)
    return drawn._replace(v_RD=found.v_MD, c_R=found.c_M)
