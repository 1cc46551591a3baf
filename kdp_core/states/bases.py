"""The bases of a model whose states are sliced (SliceGPT), computed from its weights.

A sliced checkpoint need not contain its bases Q. If a matrix W of the dense model writes to a state, the sliced model
has the matrix Q' W in its place. So Q is the solution of a least-squares problem in the weights:
    W' W Q = W' (W Q),    W the transposed matrix that writes (the embedding, or the last matrix of an MLP).

Axes besides those of kdp_core.base.records: E kept directions.
"""
import torch
from torch import Tensor, nn

from kdp_core.model.families import Family, decoder_layers, family_of
from kdp_core.states.block import ridge_solve

RIDGE = 1e-12
"""The ridge of the least-squares problem, as a share of the mean of the diagonal of W' W."""


def mean_free(x: Tensor, family: Family) -> Tensor:
    """x minus its mean over the last axis, if the family has layer norms, which subtract this mean. If the family has
    no layer norms, x is returned unchanged."""
    return x - x.mean(dim=-1, keepdim=True) if family.mean_free else x


@torch.no_grad()
def bases_of(dense: nn.Module, sliced: nn.Module) -> list[Tensor]:
    """Bases q_DE, float32: one for the state before each layer, and one for the last state. A state of the dense model
    is about s Q', where s is the state of the sliced model and Q is the basis. If the model has layer norms, s Q' is
    the dense model's state minus the mean of this state.

    The bases are only as exact as the precision in which the weights are stored.
    """
    family = family_of(dense)
    writers = [(dense.get_input_embeddings().weight, sliced.get_input_embeddings().weight)]
    for layer, other in zip(decoder_layers(dense), decoder_layers(sliced), strict=True):
        path = family.parts["mlp"].writer
        writers.append((layer.get_submodule(path).weight.T, other.get_submodule(path).weight.T))
    made = []
    for w_FD, w_FE in writers:
        w_FD, w_FE = mean_free(w_FD.double().cpu(), family), w_FE.double().cpu()
        # W'W Q = W' (W Q); the states of a layer norm lack one direction, which the ridge sets to 0
        made.append(ridge_solve(w_FD.T @ w_FD, w_FD.T @ w_FE, RIDGE).float())
    return made
