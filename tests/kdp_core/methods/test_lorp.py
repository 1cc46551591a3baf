"""LoRP against a literal NumPy reading of its rules, and its edge cases."""
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering

from kdp_core.base.records import Similarity
from kdp_core.methods import METHODS
from kdp_core.methods._select import BlockError
from kdp_core.methods.lorp import labels, ordered
from kdp_core.states.similarity import locality
from tests.kdp_core.methods.test_select import facts

spread, spread_masked = METHODS["lorp"].select, METHODS["lorp_masked"].select


def cosines(layers: int, seed: int = 0, decay: float = 6.0) -> torch.Tensor:
    """Neighbours alike, with noise: two or three soft groups."""
    generator = torch.Generator().manual_seed(seed)
    place_L = torch.arange(layers, dtype=torch.float64)
    noise_LL = 0.1 * torch.rand(layers, layers, generator=generator, dtype=torch.float64)
    s_LL = 0.9 * torch.exp(-(place_L[:, None] - place_L).abs() / decay) + (noise_LL + noise_LL.T) / 2
    return s_LL.fill_diagonal_(1.0)


def of(s_LL: torch.Tensor, masked_LL: torch.Tensor | None = None, treatment: str = "mask") -> Similarity:
    """Cosines of all tokens, and others without massive ones; one state more than layers, as the stage gives it."""
    undefined_LL = torch.full_like(s_LL, math.nan)
    fields = [torch.nn.functional.pad(one_LL, (0, 1, 0, 1), value=0.5)
              for one_LL in (undefined_LL if masked_LL is None else masked_LL, *[undefined_LL] * 4, s_LL)]
    return Similarity(list(range(len(s_LL) + 1)), *fields, treatment, 1, 0)


def literal(s, n, clusters, seed=0):
    """The rules one by one."""
    N = len(s)
    found = SpectralClustering(n_clusters=clusters, affinity="precomputed", assign_labels="kmeans",
                               random_state=seed).fit_predict((s + 1) / 2)
    names = {}
    for label in found:
        names.setdefault(label, len(names))
    groups = [[i for i in range(N) if names[found[i]] == k] for k in range(len(names))]
    r = np.full(N, -np.inf)
    for g in groups:
        for i in g:
            if len(g) > 1:
                r[i] = (s[i, g].sum() - s[i, i]) / (len(g) - 1)
    queue = [sorted([i for i in g if i not in (0, N - 1)], key=lambda i: (-r[i], i)) for g in groups]
    gone = []
    for q in queue:
        if q and len(gone) < n:
            gone.append(q.pop(0))
    while len(gone) < n:
        score = []
        for g, q in zip(groups, queue, strict=True):
            left = [i for i in g if i not in gone]
            block = s[np.ix_(left, left)]
            score.append((block.sum() - np.trace(block)) / (len(left) * (len(left) - 1)) if q and len(left) > 1
                         else -np.inf)
        pick = int(np.argmax(score)) if max(score) > -np.inf else [bool(q) for q in queue].index(True)
        gone.append(queue[pick].pop(0))
    return gone


@pytest.mark.parametrize("clusters", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_layers_are_those_of_the_rules_to_the_letter(clusters, seed):
    s_LL = cosines(12, seed)
    order, redundancy = ordered(s_LL, labels(s_LL, clusters, 0))
    assert order == literal(s_LL.numpy(), 10, clusters)
    found = spread(of(s_LL), facts(12), ratio=500 / 1700, k_max=3, module_params=0, clusters=clusters)
    assert [start for start, _ in found.blocks] == sorted(order[:5]) and found.layers == 5
    assert found.scores == [redundancy[start] for start, _ in found.blocks] and found.criterion == "redundancy"


@pytest.mark.parametrize("mean, clusters", [(0.5, 2), (0.49, 2), (0.6, 3), (0.615, 3), (0.62, 4), (0.95, 4)])
def test_the_number_of_clusters_follows_the_locality_score(mean, clusters):
    # RLS of equal cosines is -log2 of them: 1 at 0.5, 0.7 at 0.6156
    s_LL = torch.full((12, 12), mean, dtype=torch.float64).fill_diagonal_(1.0) + 1e-9 * cosines(12)
    assert locality(s_LL) == pytest.approx(-math.log2(mean), abs=1e-6)
    s_LL = (s_LL - 1e-6) if mean == 0.5 else s_LL
    found, asked = (spread(of(s_LL), facts(12), ratio=0.3, k_max=3, module_params=0, clusters=k)
                    for k in (None, clusters))
    assert found == asked


def test_ends_stay_and_every_other_layer_can_go():
    order, _ = ordered(cosines(9), labels(cosines(9), 3, 0))
    assert sorted(order) == list(range(1, 8))


def test_a_cluster_of_its_own_goes_in_the_first_stage():
    """It resembles none of its cluster, since it is alone there: the rule still takes one of each."""
    order, redundancy = ordered(cosines(6), [0, 0, 1, 2, 2, 2])
    assert order[:3] == [1, 2, max((3, 4), key=lambda layer: redundancy[layer])] and redundancy[2] == -math.inf


def test_once_no_cluster_has_two_left_the_first_with_a_candidate_gives():
    order, _ = ordered(torch.full((5, 5), 0.3, dtype=torch.float64), [0, 1, 1, 2, 2])
    # stage 1: 1 and 3; then no pair with a candidate is left but (2,) of cluster 1: 4 is protected
    assert order == [1, 3, 2]


@pytest.mark.parametrize("options, message", [
    ({"ratio": 0.7}, r"the 10 layers that the search ordered remove at most 0\.588"),
    ({"clusters": 12}, r"block\.clusters 12: must be below the number of layers, 12"),
    ({"ratio": -0.1}, r"ratio is -0\.1; give a number above 0"),
    ({"match": "over"}, "match is 'over'; choose one of nearest, reach"),
])
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        spread(of(cosines(12)), facts(12), **{"ratio": 0.3, "k_max": 3, "module_params": 0, **options})


def test_lorp_counts_all_tokens_whatever_the_treatment_and_lorp_masked_leaves_massive_ones_out():
    every_LL, masked_LL = cosines(12, 0), cosines(12, 3)
    options = {"ratio": 0.3, "k_max": 3, "module_params": 0}
    first, second = (spread(of(one_LL), facts(12), **options) for one_LL in (every_LL, masked_LL))
    assert first.blocks != second.blocks
    for treatment in ("mask", "normalise", "raw"):
        assert spread(of(every_LL, masked_LL, treatment), facts(12), **options) == first
    assert spread_masked(of(every_LL, masked_LL), facts(12), **options) == second
    with pytest.raises(BlockError, match=r"lorp_masked needs .* similarity\.treatment is raw; set it to mask"):
        spread_masked(of(every_LL, masked_LL, "raw"), facts(12), **options)


def test_a_missing_state_and_a_mean_below_zero_are_told():
    short = of(cosines(12))._replace(layers=[0, *range(2, 14)])
    with pytest.raises(BlockError, match=r"lacks state 1; set hidden\.layers to all"):
        spread(short, facts(12), ratio=0.3, k_max=3, module_params=0)
    with pytest.raises(BlockError, match="lorp needs a positive mean cosine of all pairs of layers"):
        spread(of(torch.full((4, 4), -0.2, dtype=torch.float64)), facts(4), ratio=0.3, k_max=3, module_params=0)
