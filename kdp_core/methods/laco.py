"""LaCo and sliding-window merging: runs of layers collapse into their first layer, without training.

    laco     LaCo, layer collapse (Yang et al. 2024, arXiv 2402.11187, Findings of EMNLP): its merge of layers l .. l+m
             into layer l, and its walk from high layers to low ones.
    sliding  sliding-window merging (Ding et al. 2025, arXiv 2502.19159): windows that grow downwards and are merged
             once one layer more would be too much.
Both merge W_l + sum_{k=1..m} (W_{l+k} - W_l) and accept a candidate where cos(original, candidate) of the states after
the final norm, all tokens of a sequence as one vector, mean over sequences, is above a threshold T.

Merged are the linear maps of a layer, biases of OPT in (its names differ, its maps are the same); all norms, those of
queries and keys in Qwen3 and Gemma 3 too, stay those of layer l, as does its attention type (window or full).

Paper and released code disagree: the code subtracts W_l as changed so far, so the sum telescopes to W_{l+m}, the last
layer's maps under the first layer's norms (reported as LaCo#5). `merge: paper` subtracts W_l as it stood before the
merge; `as_released` does as the code. Where a merged layer is merged again (LaCo with stride < group - 1) its merged
maps enter. Every layer is thus a sum of the dense model's with whole numbers, and is made of them afresh: walks are
arithmetic on lists of such sums, and no model is copied. Of sliding merging's code two more things are known: a window
that still grows when the walk falls off the first layer is never merged (`paper` merges it), and its weight of the
differences is 1. LaCo's code guards against a walk beyond the end of the shortened list, which cannot happen.

Neither method can be asked for a ratio. Here T is bisected until exactly `selection.layers` layers go. All thresholds
between the highest cosine refused and the lowest accepted walk alike, so a bracket that they close leaves no T: the
number jumps. Then, or once `rounds` walks are spent, the walk at the highest T tried that removes more is ended as soon
as enough layers have gone, the last accepted merge shortened to fit.
"""
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import as_many
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of
from kdp_core.model.passes import Passes, Step
from kdp_core.states.block import FitError, relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
MERGES = ("paper", "as_released")


class Merged(NamedTuple):
    """A layer of the shortened model."""
    base: int
    """The dense layer whose norms it has."""
    shares: tuple[tuple[int, int], ...]
    """(dense layer, how often its linear maps enter the sum), ascending, without zeros; adds up to 1."""


Stack = tuple[Merged, ...]
"""The layers of a shortened model, from the first to the last."""
Walker = Callable[[Stack, Callable[[Stack], bool], int], tuple[Stack, int]]
"""(layers of the dense model, does this candidate pass?, most layers to remove) -> what is left and the layers gone;
a window that the released walk leaves unmerged is counted as gone."""


class _Walk(NamedTuple):
    """One walk; every threshold from `refused` up to below `accepted` gives the same."""
    stack: Stack
    reached: int
    refused: float
    """Highest cosine that did not pass."""
    accepted: float
    """Lowest cosine that passed."""


def laco(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
         dtype: str = "float32", merge: str = "paper", group: int = 4, stride: int = 2, lowest: int = 0,
         highest: int | None = None, rounds: int = 12, sequences: int = 10, batch_sequences: int = 8,
         seed: int = 0) -> Composed:
    """Collapse layers as LaCo does until `selection.layers` of them have gone.

    merge: `paper` adds differences to the base layer as it stood, `as_released` is the code's, the last layer's maps.
    group: the paper's C, layers that one merge makes one of; at least 2.
    stride: the paper's I, layers to go down after an accepted merge; 1 after a refused one.
    lowest: the paper's L, lowest layer that others are merged into.
    highest: the paper's H; the walk begins at H - C; null is the last layer, as released.
    rounds: walks to find a threshold with; candidates judged before are not run again.
    sequences: calibration sequences that candidates are judged on.
    batch_sequences: sequences of a forward pass.
    seed: of the choice of sequences.
    Raises FitError for options out of range and where that many layers cannot go.
    """
    if group < 2 or stride < 1:
        raise FitError(f"compose.group {group} and stride {stride}: at least 2 layers are merged, and at least 1 is "
                       "gone down")
    walker = partial(_laco, merge=merge, group=group, stride=stride, lowest=lowest, highest=highest)
    return _compose("laco", walker, dense, hidden, selection, device=device, dtype=dtype, merge=merge, rounds=rounds,
                    sequences=sequences, batch=batch_sequences, seed=seed)


def sliding(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", merge: str = "paper", rounds: int = 12, sequences: int = 10,
            batch_sequences: int = 8, seed: int = 0) -> Composed:
    """Merge sliding windows until `selection.layers` layers have gone; the last layer is never in a window.

    merge: `paper` adds differences to the base layer as it stood and merges the window that reaches the first layer,
        `as_released` is the code's, the last layer's maps, and leaves that window.
    rounds: walks to find a threshold with; candidates judged before are not run again.
    sequences: calibration sequences that candidates are judged on.
    batch_sequences: sequences of a forward pass.
    seed: of the choice of sequences.
    Raises FitError for options out of range and where that many layers cannot go.
    """
    return _compose("sliding_merge", partial(_sliding, merge=merge), dense, hidden, selection, device=device,
                    dtype=dtype, merge=merge, rounds=rounds, sequences=sequences, batch=batch_sequences, seed=seed)


# Walks ----------------------------------------------------------------------------------------------------------------

def _plain(layer: int) -> Merged:
    return Merged(layer, ((layer, 1),))


def _merged(stack: Stack, low: int, high: int, merge: str) -> Stack:
    """Places low .. high of the list as one layer."""
    base, *others = stack[low:high + 1]
    if merge == "as_released":
        # W_l <- W_l + (W_{l+k} - W_l) for k = 1 .. m, W_l changing on the way: W_{l+m} is left
        shares = stack[high].shares
    else:
        # W_l + sum_{k=1..m} (W_{l+k} - W_l) = (1 - m) W_l + sum_k W_{l+k}
        total = Counter({layer: (1 - len(others)) * share for layer, share in base.shares})
        for other in others:
            total.update(dict(other.shares))
        shares = tuple(sorted((layer, share) for layer, share in total.items() if share))
    return (*stack[:low], Merged(base.base, shares), *stack[high + 1:])


def _laco(stack: Stack, passes: Callable[[Stack], bool], most: int, *, merge: str, group: int, stride: int,
          lowest: int, highest: int | None) -> tuple[Stack, int]:
    """l from H - C down to L: merge the C - 1 following layers that there are; after a pass l -= I, else l -= 1."""
    count = len(stack)
    top = count - 1 if highest is None else highest
    if lowest < 0 or top >= count:
        raise FitError(f"compose.lowest {lowest} and highest {top}: the model has layers 0 to {count - 1}")
    at = top - group
    while at >= lowest and count - len(stack) < most:
        high = min(at + group - 1, len(stack) - 1)
        if passes(_merged(stack, at, high, merge)):
            stack = _merged(stack, at, min(high, at + most - (count - len(stack))), merge)
            at -= stride
        else:
            at -= 1
    return stack, count - len(stack)


def _sliding(stack: Stack, passes: Callable[[Stack], bool], most: int, *, merge: str) -> tuple[Stack, int]:
    """A window low .. high grows downwards while it passes; then what passed is merged and the next one begins."""
    count = len(stack)
    high, low = count - 2, count - 3
    while low >= 0:
        if passes(_merged(stack, low, high, merge)):
            if count - len(stack) + high - low == most:
                return _merged(stack, low, high, merge), most
            low -= 1
        elif low + 1 < high:
            # the next candidate is the single layer `low`: nothing changes, it passes, and the window grows from there
            stack, high = _merged(stack, low + 1, high, merge), low
        else:
            high, low = high - 1, low - 1
    # the window 0 .. high has passed but no candidate has ended it; the released code leaves it as it is
    reached = count - len(stack) + max(high, 0)
    return (_merged(stack, 0, high, merge) if merge == "paper" and high > 0 else stack), reached


def _walk(walker: Walker, score: Callable[[Stack], float], count: int, threshold: float, most: int) -> _Walk:
    accepted, refused = [float("inf")], [-float("inf")]

    def passes(candidate: Stack) -> bool:
        cosine = score(candidate)
        (accepted if cosine > threshold else refused).append(cosine)
        return cosine > threshold

    stack, reached = walker(tuple(map(_plain, range(count))), passes, most)
    return _Walk(stack, reached, max(refused), min(accepted))


def _matched(walker: Walker, score: Callable[[Stack], float], count: int, wanted: int,
             rounds: int) -> tuple[Stack, dict[str, Any]]:
    """The layers left of `count` when exactly `wanted` are to go, and how they were found."""
    low, high, best, tried, ended = -1.0, 1.0, -1.0, [], "rounds"
    while len(tried) < rounds:
        if not low < high:
            ended = "jump"
            break
        threshold = (low + high) / 2
        walk = _walk(walker, score, count, threshold, count)
        gone = count - len(walk.stack)
        tried.append([threshold, gone])
        logger.info("threshold %.4f: %d of %d layers go, %d wanted", threshold, gone, count, wanted)
        if gone == wanted:
            return walk.stack, {"threshold": threshold, "ended": "exact", "walks": tried}
        if walk.reached >= wanted:
            best, low = threshold, walk.accepted
        else:
            high = walk.refused
    walk = _walk(walker, score, count, best, wanted)
    if count - len(walk.stack) != wanted:
        raise FitError(f"merging: at threshold {best} only {count - len(walk.stack)} layers go, {wanted} are wanted; "
                       "the other candidates have no finite outputs: use dtype float32 or ask for less")
    return walk.stack, {"threshold": best, "ended": ended, "walks": tried}


# Models ---------------------------------------------------------------------------------------------------------------

def _linear(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What is merged, by name below the layer: weights and biases of its linear maps."""
    return {f"{name}.{which}": parameter for name, module in layer.named_modules() if isinstance(module, nn.Linear)
            for which, parameter in module.named_parameters()}


@contextmanager
def _wearing(layer: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """A layer with other maps for a while; its own are kept, not copied."""
    own = {name: parameter.data for name, parameter in layer.items()}
    for name, parameter in layer.items():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in layer.items():
            parameter.data = own[name]


class _Judge:
    """Shortened models run on some sequences, from the first layer that differs on."""

    def __init__(self, passes: Passes, hidden: HiddenStates, rows: Tensor, batch: int) -> None:
        self.passes, self.hidden, self.rows, self.batch = passes, hidden, rows, batch
        self.linear = [_linear(layer) for layer in passes.layers]
        self.known: dict[Stack, float] = {}
        self._made: dict[Merged, dict[str, Tensor]] = {}
        self._states: dict[int, Tensor] = {}
        self._outputs_STD = self._outputs(self.state(len(self.linear)))

    def state(self, layer: int) -> Tensor:
        """The dense model's state of the sequences, h_STD."""
        if layer not in self._states:
            self._states[layer] = self.hidden.state(layer)[self.rows]
        return self._states[layer]

    def maps(self, layer: Merged) -> dict[str, Tensor]:
        """sum_j c_j W_j of the dense layers' maps, in the model's precision."""
        return {name: sum(share * self.linear[number][name].detach().float() for number, share in layer.shares)
                .to(parameter.dtype) for name, parameter in self.linear[layer.base].items()}

    def steps(self, stack: Stack) -> list[Step]:
        """A path through the layers."""
        # maps of this candidate's merged layers alone stay in memory
        self._made = {layer: self._made.get(layer) or self.maps(layer) for layer in stack
                      if layer != _plain(layer.base)}
        return [partial(self._run, layer.base, self._made[layer]) if layer in self._made else layer.base
                for layer in stack]

    def cosine(self, stack: Stack) -> float:
        """Mean over sequences of the cosine of all final states, dense and shortened; each candidate is run once."""
        if stack not in self.known:
            start = next((place for place, layer in enumerate(stack) if layer != _plain(place)), len(stack))
            h_STD = self.passes.run_batches(self.state(start), self.steps(stack)[start:], self.batch)
            # mean_s cos(flatten h_s, flatten h'_s)
            cosine_S = torch.cosine_similarity(self._outputs_STD.flatten(1).double(),
                                               self._outputs(h_STD).flatten(1).double())
            self.known[stack] = cosine_S.mean().item()
        return self.known[stack]

    def fits(self, stack: Stack) -> list[dict[str, Any]]:
        """A row a merged layer: how far it ends from where the last of its dense layers ends."""
        ends = [layer.base for layer in stack[1:]] + [len(self.linear)]
        h_STD, rows = self.state(0), []
        for layer, step, end in zip(stack, self.steps(stack), ends, strict=True):
            h_STD = self.passes.run_batches(h_STD, [step], self.batch)
            if layer in self._made:
                error = relative_error(h_STD.flatten(0, 1).double(), self.state(end).flatten(0, 1).double())
                rows.append({"block": (layer.base, end), "heldout_error": error, "params": 0})
        return rows

    def _run(self, layer: int, maps: dict[str, Tensor], h_BTD: Tensor) -> Tensor:
        with _wearing(self.linear[layer], maps):
            return self.passes.layer(layer, h_BTD.to(self.passes.model.dtype))

    @torch.no_grad()
    def _outputs(self, h_STD: Tensor) -> Tensor:
        """After the final norm, float32, on the CPU."""
        return torch.cat([self.passes.to_head(h_BTD).float().cpu() for h_BTD in h_STD.split(self.batch)])


def _compose(method: str, walker: Walker, dense: Path, hidden: HiddenStates, selection: Selection, *, device: str,
             dtype: str, merge: str, rounds: int, sequences: int, batch: int, seed: int) -> Composed:
    began = time.perf_counter()
    _check(merge, rounds, sequences, hidden.sequences)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    passes = Passes(model, hidden.tokens)
    count, wanted = len(passes.layers), selection.layers
    # nothing runs yet: a walk that accepts whatever it meets
    most = _walk(walker, lambda _: 1.0, count, -1.0, count).reached
    if not 1 <= wanted <= most:
        raise FitError(f"{method}: {wanted} of {count} layers are to go, but these options let 1 to {most} go; change "
                       "the ratio, or the range, group and stride of LaCo")
    order = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    judge = _Judge(passes, hidden, order[:sequences].sort().values, batch)
    stack, how = _matched(walker, judge.cosine, count, wanted, rounds)
    others = _Judge(passes, hidden, order[sequences:2 * sequences].sort().values, batch)
    fits, kept, prefix = others.fits(stack), {layer.base for layer in stack}, family_of(model).prefix
    plan = Plan(method, [(layer, "whole") for layer in range(count) if layer not in kept], [],
                {f"{prefix}{layer.base}.{name}": tensor.cpu() for layer in stack if layer != _plain(layer.base)
                 for name, tensor in judge.maps(layer).items()})
    stats = {**how, "evaluations": len(judge.known), "cosine": judge.cosine(stack),
             "heldout_cosine": others.cosine(stack), "tokens": sequences * hidden.tokens,
             "seconds": time.perf_counter() - began}
    return Composed(plan, [], fits, stats)


def _check(merge: str, rounds: int, sequences: int, have: int) -> None:
    if merge not in MERGES:
        raise FitError(f"compose.merge {merge!r}: choose one of {', '.join(MERGES)}")
    if rounds < 1:
        raise FitError(f"compose.rounds {rounds}: a threshold takes at least 1 walk to find")
    if not 1 <= sequences < have:
        raise FitError(f"compose.sequences {sequences} of {have} leaves none on one side: some judge candidates, "
                       "others the result; change it or add calibration sequences")


METHODS = (
    Method("laco", "Yang et al. 2024, LaCo: layers merged into the one before them while the last state keeps its "
                   "direction", "layers merged", as_many, compose=laco,
           example={"compose": {"group": 2, "stride": 1, "sequences": 4}}),
    Method("sliding_merge", "Sliding Layer Merging 2025: windows of layers merged, as wide as the last state keeps its "
                            "direction", "layers merged", as_many, compose=sliding,
           example={"compose": {"sequences": 4}}),
)
