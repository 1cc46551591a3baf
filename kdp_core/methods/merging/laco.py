"""LaCo, layer collapse (Yang et al. 2024, arXiv 2402.11187, Findings of EMNLP), without training.

A walk goes from high layers to low layers and merges layers l .. l+m into layer l. The merge and the threshold are
described in kdp_core.methods.merging._merge. The released code checks whether a walk leaves the shortened list of
layers. This check is not needed, because no walk can leave the list.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from kdp_core.base import options
from kdp_core.base.options import Count, Natural
from kdp_core.base.records import Composed, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import as_many
from kdp_core.methods.merging._merge import Jump, Merge, Stack, compose, merged
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

AtLeastTwo = Annotated[int, Ge(2)]
"""Layers of a merge."""


def laco(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
         dtype: str = "float32", merge: Merge = "paper", group: AtLeastTwo = 4, stride: Count = 2, lowest: Natural = 0,
         highest: Natural | None = None, rounds: Count = 12, jump: Jump = "whole", sequences: Count = 10,
         batch_sequences: Count = 8, seed: int = 0) -> Composed:
    """Merge layers as LaCo does, with the threshold that removes `selection.layers` layers.

    merge: `paper` adds the difference of each other layer from the unmerged base layer; `as_released` uses the last
        layer's maps.
    group: the paper's C: number of layers that are merged into one layer; at least 2.
    stride: the paper's I: number of layers that the walk moves down after an accepted merge. After a refused merge the
        walk moves down by one layer.
    lowest: the paper's L: the lowest layer into which other layers are merged.
    highest: the paper's H; the walk begins at layer H - C. null means the last layer, as in the released code.
    rounds: largest number of walks in the search for a threshold. The model does not run twice for the same candidate.
    jump: the walk that is used if no threshold removes exactly `selection.layers` layers. `whole` uses the walk whose
        number of removed layers is nearest; this walk equals a walk of the released code. `shorten` uses a walk that
        removes more layers, and shortens its last merge until the number is exact.
    sequences: number of calibration sequences on which candidates are evaluated.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises FitError if the options do not fit the model, or if the options cannot remove `selection.layers` layers.
    """
    options.check(laco, locals())
    walker = partial(_laco, merge=merge, group=group, stride=stride, lowest=lowest, highest=highest)
    return compose("laco", walker, dense, hidden, selection, device=device, dtype=dtype, rounds=rounds, jump=jump,
                    sequences=sequences, batch=batch_sequences, seed=seed)


def _laco(stack: Stack, passes: Callable[[Stack], bool], most: int, *, merge: str, group: int, stride: int,
          lowest: int, highest: int | None) -> tuple[Stack, int]:
    """The walk goes from layer l = H - C down to layer L. The C - 1 layers after l are merged into layer l. If the
    merge is accepted, l -= I, else l -= 1."""
    count = len(stack)
    top = count - 1 if highest is None else highest
    if top >= count:
        raise FitError(f"compose.highest {top}: the model has layers 0 to {count - 1}; lower compose.highest")
    at = top - group
    while at >= lowest and count - len(stack) < most:
        high = min(at + group - 1, len(stack) - 1)
        if passes(merged(stack, at, high, merge)):
            stack = merged(stack, at, min(high, at + most - (count - len(stack))), merge)
            at -= stride
        else:
            at -= 1
    return stack, count - len(stack)


METHODS = (
    Method("laco", "Yang et al. 2024, LaCo: layers merged into the one before them while the last state keeps its "
                   "direction", "layers merged", as_many, compose=laco,
           example={"compose": {"group": 2, "stride": 1, "sequences": 4}}),
)
