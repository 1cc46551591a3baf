"""Functions that LaCo and sliding-window merging share: merged layers, walks with a threshold, and the evaluation of
candidates.

Both methods replace layers l .. l+m by one layer l. The linear maps of the new layer l are:
    W_l + sum_{k=1..m} (W_{l+k} - W_l)
A candidate is accepted if the cosine between the final states of the original and of the candidate is above a threshold
T. The final states are states after the final norm. For this cosine, the states of all tokens of a sequence form one
vector. The result is a mean over sequences.

The linear maps of a layer and their biases (OPT) are merged. All norms of layer l are kept, including the norms of
queries and keys in Qwen3 and Gemma 3. The merged layer also keeps the attention type (window or full) of layer l.

The paper and the released code subtract different matrices W_l. The released code changes W_l after each term of the
sum and subtracts the changed W_l, so that all terms except W_{l+m} cancel. The merged layer of the released code
therefore has the maps of the last layer and the norms of the first layer (reported as LaCo#5). `merge: paper` subtracts
W_l as it was before the merge; `as_released` has the same result as the released code. LaCo with stride < group - 1 may
merge a layer that is already merged. The sum of the second merge then contains the maps of the first merge. Every
merged layer is thus a sum of the dense model's layers with integer coefficients. Each merge computes the sum from the
dense layers. A walk only computes lists of integer coefficients, and it copies no model.

Both methods have a threshold T instead of a ratio. This module finds T by bisection, until exactly `selection.layers`
layers are removed. A walk gives the same result for all thresholds between the highest refused cosine and the lowest
accepted cosine. The number of removed layers jumps between two tried thresholds if no threshold between them can give
another walk. If the number jumps, or after `rounds` walks, `jump: whole` uses the tried walk whose number of removed
layers is nearest to the wanted number. A whole walk equals a walk of the released code at the same threshold, and the
record states how many layers are removed. `jump: shorten` removes exactly the wanted number of layers. For this, a walk
is repeated: the walk at the highest of the tried thresholds T that remove more layers. The repeated walk stops at the
wanted number of layers, so its last merge contains fewer layers than before.
"""
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Composed, Plan, Selection
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of, is_linear
from kdp_core.model.passes import Passes, Step
from kdp_core.states.block import FitError, relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)

Merge = Literal["paper", "as_released"]
"""Which W_l a merge subtracts: W_l before the merge, or W_l as the released code changes it."""


class Merged(NamedTuple):
    """One layer of the shortened model: a layer of the dense model, or a merged layer."""
    base: int
    """The dense layer whose norms are kept in the merged layer."""
    shares: tuple[tuple[int, int], ...]
    """(dense layer, coefficient of its linear maps in the sum), in ascending order, without zeros; the coefficients sum
    to 1."""


Jump = Literal["whole", "shorten"]
"""The walk that is used if no threshold removes the wanted number of layers: a whole walk, or a shortened walk."""
Stack = tuple[Merged, ...]
"""The layers of a shortened model, from the first to the last."""
Walker = Callable[[Stack, Callable[[Stack], bool], int], tuple[Stack, int]]
"""Function with three arguments: the layers of the dense model, a function that accepts or refuses a candidate, and the
largest number of layers to remove. The function returns the remaining layers and the number of removed layers. This
number includes a window that the released code reaches but does not merge."""


class Walk(NamedTuple):
    """One walk. Every threshold T with `refused` <= T < `accepted` gives the same walk."""
    stack: Stack
    reached: int
    refused: float
    """Highest cosine of a refused candidate."""
    accepted: float
    """Lowest cosine of an accepted candidate."""


def plain(layer: int) -> Merged:
    """A layer of the dense model, not merged."""
    return Merged(layer, ((layer, 1),))


def merged(stack: Stack, low: int, high: int, merge: str) -> Stack:
    """The list of layers after the layers at places low .. high are replaced by one merged layer."""
    base, *others = stack[low:high + 1]
    if merge == "as_released":
        # W_l <- W_l + (W_{l+k} - W_l) for k = 1 .. m, with the current W_l: the result is W_{l+m}
        shares = stack[high].shares
    else:
        # W_l + sum_{k=1..m} (W_{l+k} - W_l) = (1 - m) W_l + sum_k W_{l+k}
        total = Counter({layer: (1 - len(others)) * share for layer, share in base.shares})
        for other in others:
            total.update(dict(other.shares))
        shares = tuple(sorted((layer, share) for layer, share in total.items() if share))
    return (*stack[:low], Merged(base.base, shares), *stack[high + 1:])


def walked(walker: Walker, score: Callable[[Stack], float], count: int, threshold: float, most: int) -> Walk:
    """Run one walk over `count` dense layers. The walk accepts a candidate if its score is above the threshold."""
    accepted, refused = [float("inf")], [-float("inf")]

    def passes(candidate: Stack) -> bool:
        cosine = score(candidate)
        (accepted if cosine > threshold else refused).append(cosine)
        return cosine > threshold

    stack, reached = walker(tuple(map(plain, range(count))), passes, most)
    return Walk(stack, reached, max(refused), min(accepted))


def matched(walker: Walker, score: Callable[[Stack], float], count: int, wanted: int, rounds: int,
            jump: str) -> tuple[Stack, dict[str, Any]]:
    """Search for a walk that removes `wanted` of `count` layers; if no threshold gives this number, `jump` selects the
    walk. Returns the remaining layers, and how the walk was found."""
    low, high, best, ended = -1.0, 1.0, -1.0, "rounds"
    stacks: list[tuple[float, Stack]] = []
    while len(stacks) < rounds:
        if not low < high:
            ended = "jump"
            break
        threshold = (low + high) / 2
        walk = walked(walker, score, count, threshold, count)
        removed = count - len(walk.stack)
        stacks.append((threshold, walk.stack))
        logger.info("threshold %.4f: %d of %d layers are removed, %d wanted", threshold, removed, count, wanted)
        if removed == wanted:
            return walk.stack, _how(threshold, "exact", stacks, count)
        if walk.reached >= wanted:
            best, low = threshold, walk.accepted
        else:
            high = walk.refused
    # if the released window reaches the first layer at every threshold, no walk merges any layers
    if jump == "whole" and (found := [one for one in stacks if len(one[1]) < count]):
        threshold, stack = min(found, key=lambda one: (abs(count - len(one[1]) - wanted), -len(one[1])))
        return stack, _how(threshold, ended, stacks, count)
    walk = walked(walker, score, count, best, wanted)
    if count - len(walk.stack) != wanted:
        raise FitError(f"merging: at threshold {best} only {count - len(walk.stack)} layers are removed, {wanted} "
                       "are wanted; the other candidates have no finite outputs: use dtype float32 or ask for less")
    return walk.stack, _how(best, ended, stacks, count)


def _how(threshold: float, ended: str, stacks: list[tuple[float, Stack]], count: int) -> dict[str, Any]:
    """How a walk was found: its threshold, why the search ended (`exact`, `jump` or `rounds`), and (threshold, number
    of removed layers) of every tried walk."""
    return {"threshold": threshold, "ended": ended, "walks": [[tried, count - len(stack)] for tried, stack in stacks]}


def _linear(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a merge changes, by name below the layer: weights and biases of its linear maps."""
    return {f"{name}.{which}": parameter for name, module in layer.named_modules() if is_linear(module)
            for which, parameter in module.named_parameters()}


@contextmanager
def _wearing(layer: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Replace a layer's maps inside a `with` block. After the block the layer has its original maps again. The original
    maps are never copied."""
    own = {name: parameter.data for name, parameter in layer.items()}
    for name, parameter in layer.items():
        parameter.data = tensors[name]
    try:
        yield
    finally:
        for name, parameter in layer.items():
            parameter.data = own[name]


class Judge:
    """Computes outputs of shortened models on some sequences, starting at the first layer that differs from the dense
    model."""

    def __init__(self, passes: Passes, hidden: HiddenStates, sequences: Tensor, batch: int) -> None:
        self.passes, self.hidden, self.sequences, self.batch = passes, hidden, sequences, batch
        self.linear = [_linear(layer) for layer in passes.layers]
        self.known: dict[Stack, float] = {}
        self._made: dict[Merged, dict[str, Tensor]] = {}
        self._states: dict[int, Tensor] = {}
        self._outputs_STD = self._outputs(self.state(len(self.linear)))

    def state(self, layer: int) -> Tensor:
        """h_STD before layer `layer` of the dense model, for the judge's sequences."""
        if layer not in self._states:
            self._states[layer] = self.hidden.state(layer, self.sequences)
        return self._states[layer]

    def maps(self, layer: Merged) -> dict[str, Tensor]:
        """sum_j c_j W_j of the dense layers' maps, in the model's precision."""
        return {name: sum(share * self.linear[number][name].detach().float() for number, share in layer.shares)
                .to(parameter.dtype) for name, parameter in self.linear[layer.base].items()}

    def steps(self, stack: Stack) -> list[Step]:
        """The layers of a shortened model as a path that `Passes` can run."""
        # only the maps of this candidate's merged layers are kept in memory
        self._made = {layer: self._made.get(layer) or self.maps(layer) for layer in stack
                      if layer != plain(layer.base)}
        return [partial(self._run, layer.base, self._made[layer]) if layer in self._made else layer.base
                for layer in stack]

    def cosine(self, stack: Stack) -> float:
        """Cosine between the final states of the dense model and of the shortened model, as a mean over sequences. The
        result for a candidate is stored, so no candidate is run twice."""
        if stack not in self.known:
            start = next((place for place, layer in enumerate(stack) if layer != plain(place)), len(stack))
            h_STD = self.passes.run_batches(self.state(start), self.steps(stack)[start:], self.batch)
            # mean_s cos(flatten h_s, flatten h'_s)
            cosine_S = torch.cosine_similarity(self._outputs_STD.flatten(1).double(),
                                               self._outputs(h_STD).flatten(1).double())
            self.known[stack] = cosine_S.mean().item()
        return self.known[stack]

    def fits(self, stack: Stack) -> list[dict[str, Any]]:
        """One entry for each merged layer: the error of its output against the dense model's state after the last
        merged layer."""
        ends = [layer.base for layer in stack[1:]] + [len(self.linear)]
        h_STD, entries = self.state(0), []
        for layer, step, end in zip(stack, self.steps(stack), ends, strict=True):
            h_STD = self.passes.run_batches(h_STD, [step], self.batch)
            if layer in self._made:
                error = relative_error(h_STD.flatten(0, 1).double(), self.state(end).flatten(0, 1).double())
                entries.append({"block": (layer.base, end), "heldout_error": error, "params": 0})
        return entries

    def _run(self, layer: int, maps: dict[str, Tensor], h_BTD: Tensor) -> Tensor:
        with _wearing(self.linear[layer], maps):
            return self.passes.layer(layer, h_BTD.to(self.passes.model.dtype))

    @torch.no_grad()
    def _outputs(self, h_STD: Tensor) -> Tensor:
        """States after the final norm, float32, on the CPU."""
        return torch.cat([self.passes.to_head(h_BTD).float().cpu() for h_BTD in h_STD.split(self.batch)])


def compose(method: str, walker: Walker, dense: Path, hidden: HiddenStates, selection: Selection, *, device: str,
             dtype: str, rounds: int, jump: str, sequences: int, batch: int, seed: int) -> Composed:
    """Merge layers by a walk that removes `selection.layers` layers. Candidates are evaluated on some calibration
    sequences."""
    began = time.perf_counter()
    if sequences >= hidden.sequences:
        raise FitError(f"compose.sequences {sequences} of {hidden.sequences} leaves none to judge the "
                       "result, because other sequences judge the candidates; lower it or add calibration sequences")
    count, wanted = checkpoints.config_of(dense).num_hidden_layers, selection.layers
    # this walk accepts every candidate, so it runs no model
    most = walked(walker, lambda _: 1.0, count, -1.0, count).reached
    if not 1 <= wanted <= most:
        raise FitError(f"{method}: {wanted} of {count} layers are to be removed, but these options remove 1 to "
                       f"{most} of them; change the ratio, or the range, group and stride of LaCo")
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    passes = Passes(model, hidden.tokens)
    order = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    judge = Judge(passes, hidden, order[:sequences].sort().values, batch)
    stack, how = matched(walker, judge.cosine, count, wanted, rounds, jump)
    others = Judge(passes, hidden, order[sequences:2 * sequences].sort().values, batch)
    fits, kept, prefix = others.fits(stack), {layer.base for layer in stack}, family_of(model).prefix
    plan = Plan(method, [(layer, "whole") for layer in range(count) if layer not in kept], [],
                {f"{prefix}{layer.base}.{name}": tensor.cpu() for layer in stack if layer != plain(layer.base)
                 for name, tensor in judge.maps(layer).items()})
    stats = {**how, "wanted": wanted, "removed": count - len(stack), "evaluations": len(judge.known),
             "cosine": judge.cosine(stack), "heldout_cosine": others.cosine(stack),
             "tokens": sequences * hidden.tokens, "seconds": time.perf_counter() - began}
    return Composed(plan, [], fits, stats)
