"""Computes the numbers for two kinds of figures: features in the kernel space, and paths of states through the layers.

Paper: KDP (ICLR 2026), Figures 4, 9 and 10. Figures 4 and 9 show predicted A_k ... A_1 phi(h_l) next to true
phi(h_{l+k}) at positions 0, 25 and 50 of a sequence. Figure 10 shows a t-SNE of 100 samples at every layer, in which
the paper sees "a strong linear trend".

The paper leaves details of its figures open, and some of its figures would mislead. This module therefore makes the
following choices:
- The paper shows "a sample from CMMLU". This module shows a held-out sequence: step 1 and step 2 of KDP were not fitted
  on this sequence.
- With a wide kernel, the features of all tokens stay close to their mean. On layers 14-15 of SmolLM2, the squared norm
  of this mean is 95 % of the mean of |phi|^2. Because of this mean, even the prediction that the features do not change
  has an error below 1 %. The view therefore subtracts the mean of the true features over the training tokens. Each
  error is given twice: with the mean, and with the mean subtracted.
- The token at position 0 is often massive, and massive tokens bypass the stand-in. In this case, the view shows the
  next position whose token does not bypass the stand-in.
- Each sample is one sequence. The view shows one token of each sample at every layer: the last token that is massive at
  no layer. A late token is chosen, because it attends to a long text.
- t-SNE preserves neighbours, but it does not preserve straight lines. In a plot whose third axis is the layer, every
  path looks straight. `straightness` is therefore also measured on the states themselves. In the space of states and in
  the plane of t-SNE, the paths are compared with unrelated walks: walks with steps of the same lengths, but random
  directions. On SmolLM2 the mean cosine between a step and the next step is 0.05 in the space of states and 0.87 in the
  plane of t-SNE. In the plane of t-SNE, the mean cosine of the unrelated walks is 0.96, so the linear trend comes from
  t-SNE. Other measures also show unrelated walks as straight in a space of many dimensions: 6/pi^2 of the variance of a
  walk lies on its first principal axis. Every measure is therefore also given for the unrelated walks.
In this module, a "step" of a path means the change of a state from one layer to the next layer.
"""
import itertools
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.measurements import KernelView, Trajectories
from kdp_core.base.options import Count, Natural, Positive
from kdp_core.base.records import KernelMap
from kdp_core.methods.kdp.features import chain, features_of
from kdp_core.states.block import BlockStates, lift_input, load
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
SEED = 0
"""Seed of t-SNE and of the unrelated walks."""


class ViewError(ValueError):
    """The figures cannot be computed from the stored states."""


class Paths(NamedTuple):
    """States of S samples at L layers, and the coordinates of these states in t-SNE.

    `walk_SLD` and `walk_xz_SL2` are the points and the coordinates of the unrelated walks.
    """
    layers: list[int]
    sequences: list[int]
    tokens: list[int]
    """Position of each sample's token."""
    h_SLD: Tensor
    xz_SL2: Tensor
    walk_SLD: Tensor
    """The unrelated walks: walks with the same first states and step lengths, but with steps of random directions."""
    walk_xz_SL2: Tensor


class Straightness(NamedTuple):
    """How straight paths are. Each field is a mean over samples; each field is 1 if all paths are straight lines."""
    chord: float
    """Distance between the first and the last point, divided by the length of the path."""
    turn: float
    """Mean cosine between two consecutive steps of a path."""
    axis: float
    """Share of the variance of a path's points that lies on their first principal axis."""


def kernel_view(hidden: HiddenStates, kernel: KernelMap, heldout: float = 0.1, seed: int = 0, *,
                positions: list[Natural] | None = None) -> KernelView:
    """Features after a trained block: predicted and true features of the first held-out sequence of step 1.

    heldout, seed: as in step 1, so that the same sequences are held out.
    positions: positions whose tokens are shown. If a token bypasses the stand-in, the next token that does not bypass
        the stand-in is shown instead. Each token is shown once. null means 0, 25 and 50.
    Raises OptionError for a negative position, and ViewError if every token at or after the positions bypasses the
    stand-in.
    """
    options.check(kernel_view, locals())
    massive = "raw" if kernel.bypass_above is None else "bypass"
    states = load(hidden, kernel.block, massive=massive, heldout=heldout, seed=seed, between=False)
    which = states.heldout[0]
    shown = _counted(states.keep_ST[which], [0, 25, 50] if positions is None else positions)
    mean_F = _features(kernel, states.tokens(states.train)[-1]).mean(0)
    first_PD, last_PD = states.h_KSTD[[0, -1], which][:, shown]
    # A_k ... A_1 phi(h_l) next to phi(h_{l+k})
    predicted_PF = _features(kernel, first_PD) @ chain(kernel.operators_KFF).float().T
    true_PF = _features(kernel, last_PD)
    miss_P = (predicted_PF - true_PF).square().sum(-1)
    return KernelView(kernel.block, int(which), shown, predicted_PF - mean_F, true_PF - mean_F, mean_F,
                      (miss_P / (true_PF - mean_F).square().sum(-1)).tolist(),
                      (miss_P / true_PF.square().sum(-1)).tolist(), *_overall(kernel, states, mean_F))


def _counted(keep_T: Tensor, positions: list[int]) -> list[int]:
    """For each position p of `positions`, the first position at or after p at which keep_T is true, if there is one."""
    counted = keep_T.nonzero().flatten().tolist()
    found = [next((place for place in counted if place >= asked), None) for asked in sorted(positions)]
    shown = list(dict.fromkeys(place for place in found if place is not None))
    if not shown:
        raise ViewError(f"views.heatmaps.positions is {positions}, but the sequence has {len(keep_T)} tokens, and none "
                        "of those at or after these positions counts; give earlier positions")
    return shown


def _features(kernel: KernelMap, h_ND: Tensor) -> Tensor:
    return features_of(lift_input(h_ND, kernel.lift_input), kernel.omega_DM, kernel.b_M)


def _overall(kernel: KernelMap, states: BlockStates, mean_F: Tensor) -> tuple[float, float, float]:
    """Over held-out tokens: the error, the error of the prediction that phi does not change, and the mean's share of
    |phi|^2."""
    before_NF, after_NF = (_features(kernel, h_ND) for h_ND in states.tokens(states.heldout))
    variance = (after_NF - mean_F).square().sum()
    misses = [(guess_NF - after_NF).square().sum() / variance
              for guess_NF in (before_NF @ chain(kernel.operators_KFF).float().T, before_NF)]
    return misses[0].item(), misses[1].item(), (mean_F.square().sum() / after_NF.square().sum(-1).mean()).item()


def paths(hidden: HiddenStates, *, samples: Count = 100, perplexity: Positive = 30.0) -> Paths:
    """States of one token of each sequence at every stored layer, and the positions of all these states in one t-SNE.

    A second t-SNE, of unrelated walks, shows what t-SNE itself adds to the picture.

    samples: number of sequences, from the first sequence on; all sequences if fewer are stored.
    perplexity: perplexity of t-SNE, roughly the number of neighbours that influence the position of a point.
    Raises OptionError for a value out of range, and ViewError for too few points. Also raises ViewError if every token
    of a sequence is massive at some layer.
    """
    options.check(paths, locals())
    S = min(samples, hidden.sequences)
    if S * len(hidden.layers) <= 3 * perplexity:
        raise ViewError(f"views.trajectories.perplexity is {perplexity:g}, but {S} samples at {len(hidden.layers)} "
                        f"layers are {S * len(hidden.layers)} points; give less than a third of them")
    tokens_S = _last_ordinary(hidden)[:S]
    h_SLD = torch.stack([hidden.state(layer)[torch.arange(S), tokens_S] for layer in hidden.layers], dim=1)
    walk_SLD = unrelated_walk(h_SLD, torch.Generator().manual_seed(SEED))
    logger.info("t-SNE of %d points, twice", S * len(hidden.layers))
    xz_SL2, walk_xz_SL2 = (_tsne(points_SLD, perplexity) for points_SLD in (h_SLD, walk_SLD))
    return Paths(list(hidden.layers), list(range(S)), tokens_S.tolist(), h_SLD, xz_SL2, walk_SLD, walk_xz_SL2)


def _last_ordinary(hidden: HiddenStates) -> Tensor:
    """For each sequence, the position of the last token that is not massive at any layer, int64 (S,)."""
    ordinary_ST = ~hidden.massive(hidden.layers)
    if not ordinary_ST.any(-1).all():
        raise ViewError(f"{hidden.path}: sequence {int((~ordinary_ST.any(-1)).nonzero()[0])} has no token that is "
                        "ordinary at every layer; raise hidden.massive_factor")
    return ordinary_ST.shape[1] - 1 - ordinary_ST.flip(-1).int().argmax(-1)


def _tsne(points_SLD: Tensor, perplexity: float) -> Tensor:
    """Coordinates xz_SL2 of all points in one t-SNE."""
    # imported here, because scikit-learn takes seconds to load and nothing else in the library needs it
    from sklearn.manifold import TSNE

    # t-SNE starts from the principal axes, because this start keeps the order of the layers
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED)
    xz_N2 = torch.from_numpy(tsne.fit_transform(points_SLD.flatten(0, 1).numpy()))
    return xz_N2.unflatten(0, points_SLD.shape[:2])


def trajectories(hidden: HiddenStates, *, samples: Count = 100, perplexity: Positive = 30.0) -> Trajectories:
    """The paths of the states, and the straightness of the paths. The options and exceptions are those of `paths`."""
    found = paths(hidden, samples=samples, perplexity=perplexity)
    return Trajectories(found.layers, found.sequences, found.tokens, found.xz_SL2, straightness_table(found),
                        own_neighbour(found))


def straightness(h_SLD: Tensor) -> Straightness:
    """How straight the paths of S samples through L points are, in a space of any width.

    Raises ViewError for fewer than three points.
    """
    if h_SLD.shape[1] < 3:
        raise ViewError(f"a path of {h_SLD.shape[1]} points has no bend to measure; give three or more points")
    h_SLD = h_SLD.double()
    steps_SKD = h_SLD.diff(dim=1)
    # |h_L - h_0| / sum |h_{l+1} - h_l|
    chord_S = (h_SLD[:, -1] - h_SLD[:, 0]).norm(dim=-1) / steps_SKD.norm(dim=-1).sum(-1)
    turn_SK = torch.cosine_similarity(steps_SKD[:, :-1], steps_SKD[:, 1:], dim=-1)
    # sigma_1^2 / sum sigma^2 of the centred points
    variances_SL = torch.linalg.svdvals(h_SLD - h_SLD.mean(1, keepdim=True)).square()
    axis_S = variances_SL[:, 0] / variances_SL.sum(-1)
    return Straightness(chord_S.mean().item(), turn_SK.mean().item(), axis_S.mean().item())


def unrelated_walk(h_SLD: Tensor, generator: torch.Generator) -> Tensor:
    """Walks h_SLD with the first points and the step lengths of the given paths; every step has a random direction."""
    lengths_SK1 = h_SLD.diff(dim=1).norm(dim=-1, keepdim=True)
    random_SKD = torch.randn(h_SLD[:, 1:].shape, generator=generator, dtype=h_SLD.dtype)
    steps_SKD = lengths_SK1 * random_SKD / random_SKD.norm(dim=-1, keepdim=True)
    return torch.cat((h_SLD[:, :1], h_SLD[:, :1] + steps_SKD.cumsum(1)), dim=1)


def straightness_table(found: Paths) -> list[dict[str, float | int | str]]:
    """Straightness of the paths and of the unrelated walks: one row for each pair of a space and a run of layers.

    The spaces are `states` and `t-SNE` (its plane, without the axis of the layers). `all` is the run of all layers.
    `inner` is the run without a tenth of the layers at each end; the paper removes layers only from this run. `3 steps`
    to `6 steps` are means over all runs of 3 to 6 steps within `inner`; the paper uses 3 to 6 as K_max.
    """
    edge = round(0.1 * (len(found.layers) - 1))
    inner = slice(edge, len(found.layers) - edge)
    steps = range(3, min(7, inner.stop - inner.start))
    rows = []
    for space, pair in (("states", (found.h_SLD, found.walk_SLD)), ("t-SNE", (found.xz_SL2, found.walk_xz_SL2))):
        runs = {"all": (slice(None), None), "inner": (inner, None), **{f"{k} steps": (inner, k) for k in steps}}
        for name, (where, length) in runs.items():
            layers = found.layers[where]
            measured, unrelated = (_mean_straightness(points_SLD[:, where], length) for points_SLD in pair)
            rows.append({"space": space, "run": name, "layer_first": layers[0], "layer_last": layers[-1],
                         **measured._asdict(), **{f"{field}_unrelated": value
                                                  for field, value in unrelated._asdict().items()}})
    return rows


def _mean_straightness(points_SLD: Tensor, length: int | None) -> Straightness:
    """Mean straightness of all runs of `length` steps. If `length` is None, the straightness of the whole paths."""
    if length is None:
        return straightness(points_SLD)
    parts = [straightness(part_SDL.mT) for part_SDL in points_SLD.unfold(1, length + 1, 1).unbind(1)]
    return Straightness(*(sum(values) / len(parts) for values in zip(*parts, strict=True)))


def own_neighbour(found: Paths) -> float:
    """Share of states whose nearest other state, among all samples and layers, belongs to the same sample."""
    S, L, D = found.h_SLD.shape
    h_ND, owner_N = found.h_SLD.reshape(S * L, D), torch.arange(S).repeat_interleave(L)
    nearest = []
    for part_ND, offset in zip(h_ND.split(1024), itertools.count(0, 1024), strict=False):
        distance_BN = torch.cdist(part_ND, h_ND)
        distance_BN[torch.arange(len(part_ND)), offset + torch.arange(len(part_ND))] = float("inf")
        nearest.append(distance_BN.argmin(-1))
    return (owner_N[torch.cat(nearest)] == owner_N).float().mean().item()
