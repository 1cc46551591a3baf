"""SlimGPT (Ling et al. 2024, NeurIPS, arXiv 2412.18110): structured optimal brain surgeon, layer after layer.

The surgeon of the module `obs` removes heads and channels from the writers (o, down) of each layer. The surgeon removes
the units whose removal raises the error of the writer's outputs least, and changes the remaining columns to compensate.
H = X'X is computed on the already pruned model. The inputs of a layer are the outputs of the pruned layers before it,
and the MLP of a layer reads the state after the pruned attention.

Batched Greedy Pruning. Heads are removed one at a time. The loss of a head is the loss of all its columns together.
This loss is computed from a Cholesky factor of the head's block of H^-1. Channels are removed in batches. In an MLP of
11,008 channels the first batch has `batch_first` channels. In other MLPs the first batch has the same share of the
channels. Each batch is half the size of the previous batch, down to `batch_last`. The first batches may be large,
because the channels that are removed first depend least on each other.

Incremental Pruning Ratio. The errors of early layers affect all later layers, so the removed share of layer i of n
rises with depth:
    r_i = r_0 + (r_{n-1} - r_0) log(i + 1) / log(n).
r_0 is `first_share`, and r_{n-1} is computed so that the ratio of ALL parameters is met. From each layer the share r_i
of the head groups is removed, rounded to whole groups. The rest of the layer's share is removed as channels.

No code is released. Our assumptions are r_0 = 0, batches that halve from 1,024 to 8, and a damp of 0.01, as in
SparseGPT. A unit of grouped heads is a key-value head with its query heads; the paper's models have no grouped heads.
The paper reads 256 sequences of 2,048 tokens of C4; here the whole calibration set is read by default. The paper
fine-tunes by LoRA afterwards; here fine-tuned variants of this method are trained like those of other methods.
"""
import logging
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Chance, Count, NotNegative
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import ROUNDING, BlockError, no_layer
from kdp_core.methods.heads_channels import obs
from kdp_core.methods.heads_channels.units import (
    PARTS,
    Sizes,
    first_states,
    layout,
    narrow_tensors,
    no_single_heads,
    run_layer,
    width_of,
)
from kdp_core.model import checkpoints
from kdp_core.model.families import as_weight, family_of, matrix
from kdp_core.model.passes import Passes
from kdp_core.states.block import gram
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)

PAPER_CHANNELS = 11008
"""MLP channels of LLaMA-7B, the model for which the paper states its batch sizes."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", first_share: Chance = 0.0, batch_first: Count = 1024, batch_last: Count = 8,
            damp: NotNegative = 0.01, sequences: Count | None = None, batch_sequences: Count = 8,
            seed: int = 0) -> Composed:
    """Remove heads and MLP channels, layer after layer, and change the other columns of the writers to compensate.

    first_share: r_0, the share of the first layer's heads and channels that is removed.
    batch_first: number of channels of the first batch in an MLP of 11,008 channels; other MLPs use the same share.
    batch_last: number of channels of the last batches.
    damp: term added to the diagonal of H, relative to its mean; it is raised tenfold, up to 0.1, if H is singular.
    sequences: number of calibration sequences, drawn by `seed`; null means all.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises BlockError for a ratio that cannot be reached, and FitError for models that apply the norm after the residual
    addition.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config, coupled, sizes, total, _ = layout("slimgpt", dense)
    lost = cuts(selection.ratio_target, total, sizes, first_share)
    h_STD = first_states(hidden, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    passes = Passes(model, hidden.tokens)
    tensors, widths, entries = {}, [], []
    for number, own in enumerate(lost):
        batches = {"attention": [1] * own["attention"],
                   "mlp": batches_of(own["mlp"], round(batch_first * sizes.channels / PAPER_CHANNELS), batch_last)}
        kept, errors = {}, {}
        for part in PARTS:
            kept[part], errors[part] = _prune(passes, number, part, h_STD, batch_sequences, sizes, batches[part], damp)
        tensors |= narrow_tensors(model, number, coupled, kept, sizes)
        widths.append(width_of(config, sizes, own["attention"], own["mlp"]))
        removed = sorted(set(range(sizes.groups)) - set(kept["attention"].tolist()))
        entries.append({"layer": number, "groups": removed, "channels": own["mlp"], "errors": errors})
        if number + 1 < sizes.layers:
            h_STD = passes.run_batches(h_STD, [number], batch_sequences)
        logger.info("layer %d: %d of %d head groups and %d of %d channels are removed", number, own["attention"],
                    sizes.groups, own["mlp"], sizes.channels)
    share = sum(own[part] * sizes.unit_params[part] for own in lost for part in PARTS) / total
    return Composed(Plan("slimgpt", [], [], tensors, shape={"widths": widths}), [], [],
                    {"tokens": h_STD[..., 0].numel(), "layers": entries, "share": share,
                     "seconds": time.perf_counter() - began})


# Sizes ----------------------------------------------------------------------------------------------------------------

def shares(mean: float, layers: int, first: float) -> list[float]:
    """r_i of every layer, with the mean `mean`. The first share is given, and the last share r_{n-1} is computed from
    the mean."""
    if layers == 1:
        return [mean]
    rise = [math.log(number + 1) / math.log(layers) for number in range(layers)]
    # mean = r_0 + (r_{n-1} - r_0) mean_i log(i + 1) / log(n)
    slope = (mean - first) / (sum(rise) / layers)
    return [first + slope * part for part in rise]


def cuts(ratio: float, total: int, sizes: Sizes, first: float) -> list[dict[str, int]]:
    """Numbers of head groups and channels to remove from each layer, so that the share `ratio` of `total` is removed
    with an error of at most half a channel."""
    groups, channels = sizes.unit_params["attention"], sizes.unit_params["mlp"]
    whole = sizes.groups * groups + sizes.channels * channels
    most = ((sizes.groups - 1) * groups + (sizes.channels - 1) * channels) / whole
    mean = ratio * total / (sizes.layers * whole)
    by_layer = shares(mean, sizes.layers, first)
    if max(by_layer) > most + ROUNDING or min(by_layer) < 0:
        raise BlockError(f"ratio {ratio} with compose.first_share {first} asks {max(by_layer):.4f} of the last layer's "
                         f"heads and channels; 0 to {most:.4f} is possible: change the ratio or first_share")
    found, goal, removed = [], 0.0, 0
    for share in by_layer:
        goal += share * whole
        # the nearest number of head groups such that enough channels remain to remove the rest
        possible = [lost for lost in range(sizes.groups)
                    if -channels <= goal - removed - lost * groups <= sizes.channels * channels]
        lost = min(possible, key=lambda lost, share=share: (abs(lost - share * sizes.groups), lost), default=0)
        rest = round((goal - removed - lost * groups) / channels)
        own = {"attention": lost, "mlp": min(max(rest, 0), sizes.channels - 1)}
        removed += own["attention"] * groups + own["mlp"] * channels
        found.append(own)
    return found


def batches_of(count: int, first: int, last: int) -> list[int]:
    """Sizes of the batches in which `count` channels are removed. The first size is `first`; each later size is half of
    the previous one, but at least `last`."""
    found, size = [], max(first, last)
    while count > 0:
        found.append(min(size, count))
        count -= found[-1]
        size = max(size // 2, last)
    return found


# One writer -----------------------------------------------------------------------------------------------------------

def _prune(passes: Passes, number: int, part: str, h_STD: Tensor, batch: int, sizes: Sizes, batches: list[int],
           damp: float) -> tuple[Tensor, float]:
    """Prune the writer of one part in place: set the columns of removed units to zero, and change the other columns.

    Returns the kept units and the relative error of the writer's outputs.
    """
    units, writer = sizes.units[part], _writer(passes, number, part)
    if not batches:
        return torch.arange(units), 0.0
    columns = matrix(writer).shape[1]
    gram_CC = torch.zeros(columns, columns, dtype=torch.float64, device=writer.weight.device)

    def seen(which: str, x_NC: Tensor) -> None:
        if which == part:
            gram_CC.add_(gram(x_NC, x_NC))

    run_layer(passes, number, h_STD, batch, seen)
    w_DC = matrix(writer).double()
    *_, pruned = obs.prune(w_DC, gram_CC, units, batches, damp)
    # a new parameter is made, because the memory of the old one may map a file
    writer.weight = nn.Parameter(as_weight(writer, pruned.w_DC).to(writer.weight.dtype), requires_grad=False)
    return pruned.kept(units), obs.squared(w_DC - pruned.w_DC, gram_CC) / obs.squared(w_DC, gram_CC)


def _writer(passes: Passes, number: int, part: str) -> nn.Linear:
    return passes.layers[number].get_submodule(family_of(passes.model).parts[part].writer)


METHODS = (
    Method("slimgpt", "Ling et al. 2024, SlimGPT: heads and channels removed by structured optimal brain surgeon, more "
                      "of them in deeper layers", "heads and channels removed", no_layer, compose=compose,
           refuses=no_single_heads, example={"compose": {"sequences": 8}}),
)
