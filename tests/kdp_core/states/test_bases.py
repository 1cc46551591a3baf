"""Bases of sliced states: found again from weights that were turned by known ones."""
import copy

import pytest
import torch

from kdp_core.methods import slicegpt
from kdp_core.model.families import FAMILIES, decoder_layers, family_of
from kdp_core.model.sliced import slice_widths
from kdp_core.states.bases import bases_of, mean_free
from tests import pico

D, E = 32, 20
NAMES = [name for name, family in FAMILIES.items() if not slicegpt.refuses(family)]


def orthonormal(seed):
    q_DD, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))
    return q_DD[:, :E]


@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_bases_that_turned_the_writers_are_found(family):
    dense = pico.lively(pico.model(family, layers=2))
    model, bases = copy.deepcopy(dense), [orthonormal(seed) for seed in range(3)]
    slice_widths(model, {"attention": [E, E], "mlp": [E, E], "final": E})
    record = family_of(dense)
    embedding_VD = mean_free(dense.get_input_embeddings().weight, record)
    model.get_input_embeddings().weight.copy_(embedding_VD @ bases[0])
    for layer, other, q_DE in zip(decoder_layers(dense), decoder_layers(model), bases[1:], strict=True):
        writer = record.parts["mlp"].writer
        w_DF = mean_free(layer.get_submodule(writer).weight.T, record).T
        other.get_submodule(writer).weight.copy_(q_DE.T @ w_DF)
    for found_DE, q_DE in zip(bases_of(dense, model), bases, strict=True):
        # the mean of a layer norm's state is written by nothing
        torch.testing.assert_close(found_DE, mean_free(q_DE.T, record).T, atol=2e-3, rtol=0)


def test_only_layer_norms_lose_their_mean():
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(mean_free(x, FAMILIES["opt"]), torch.tensor([[-1.0, 0, 1], [-1, 0, 1]]))
    assert torch.equal(mean_free(x, FAMILIES["llama"]), x)
