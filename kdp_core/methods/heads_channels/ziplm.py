"""ZipLM (Kurtic et al. 2023, NeurIPS, arXiv 2302.04089) without its training: units are removed one at a time, and a
knapsack then chooses the sizes.

The surgeon of the module `obs` prunes each writer (o, down) of the dense model separately, one head or channel at a
time. H = X'X is computed from the writer's inputs in the dense model. The result for a writer is a list of levels s,
from all units down to one unit. An attention has one level for every number of heads. An MLP has levels whose numbers
of channels shrink by the factor `shrink`. Each level s has a matrix W_s and a prior p_s. The prior is the relative
error of the writer's outputs:
    p_s = |W_s X' - W X'| / |W X'|.

The levels of all writers are chosen together. For given coefficients c_l, dynamic programming solves the knapsack
    min sum_l c_l p_l,s(l),    so that the levels remove the ratio of ALL parameters.
SPDY (Frantar and Alistarh 2022) searches for the coefficients. The search starts with all coefficients equal to 1. Each
draw replaces a tenth of the coefficients by random numbers from [0, 1]. The new coefficients replace the old
coefficients if the model with the resulting levels has a lower loss on calibration text.

Where we differ from the paper:
    The budget is a number of parameters and not a time, because methods are compared at equal numbers of parameters.
    At least one unit of each part is kept. The paper may remove a whole part.
    A unit of grouped heads is a key-value head with its query heads.
    The paper alternates pruning with training by distillation. Here nothing is trained.
    In the paper each of 1,000 draws runs the model on the whole calibration text. Here a draw runs the model on
        `judge_sequences` sequences.
"""
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count, Natural, NotNegative
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._judge import Judge, loss_nats, picked
from kdp_core.methods._method import Method
from kdp_core.methods._select import ROUNDING, BlockError, no_layer
from kdp_core.methods.heads_channels import obs
from kdp_core.methods.heads_channels.knapsack import knapsack
from kdp_core.methods.heads_channels.units import (
    PARTS,
    Sizes,
    columns_of,
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
from kdp_core.states.hidden import HiddenStates, boundary_states

logger = logging.getLogger(__name__)

BUCKETS = 4096
"""Number of steps into which the knapsack divides its budget. The rounding to whole steps changes the removed share by
at most half a step for each writer."""
REDRAWN = 0.1
"""Share of the coefficients that a draw changes."""

Shrink = Annotated[float, Gt(0), Lt(1)]
"""Number of channels of a level, relative to the level before."""


class Level(NamedTuple):
    """A writer with fewer units."""
    kept_U: Tensor
    """Numbers of the kept units, ascending."""
    w_DK: Tensor
    """Columns of the kept units, float32 on the CPU."""
    prior: float
    params: int
    """Parameters of the removed units."""


Ladder = list[Level]
"""The levels of one writer. The first level is the writer of the dense model, with all units."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", shrink: Shrink = 0.9, batch_channels: Count = 1, draws: Natural = 1000,
            judge_sequences: Count = 16, damp: NotNegative = 0.01, sequences: Count | None = None,
            batch_sequences: Count = 8, seed: int = 0) -> Composed:
    """Prune every writer to all levels. Then the levels are chosen by a knapsack whose coefficients are searched for.

    shrink: number of channels of a level, relative to the level before.
    batch_channels: number of channels that are removed together; 1 in the paper. With a larger number, wide MLPs are
        pruned faster.
    draws: number of random draws of coefficients. With 0 draws the knapsack is solved only once, with all coefficients
        equal to 1.
    judge_sequences: number of calibration sequences on which a draw is judged. If there are fewer sequences, all
        sequences are used.
    damp: term added to the diagonal of H, relative to its mean; it is raised tenfold, up to 0.1, if H is singular.
    sequences: number of calibration sequences for H, drawn by `seed`; null means all.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences and of the draws.
    Raises BlockError for a ratio that cannot be reached, and FitError for models that apply the norm after the residual
    addition.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config, coupled, sizes, total, _ = layout("ziplm", dense)
    _check_reach(selection.ratio_target, total, sizes)
    h_STD = first_states(hidden, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    passes = Passes(model, hidden.tokens)
    ladders = list(_ladders(passes, h_STD, batch_sequences, sizes, shrink, batch_channels, damp))
    writers = [_writer(passes, number, part) for number in range(sizes.layers) for part in PARTS]
    judge = _judge(passes, tokens, judge_sequences, batch_sequences, seed)
    levels, search = searched(ladders, selection.ratio_target * total, draws, seed,
                              lambda levels: _loss(judge, writers, ladders, levels))
    chosen = [ladder[level] for ladder, level in zip(ladders, levels, strict=True)]
    _put(writers, chosen)
    tensors, widths, entries = {}, [], []
    for number in range(sizes.layers):
        own = dict(zip(PARTS, chosen[2 * number:2 * number + 2], strict=True))
        tensors |= narrow_tensors(model, number, coupled, {part: level.kept_U for part, level in own.items()}, sizes)
        lost = {part: sizes.units[part] - len(level.kept_U) for part, level in own.items()}
        widths.append(width_of(config, sizes, lost["attention"], lost["mlp"]))
        entries.append({"layer": number, "groups": lost["attention"], "channels": lost["mlp"],
                        "errors": {part: level.prior for part, level in own.items()}})
    return Composed(Plan("ziplm", [], [], tensors, shape={"widths": widths}), [], [],
                    {"tokens": h_STD[..., 0].numel(), "layers": entries,
                     "share": sum(level.params for level in chosen) / total, **search,
                     "seconds": time.perf_counter() - began})


def _check_reach(ratio: float, total: int, sizes: Sizes) -> None:
    most = sum(sizes.layers * (sizes.units[part] - 1) * sizes.unit_params[part] for part in PARTS)
    if ratio * total > most * (1 + ROUNDING):
        raise BlockError(f"ratio {ratio} is too high: all that ziplm can remove is {most / total:.4f} of all "
                         "parameters, as one head group and one channel of each layer are kept; ask for less")


# Levels ---------------------------------------------------------------------------------------------------------------

def counts_of(units: int, part: str, shrink: float) -> list[int]:
    """Number of kept units of each level, from all units down to one unit."""
    if part == "attention":
        return list(range(units, 0, -1))
    found = [units]
    while found[-1] > 1:
        # at least one unit less than in the previous level
        found.append(max(1, min(found[-1] - 1, round(found[-1] * shrink))))
    return found


def _ladders(passes: Passes, h_STD: Tensor, batch: int, sizes: Sizes, shrink: float, batch_channels: int,
             damp: float) -> Iterator[Ladder]:
    """The ladder of each writer of the dense model, layer by layer. In each layer the attention comes before the
    MLP."""
    for number in range(sizes.layers):
        grams = {part: torch.zeros(width, width, dtype=torch.float64, device=passes.device) for part, width in
                 ((part, matrix(_writer(passes, number, part)).shape[1]) for part in PARTS)}
        h_STD = run_layer(passes, number, h_STD, batch,
                          lambda part, x_NC, grams=grams: grams[part].add_(gram(x_NC, x_NC)))
        for part in PARTS:
            counts = counts_of(sizes.units[part], part, shrink)
            w_DC = matrix(_writer(passes, number, part))
            yield ladder(w_DC, grams[part], counts, sizes.unit_params[part],
                         1 if part == "attention" else batch_channels, damp)
        logger.info("pruned the writers of layer %d of %d", number + 1, sizes.layers)


def ladder(w_DC: Tensor, gram_CC: Tensor, counts: list[int], unit_params: int, batch: int, damp: float) -> Ladder:
    """Compute the levels of a writer. `counts` contains the numbers of kept units of the levels, and `batch` units are
    removed at a time."""
    units, dense_DC = counts[0], w_DC.detach().double()
    found = [Level(torch.arange(units), dense_DC.float().cpu(), 0.0, 0)]
    steps, wanted, whole = _steps(counts, batch), set(counts), obs.squared(dense_DC, gram_CC)
    for pruned in obs.prune(dense_DC, gram_CC, units, steps, damp):
        left = units - len(pruned.removed)
        if left in wanted:
            kept_U = pruned.kept(units)
            columns_K = columns_of(kept_U, len(gram_CC) // units).to(w_DC.device)
            # p_s = |W_s X' - W X'| / |W X'|
            prior = max(obs.squared(dense_DC - pruned.w_DC, gram_CC) / whole, 0.0) ** 0.5
            found.append(Level(kept_U, pruned.w_DC[:, columns_K].float().cpu(), prior, (units - left) * unit_params))
    return found


def _steps(counts: list[int], batch: int) -> list[int]:
    """Sizes of the batches of removals. Every number of kept units in `counts` is reached at the end of a batch."""
    found = []
    for before, after in itertools.pairwise(counts):
        whole, rest = divmod(before - after, batch)
        found += [batch] * whole + [rest] * (rest > 0)
    return found


# The choice -----------------------------------------------------------------------------------------------------------

def searched(ladders: list[Ladder], goal: float, draws: int, seed: int,
             loss: Callable[[tuple[int, ...]], float]) -> tuple[list[int], dict[str, Any]]:
    """The levels of lowest loss, and statistics of the search. `loss` runs the model with given levels and returns nats
    per token."""
    most = sum(ladder[-1].params for ladder in ladders)
    # parameters of one step; the number that a level saves is rounded to steps
    step = max(goal, 1.0) / BUCKETS
    saved = [np.array([round(level.params / step) for level in ladder]) for ladder in ladders]
    budget = min(round(min(goal, most) / step), sum(int(save[-1]) for save in saved))
    priors = [np.array([level.prior for level in ladder]) for ladder in ladders]
    generator = np.random.default_rng(seed)
    best_L, known = np.ones(len(ladders)), {}

    def tried(coefficients_L: np.ndarray) -> tuple[float, tuple[int, ...]]:
        levels = tuple(knapsack([c * prior for c, prior in zip(coefficients_L, priors, strict=True)], saved, budget))
        if levels not in known:
            known[levels] = loss(levels)
        return known[levels], levels

    best = first = tried(best_L)
    for number in range(draws):
        drawn_L = best_L.copy()
        places = generator.choice(len(ladders), max(1, round(REDRAWN * len(ladders))), replace=False)
        drawn_L[places] = generator.uniform(0, 1, len(places))
        found = tried(drawn_L)
        if found[0] < best[0]:
            best, best_L = found, drawn_L
            logger.info("draw %d of %d: loss %.4f nats", number + 1, draws, found[0])
    return list(best[1]), {"loss_nats": best[0], "loss_nats_first": first[0], "evaluations": len(known)}


def _judge(passes: Passes, tokens: Tokens, sequences: int, batch: int, seed: int) -> Judge:
    """The sequences on which models are judged, with their state 0."""
    ids_ST = picked(tokens, sequences, seed)
    first = torch.cat([boundary_states(passes.model, ids_BT, [0])[0] for ids_BT in ids_ST.split(batch)])
    return Judge(passes, ids_ST, {0: first}, batch)


def _loss(judge: Judge, writers: list[nn.Linear], ladders: list[Ladder], levels: tuple[int, ...]) -> float:
    """Mean next-token loss of the model with these levels, in nats."""
    _put(writers, [ladder[level] for ladder, level in zip(ladders, levels, strict=True)])
    return loss_nats(judge, 0, range(len(judge.passes.layers)))


def _put(writers: list[nn.Linear], levels: list[Level]) -> None:
    """Set the matrices of the writers to these levels. The columns of removed units are zero."""
    for writer, level in zip(writers, levels, strict=True):
        length = level.w_DK.shape[1] // len(level.kept_U)
        w_DC = torch.zeros(matrix(writer).shape)
        w_DC[:, columns_of(level.kept_U, length)] = level.w_DK
        # a new parameter is made, because the memory of the old one may map a file
        writer.weight = nn.Parameter(as_weight(writer, w_DC).to(writer.weight), requires_grad=False)


def _writer(passes: Passes, number: int, part: str) -> nn.Linear:
    return passes.layers[number].get_submodule(family_of(passes.model).parts[part].writer)


METHODS = (
    Method("ziplm", "Kurtic et al. 2023, ZipLM without training: heads and channels removed one at a time, as many of "
                    "each as a searched knapsack says", "heads and channels removed", no_layer, compose=compose,
           refuses=no_single_heads, example={"compose": {"sequences": 8, "draws": 5, "judge_sequences": 4}}),
)
