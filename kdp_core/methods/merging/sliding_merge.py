"""Sliding-window merging (Ding et al. 2025, arXiv 2502.19159), without training.

A window of layers grows by one layer at a time, towards the first layer. If the cosine of the window with one more
layer is not above the threshold, the layers of the window without this layer are merged. The merge and the threshold
are described in kdp_core.methods.merging._merge. The released code never merges a window that still grows at the first
layer; `merge: paper` merges this window. As in the released code, the weight of the differences W_{l+k} - W_l is 1.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kdp_core.base import options
from kdp_core.base.options import Count
from kdp_core.base.records import Composed, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import as_many
from kdp_core.methods.merging._merge import Jump, Merge, Stack, compose, merged
from kdp_core.states.hidden import HiddenStates


def sliding(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", merge: Merge = "paper", rounds: Count = 12, jump: Jump = "whole",
            sequences: Count = 10, batch_sequences: Count = 8, seed: int = 0) -> Composed:
    """Merge sliding windows with the threshold that removes `selection.layers` layers. The last layer is never part of
    a window.

    merge: `paper` adds the difference of each other layer from the unmerged base layer, and merges the window that
        reaches the first layer. `as_released` uses the last layer's maps, and does not merge the window at the first
        layer.
    rounds: largest number of walks in the search for a threshold. The model does not run twice for the same candidate.
    jump: the walk that is used if no threshold removes exactly `selection.layers` layers. `whole` uses the walk whose
        number of removed layers is nearest; this walk equals a walk of the released code. `shorten` uses a walk that
        removes more layers, and shortens its last merge until the number is exact.
    sequences: number of calibration sequences on which candidates are evaluated.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises FitError if the options cannot remove `selection.layers` layers.
    """
    options.check(sliding, locals())
    return compose("sliding_merge", partial(_sliding, merge=merge), dense, hidden, selection, device=device,
                    dtype=dtype, rounds=rounds, jump=jump, sequences=sequences, batch=batch_sequences, seed=seed)


def _sliding(stack: Stack, passes: Callable[[Stack], bool], most: int, *, merge: str) -> tuple[Stack, int]:
    """A window low .. high grows downwards while its merged candidate is accepted. When a candidate is refused, the
    layers of the window before it are merged, and the next window begins."""
    count = len(stack)
    high, low = count - 2, count - 3
    while low >= 0:
        if passes(merged(stack, low, high, merge)):
            if count - len(stack) + high - low == most:
                return merged(stack, low, high, merge), most
            low -= 1
        elif low + 1 < high:
            # the next candidate is the unchanged layer `low`, which is always accepted and starts a new window
            stack, high = merged(stack, low + 1, high, merge), low
        else:
            high, low = high - 1, low - 1
    # the window 0 .. high was accepted and no refused candidate ended it; the released code does not merge it
    reached = count - len(stack) + max(high, 0)
    return (merged(stack, 0, high, merge) if merge == "paper" and high > 0 else stack), reached


METHODS = (
    Method("sliding_merge", "Sliding Layer Merging 2025: windows of layers merged, as wide as the last state keeps its "
                            "direction", "layers merged", as_many, compose=sliding,
           example={"compose": {"sequences": 4}}),
)
