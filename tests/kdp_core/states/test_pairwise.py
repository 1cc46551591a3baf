"""Distances of pairs of tokens beside NumPy's and SciPy's."""
import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from kdp_core.states.pairwise import median_distance, sampled_median_distance, squared_distances


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_distances_against_numpy():
    x_LND = randn(2, 11, 3).double()
    apart = [np.array([np.linalg.norm(x[i] - x[j]) for i in range(11) for j in range(i)]) for x in x_LND.numpy()]
    for layer in range(2):
        found_P = squared_distances(x_LND, x_LND @ x_LND.mT)[layer][tuple(torch.tril_indices(11, 11, offset=-1))].sqrt()
        np.testing.assert_allclose(found_P.numpy(), apart[layer], atol=1e-9)
        assert median_distance(x_LND[layer]) == pytest.approx(np.median(apart[layer]))


@pytest.mark.parametrize("count", [50, 33])
def test_the_sampled_median_distance_is_scipys(count):
    x_ND = randn(count, 4, seed=8)
    # torch takes the lower one of two middle values
    expected = np.quantile(pdist(x_ND.double().numpy()), 0.5, method="lower")
    generator = torch.Generator().manual_seed(0)
    assert sampled_median_distance(x_ND, generator) == pytest.approx(expected)
    sampled = sampled_median_distance(randn(500, 4, seed=9), generator, sample=100)
    assert sampled == pytest.approx(expected, rel=0.3) and sampled != pytest.approx(expected, rel=1e-6)


def test_the_median_distance_of_equal_tokens_can_divide():
    assert median_distance(torch.ones(5, 3)) == 1e-12
