"""LLM-Pruner (Ma et al. 2023, arXiv 2305.11627): the heads and MLP channels that matter least to the loss are removed.

Weights that depend on each other are removed together, in the units of the module `units`: a key-value head with the
consecutive query heads that read it, or an MLP channel.

L is the mean loss of the next token, and L_i the loss of sequence i of n. With g = dL/dW and a = 1/n sum_i (dL_i/dW)^2,
the score of a weight estimates how the loss changes if the weight is removed. The estimate is of first or second order.
The second order uses a as the diagonal of the Hessian and ignores the other entries of the Hessian:
    first: s = W g,    second: s = W^2 a,    mix: s = W g - W^2 a / 2
The score of a unit is the sum of |s| over all its weights (`element`), or the sum of |sum of s| over its rows and
columns (`vector`; a bias counts as a row). In each layer the units with the lowest scores are removed. If two units
have equal scores, the unit with the lower number is removed.

Sizes. The first and the last layers are kept whole. From all other layers the same share of heads is removed, rounded
to whole units. Then channels are removed until the ratio is met. The number of removed channels differs by at most one
between layers. The removed share of ALL parameters therefore differs from the ratio by at most half a channel of one
layer. At least one unit of each part is kept.

Where we differ from the released code (horseee/LLM-Pruner 128a07d):
    In the released code, the ratio is a share of the pruned layers: 0.25 removes 19.5 % of LLaMA-7B. Each part is
        rounded separately.
    For grouped heads, the released code adds the scores of query heads h, h + K, h + 2K, .. to key-value head h of K.
        In the model, consecutive query heads share a key-value head. Here these query heads are removed together.
    The released code reads 10 passages of 64 tokens of BookCorpus; here 10 calibration sequences are read.
    The released code keeps the gradients of the whole model in memory. Here only the gradients of one layer are in
        memory at a time (kdp_core.methods._judge).
    The released code cannot prune OPT.
    The released code fine-tunes all layers on instructions. Here fine-tuned variants of this method are trained like
        those of other methods.
"""
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.options import Count, Natural
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._judge import Judge, backward, judge_of, picked
from kdp_core.methods._method import Method
from kdp_core.methods._select import ROUNDING, BlockError, no_layer
from kdp_core.methods.heads_channels.units import (
    PARTS,
    Coupled,
    Sizes,
    layout,
    narrow_tensors,
    no_single_heads,
    width_of,
)
from kdp_core.model import checkpoints
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)

Importance = Literal["first", "second", "mix"]
"""Order of the expansion of the loss."""
Grouping = Literal["element", "vector"]
"""Whether the importance of a unit is the sum over single weights, or over whole rows and columns."""


class Cut(NamedTuple):
    """The numbers of units to remove from the pruned layers."""
    groups: int
    """Number of key-value heads to remove from each layer."""
    channels: list[int]
    """Number of channels to remove from each layer; the numbers differ by at most one."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", importance: Importance = "first", grouping: Grouping = "element",
            sequences: Count | None = 10,
            keep_first: Natural | None = None, keep_last: Natural | None = None, batch_sequences: Count = 10,
            seed: int = 0) -> Composed:
    """Remove heads and MLP channels from layers.

    importance: `first`, `second` or `mix`: order of the expansion of the loss.
    grouping: `element` sums the scores of single weights, `vector` sums the scores of whole rows and columns.
    sequences: number of calibration sequences whose loss is differentiated. null, or a number that is too large, means
        all sequences.
    keep_first: number of layers at the start that are kept whole. null means 4 (as in the released code), or an eighth
        of the layers if that is less.
    keep_last: number of layers at the end that are kept whole. null means 2, or a sixteenth of the layers if that is
        less.
    batch_sequences: number of sequences in one forward pass; for squared gradients each pass has one sequence. If all
        sequences are in one pass, no layer runs twice, but the activations of all layers are in memory.
    seed: seed of the choice of sequences.
    Raises BlockError for a ratio that cannot be reached or if no layer is left to prune. Raises FitError for a model
    that cannot be pruned and for other wrong options.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config, coupled, sizes, total, _ = layout("llm_pruner", dense)
    pruned = between(config.num_hidden_layers, keep_first, keep_last)
    sizes = sizes._replace(layers=len(pruned))
    cut = cut_for(selection.ratio_target, total, sizes)
    ids_ST = picked(tokens, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    judge = judge_of(model, ids_ST, batch_sequences, graphs=importance == "first")
    tensors, widths, entries = {}, [width_of(config, sizes, 0, 0)] * config.num_hidden_layers, []
    for number, worths in worths_by_layer(judge, pruned, coupled, sizes.units, importance, grouping):
        lost = {"attention": cut.groups, "mlp": cut.channels[number - pruned.start]}
        kept = {part: _kept(worths[part], lost[part], number) for part in PARTS}
        tensors |= narrow_tensors(model, number, coupled, kept, sizes)
        widths[number] = width_of(config, sizes, lost["attention"], lost["mlp"])
        removed = sorted(set(range(sizes.groups)) - set(kept["attention"].tolist()))
        entries.append({"layer": number, "groups": removed, "channels": lost["mlp"]})
        logger.info("layer %d: %d of %d head groups and %d of %d channels are removed", number, len(removed),
                    sizes.groups, lost["mlp"], sizes.channels)
    share = (len(pruned) * cut.groups * sizes.group_params + sum(cut.channels) * sizes.channel_params) / total
    return Composed(Plan("llm_pruner", [], [], tensors, shape={"widths": widths}), [], [],
                    {"tokens": ids_ST.numel(), "sequences": len(ids_ST), "layers": entries[::-1], "share": share,
                     "seconds": time.perf_counter() - began})


# Sizes ----------------------------------------------------------------------------------------------------------------

def between(layers: int, keep_first: int | None, keep_last: int | None) -> range:
    """The layers that are pruned. Raises BlockError if all layers are kept."""
    first = min(4, round(layers / 8)) if keep_first is None else keep_first
    last = min(2, round(layers / 16)) if keep_last is None else keep_last
    if first + last >= layers:
        raise BlockError(f"compose.keep_first {first} and keep_last {last} of {layers} layers leave none to prune; "
                         "lower them")
    return range(first, layers - last)


def cut_for(ratio: float, total: int, sizes: Sizes) -> Cut:
    """The numbers of heads and channels whose parameters are the share `ratio` of `total`, with an error of at most
    half a channel. Raises BlockError for a ratio that cannot be reached."""
    layers, groups, channels, group_params, channel_params = sizes
    goal = ratio * total
    most = layers * ((groups - 1) * group_params + (channels - 1) * channel_params)
    if goal > most * (1 + ROUNDING):
        raise BlockError(f"ratio {ratio} is too high: all that llm_pruner can remove from {layers} layers is "
                         f"{most / total:.4f} of all parameters, as one head group and one channel of each are "
                         "kept; ask for less, or lower compose.keep_first and keep_last")

    def filled(lost: int) -> int:
        """Number of channels to remove from all layers together, if each layer loses `lost` head groups."""
        return min(max(round((goal - layers * lost * group_params) / channel_params), 0), layers * (channels - 1))

    def too_far(lost: int) -> bool:
        return abs(goal - layers * lost * group_params - filled(lost) * channel_params) > channel_params

    share = goal / (layers * (groups * group_params + channels * channel_params))
    lost = min(range(groups), key=lambda lost: (too_far(lost), abs(lost - share * groups), lost))
    count = filled(lost)
    # differences of floor(channels * layers so far / layers)
    return Cut(lost, [count * (layer + 1) // layers - count * layer // layers for layer in range(layers)])


# Units ----------------------------------------------------------------------------------------------------------------

def worths_by_layer(judge: Judge, pruned: range, coupled: list[Coupled], units: dict[str, int], importance: str,
                    grouping: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each pruned layer, from the last to the first, yields the number of the layer and the importance worth_U of
    the units of each part."""
    S, predictions = len(judge.ids_ST), judge.ids_ST.shape[1] - 1
    for number, weights, gradients, squares in backward(
            judge, pruned, lambda layer: [layer.get_parameter(one.name) for one in coupled],
            squared=importance != "first"):
        worths = {part: torch.zeros(count, dtype=torch.float64) for part, count in units.items()}
        for index, (one, weight) in enumerate(zip(coupled, weights, strict=True)):
            # g = dL/dW, L the mean over sequences and predictions;    a = 1/n sum_i (dL_i/dW)^2
            g = gradients[index] / (S * predictions)
            a = squares[index] / (S * predictions ** 2) if squares else None
            s = saliency(weight.detach().float(), g, a, importance)
            worths[one.part] += worth(s, one, units[one.part], grouping).cpu()
        yield number, worths


def saliency(w: Tensor, g: Tensor, a: Tensor | None, importance: str) -> Tensor:
    """s of every weight: an estimate of how the loss changes if the weight is removed. `importance` names the order of
    the estimate."""
    if importance == "first":
        return w * g                                # s = W g
    if importance == "second":
        return w.square() * a                       # s = W^2 a
    return w * g - w.square() * a / 2               # s = W g - W^2 a / 2


def worth(s: Tensor, one: Coupled, units: int, grouping: str) -> Tensor:
    """worth_U: for each unit, the part of its importance that comes from the tensor `one`."""
    s_RC = s.movedim(one.axis, 0).reshape(s.shape[one.axis], -1).double()
    # element: sum_j |s_ij|,    vector: |sum_j s_ij|
    worth_R = s_RC.abs().sum(1) if grouping == "element" else s_RC.sum(1).abs()
    # the worth of a unit is the sum over its rows (or columns) i
    return sum(section_R.view(units, -1).sum(1)
               for section_R in worth_R.split([units * length for length in one.sections]))


def _kept(worth_U: Tensor, lost: int, layer: int) -> Tensor:
    """Numbers of the kept units, ascending: all but the `lost` units of least importance. If two units are equally
    important, the unit with the lower number is removed."""
    if not torch.isfinite(worth_U).all():
        raise FitError(f"importances of layer {layer} are not finite; try dtype float32 for the model")
    return worth_U.argsort(stable=True)[lost:].sort().values


METHODS = (
    Method("llm_pruner", "Ma et al. 2023, LLM-Pruner: heads and MLP channels removed by what they are worth to the "
                         "loss", "heads and channels removed", no_layer, compose=compose,
           refuses=no_single_heads, example={"compose": {"sequences": 4}}),
)
