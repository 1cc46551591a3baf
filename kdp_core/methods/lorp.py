"""LoRP, locality-aware redundancy pruning: removes layers that are similar to many other layers, from all depths of the
model.

LoRP uses the cosine S of all pairs of layer inputs (unit vectors, mean over tokens):
    RLS = -log2(mean of S_ij over i < j): 2 clusters if RLS >= 1, 3 if RLS >= 0.7, otherwise 4;
    clusters: spectral clustering with affinity (S + 1) / 2; they are numbered by their first layers;
    r_l = mean of S_lm over the other members m of l's cluster: inside a cluster, layers are removed by descending r.
In stage 1, one layer of each cluster is removed, in order of depth. Stage 2 removes further layers, one at a time. Each
layer is removed from the cluster whose remaining members are most similar (mean S of their pairs). The first and the
last layer are never removed, but they are members of their clusters.

Source: the released code (daniel-eai, June 2026). The released code and `lorp` compute S over all tokens. `lorp_masked`
is our variant: S is computed without massive tokens. If no cluster has two members left, a layer is removed from the
first cluster with a candidate. If two layers have equal r, the lower layer is removed first. If two clusters are
equally similar, a layer is removed from the cluster with the lower number first.
"""
import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kdp_core.base import options
from kdp_core.base.options import Count, Share
from kdp_core.base.records import ModelFacts, Search, Selection, Similarity
from kdp_core.methods._method import Method
from kdp_core.methods._select import BlockError, Match, in_order
from kdp_core.states.similarity import locality

PROTECTED = 1
"""Number of layers at each end that are never removed."""
THRESHOLDS = ((1.0, 2), (0.7, 3))
"""(smallest RLS, number of clusters from this RLS on)."""
MOST_CLUSTERS = 4


Read = Literal["cosine_all_LL", "cosine_LL"]
"""The cosines over all tokens, or over the tokens that the similarity stage did not mask."""


def spreading(method: str, read: Read) -> Callable[..., Selection]:
    """Make the function `select` of a method that clusters layers by cosines. `read` is the name of the field of the
    similarity that contains these cosines."""

    def spread(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
               clusters: Count | None = None, seed: int = 0, match: Match = "nearest") -> Selection:
        """Select layers for a ratio, as LoRP does.

        ratio: share of all parameters to remove, 0 to 1.
        k_max: not read.
        module_params: parameters of the module that replaces a layer.
        clusters: number of clusters; null derives it from RLS.
        seed: seed of the clustering.
        match: with `nearest` the removed share is nearest to the ratio, with `reach` at least the ratio.
        """
        options.check(spread, locals())
        if read == "cosine_LL" and similarity.treatment != "mask":
            raise BlockError(f"{method} needs cosines without massive tokens, and similarity.treatment is "
                             f"{similarity.treatment}; set it to mask, or use lorp")
        s_LL = _inputs(getattr(similarity, read), similarity.layers, facts.layers)
        rls = locality(s_LL)
        if rls is None:
            raise BlockError(f"{method} needs a positive mean cosine of all pairs of layers; in this model the mean is "
                             "not positive, so use another method")
        count = clusters if clusters is not None else next((k for bound, k in THRESHOLDS if rls >= bound),
                                                           MOST_CLUSTERS)
        if count >= facts.layers:
            raise BlockError(f"block.clusters {count}: must be below the number of layers, {facts.layers}")
        order, redundancy = ordered(s_LL, labels(s_LL, count, seed))
        found = Search(order, [redundancy[layer] for layer in order], "redundancy", k_max, {}, 0, {})
        return in_order(found, facts, ratio=ratio, k_max=k_max, module_params=module_params, match=match)

    return spread


def _inputs(cosine_LL: Tensor, stored: list[int], layers: int) -> Tensor:
    """S of the inputs of all layers in float64, from the cosines of all stored states."""
    missing = [layer for layer in range(layers) if layer not in stored]
    if missing:
        raise BlockError(f"similarity lacks state {missing[0]}; set hidden.layers to all")
    places = [stored.index(layer) for layer in range(layers)]
    return cosine_LL[places][:, places].double()


def labels(s_LL: Tensor, clusters: int, seed: int) -> list[int]:
    """The cluster number of each layer. The clusters are numbered in the order of their first layers."""
    from sklearn.cluster import SpectralClustering  # imported here, because the import takes a second

    found = SpectralClustering(clusters, affinity="precomputed", assign_labels="kmeans", random_state=seed).fit_predict(
        ((s_LL + 1) / 2).numpy()).tolist()
    number = {label: place for place, label in enumerate(dict.fromkeys(found))}
    return [number[label] for label in found]


def ordered(s_LL: Tensor, cluster: list[int]) -> tuple[list[int], list[float]]:
    """All removable layers in order of removal, and the redundancy r of every layer."""
    layers = len(cluster)
    members = [[layer for layer in range(layers) if cluster[layer] == k] for k in range(max(cluster) + 1)]
    redundancy = [-math.inf] * layers
    for group in members:
        for layer in group:
            others = [other for other in group if other != layer]
            if others:
                # r_l = mean_{m in C(l), m != l} S_lm
                redundancy[layer] = s_LL[layer, others].mean().item()
    queues = [sorted((layer for layer in group if PROTECTED <= layer < layers - PROTECTED),
                     key=lambda layer: (-redundancy[layer], layer)) for group in members]
    # stage 1: one layer of each cluster is removed, in order of depth
    removed = [queue.pop(0) for queue in queues if queue]
    while any(queues):
        # stage 2: a layer of the cluster whose remaining members are most similar is removed
        alike = [_alike(s_LL, [layer for layer in group if layer not in removed]) if queue else -math.inf
                 for group, queue in zip(members, queues, strict=True)]
        first = next(k for k, queue in enumerate(queues) if queue)
        best = max(range(len(queues)), key=lambda k: (alike[k], -k))
        removed.append(queues[best if alike[best] > -math.inf else first].pop(0))
    return removed, redundancy


def _alike(s_LL: Tensor, group: list[int]) -> float:
    """Mean S of all pairs of the group; -inf if there are no pairs."""
    pairs = [s_LL[a, b].item() for place, a in enumerate(group) for b in group[place + 1:]]
    return sum(pairs) / len(pairs) if pairs else -math.inf


METHODS = (
    Method("lorp", "LoRP 2026, locality-aware redundancy pruning: each cluster of layers loses one in turn",
           "layers removed", spreading("lorp", "cosine_all_LL"), example={"block": {"clusters": 2}}),
    Method("lorp_masked", "LoRP 2026 with massive tokens left out, a variant of ours", "layers removed",
           spreading("lorp_masked", "cosine_LL"), example={"block": {"clusters": 2}}),
)
