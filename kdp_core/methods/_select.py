"""The selection of the blocks to replace at a ratio: KDP, Algorithm 1 line 2 and section 3.1.

The paper describes a block in two ways. Algorithm 1 scores CKA(h_l, h_{l+K_max}); Tables 4 and 5 prune two layers, such
as [6, 7], for K_max = 3. Both descriptions agree if the layers F_l to F_{l+K_max-1} are the context of the block: the
first layer of the context is kept, and the other K_max - 1 layers are removed. Contexts do not overlap (as in Table 5
for LLaMA-2-7B and LLaMA-3-8B; the blocks [7, 8] [9, 10] of LLaMA-2-13B share a layer of context). The options `removes`
and `apart` choose other interpretations.

The first and last 10 % of the layers are kept. Blocks are chosen by descending score until the removed share of ALL
parameters meets the ratio. If two scores are equal, the lower block is chosen first. The parameters of stand-ins are
subtracted from the removed parameters. The greedy selections are nested: the blocks that are trained for one ratio are
also used for higher ratios.

Some methods remove one run of consecutive layers (`one_run`, `most_alike`, `deepest_run`). Runs of different lengths
are chosen independently, so a longer run need not contain a shorter run. If two scores are equal, the run of lower
layers is chosen. In other methods the fit itself chooses the layers or units to remove. If the fit chooses, `as_many`
selects only a number of layers, and `no_layer` selects no layers.

Table 4 compares two ways: blocks are chosen again for each K_max, or a "fixed initial block" is expanded. With
`expand_from`, blocks are chosen as for a smaller K_max, and later layers are then added to each block. `given` lists
the blocks directly, for example the blocks in a table of the paper.
"""
import itertools
import math
from typing import Any, Literal

from torch import Tensor

from kdp_core.base import options
from kdp_core.base.options import Count, Edge, Natural, Share
from kdp_core.base.records import Block, ModelFacts, Search, Selection, Similarity

Criterion = Literal["cka_linear", "cka_rbf", "cosine"]
"""Name of a measure of the similarity of two states. The record Similarity has a matrix with this name."""
Angle = Literal["angular", "angular_last"]
"""Angle between two states: the mean over all counted tokens, or over the last token of each sequence."""
Match = Literal["nearest", "reach"]
"""How a selection meets a ratio: by the nearest share, or by the first share that is not below the ratio."""
ROUNDING = 1e-12
"""A ratio that exceeds a share of the parameters by at most this number counts as equal to the share."""


class BlockError(ValueError):
    """The ratio, K_max or criterion cannot be met."""


def most_similar(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
                 criterion: Criterion = "cka_linear", protect: Edge = 0.1,
                 removes: Literal["k_max-1", "k_max"] = "k_max-1", apart: Literal["context", "removed"] = "context",
                 match: Match = "nearest", expand_from: Count | None = None,
                 given: list[list[int]] | None = None) -> Selection:
    """Select the non-overlapping blocks of highest similarity that remove `ratio` of all parameters.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: number of layers of a block's context.
    module_params: number of parameters of the stand-in that each block receives.
    criterion: cka_linear, cka_rbf or cosine of the states at both ends of the context.
    protect: share of the layers kept at each end, rounded to whole layers.
    removes: `k_max-1` (the context's first layer is kept) or `k_max` (Algorithm 1 to the letter).
    apart: `context` (the contexts of blocks do not overlap) or `removed` (only removed layers do not overlap).
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    expand_from: a smaller K_max with which blocks are chosen. Later layers then extend each block to k_max. Blocks that
        would reach into the protected end are no candidates.
    given: blocks to replace, each as [start, stop) in layers. With this option no blocks are chosen, and ratio, k_max
        and protect are ignored.
    """
    options.check(most_similar, locals())
    if k_max == 1 and removes == "k_max-1":
        raise BlockError(f"k_max {k_max}: a block would remove no layer; raise k_max")
    if given is not None:
        return _given(similarity, facts, given, ratio, k_max, module_params, criterion, removes)
    candidates = _candidates(similarity, facts.layers, _initial(k_max, expand_from, removes), criterion, protect,
                             removes)
    candidates = _grown(candidates, k_max, eligible_layers(facts.layers, protect).stop)
    chosen = _greedy(candidates, apart)
    shares = shares_of([candidate["block"] for candidate in chosen], facts, module_params)
    check_reachable(ratio, shares, k_max, eligible_layers(facts.layers, protect))
    count = enough(shares, ratio, match)
    picked = sorted(chosen[:count], key=lambda candidate: candidate["block"])
    blocks = [candidate["block"] for candidate in picked]
    return Selection(blocks, [candidate["score"] for candidate in picked], criterion, ratio, shares[count], shares[-1],
                     k_max, candidates, layers_of(blocks))


def in_order(search: Search, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
             match: Match = "nearest") -> Selection:
    """Select the first layers of a search's order that remove `ratio` of all parameters; each layer is a block.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: K_max of the search: at most k_max - 1 consecutive layers may be removed.
    module_params: number of parameters of the stand-in that each layer receives.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(in_order, locals())
    if search.k_max != k_max:
        raise BlockError(f"k_max {k_max}: the search was made for k_max {search.k_max}; search again")
    blocks = [(layer, layer + 1) for layer in search.order]
    shares = shares_of(blocks, facts, module_params)
    if ratio > shares[-1] + ROUNDING:
        raise BlockError(f"ratio {ratio}: the {len(blocks)} layers that the search ordered remove at most "
                         f"{shares[-1]:.3f} of all parameters; ask for less, or let the search order more "
                         "(search.largest, keep_first, k_max)")
    count = enough(shares, ratio, match)
    picked = sorted(zip(blocks[:count], search.scores, strict=False))
    return Selection([block for block, _ in picked], [score for _, score in picked], search.criterion, ratio,
                     shares[count], shares[-1], k_max,
                     [{"block": block, "score": score} for block, score in zip(blocks, search.scores, strict=True)],
                     count)


def enough(shares: list[float], ratio: float, match: str) -> int:
    """Number of blocks that are removed to meet the ratio. Entry n of `shares` is the share of the parameters that n
    blocks remove."""
    count = next(n for n, share in enumerate(shares) if share >= ratio - ROUNDING)
    nearer_below = ratio - shares[count - 1] <= shares[count] - ratio
    return count - 1 if match == "nearest" and nearer_below and count > 1 else count


def shares_of(blocks: list[Block], facts: ModelFacts, module_params: int) -> list[float]:
    """Entry n of the result is the share of all parameters that the first n blocks remove."""
    saved = [sum(facts.params_per_layer[slice(*block)]) - module_params for block in blocks]
    return [removed / facts.params_total for removed in itertools.accumulate(saved, initial=0)]


def eligible_layers(layers: int, protect: float) -> range:
    """Layers that may be removed: all but the first and last `protect` share, rounded half up to whole layers."""
    edge = math.floor(protect * layers + 0.5)
    return range(edge, layers - edge)


def _candidates(similarity: Similarity, layers: int, k_max: int, criterion: str, protect: float,
                removes: str) -> list[dict[str, Any]]:
    """All eligible blocks, from the best to the worst: {block, context, score}."""
    matrix_LL: Tensor = getattr(similarity, f"{criterion}_LL")
    index = {layer: place for place, layer in enumerate(similarity.layers)}
    eligible, found = eligible_layers(layers, protect), []
    kept = 1 if removes == "k_max-1" else 0
    for first in range(max(0, eligible.start - kept), eligible.stop - k_max + 1):
        last = first + k_max
        score = score_of(matrix_LL, index, first, last)
        if math.isfinite(score):
            found.append({"block": (first + kept, last), "context": (first, last), "score": score})
    return sorted(found, key=lambda candidate: (-candidate["score"], candidate["block"]))


def score_of(matrix_LL: Tensor, index: dict[int, int], first: int, last: int) -> float:
    """The similarity of two states, an entry of the matrix. Raises BlockError if a state is not stored."""
    if first not in index or last not in index:
        raise BlockError(f"similarity lacks state {first if first not in index else last}; set hidden.layers to all")
    # the similarity of h_first and h_last; for a KDP block it is CKA(h_l, h_{l+K_max})
    return matrix_LL[index[first], index[last]].item()


def _initial(k_max: int, expand_from: int | None, removes: str) -> int:
    """The K_max with which blocks are scored and chosen: `expand_from` if it is given, otherwise `k_max`."""
    least = 2 if removes == "k_max-1" else 1
    if expand_from is not None and not least <= expand_from <= k_max:
        raise BlockError(f"block.expand_from {expand_from}: must lie between {least} and k_max, here {k_max}; a block "
                         "can only grow")
    return k_max if expand_from is None else expand_from


def _grown(candidates: list[dict[str, Any]], k_max: int, end: int) -> list[dict[str, Any]]:
    """The candidates, extended at the end to k_max layers of context. A candidate is omitted if its context would
    extend beyond layer `end` - 1."""
    grown = [{**candidate, "block": (candidate["block"][0], candidate["context"][0] + k_max),
              "context": (candidate["context"][0], candidate["context"][0] + k_max)} for candidate in candidates]
    return [candidate for candidate in grown if candidate["block"][1] <= end]


def _given(similarity: Similarity, facts: ModelFacts, given: list[list[int]], ratio: float, k_max: int,
           module_params: int, criterion: str, removes: str) -> Selection:
    """The blocks that the config names, ascending, with the scores of their contexts."""
    blocks = _checked_blocks(given, facts.layers)
    matrix_LL: Tensor = getattr(similarity, f"{criterion}_LL")
    index = {layer: place for place, layer in enumerate(similarity.layers)}
    kept = 1 if removes == "k_max-1" else 0
    # a block at layer 0 has no layer of context before it
    scores = [score_of(matrix_LL, index, max(0, start - kept), stop) for start, stop in blocks]
    share = shares_of(blocks, facts, module_params)[-1]
    return Selection(blocks, scores, criterion, ratio, share, share, k_max, [], layers_of(blocks))


def layers_of(blocks: list[Block]) -> int:
    """Number of layers of all blocks together."""
    return sum(stop - start for start, stop in blocks)


def _checked_blocks(given: list[list[int]], layers: int) -> list[Block]:
    if not given:
        raise BlockError("block.given is empty; name at least one block as [start, stop]")
    for block in given:
        if len(block) != 2 or not 0 <= block[0] < block[1] <= layers:
            raise BlockError(f"block.given {block}: a block is [start, stop] with 0 <= start < stop <= {layers}, the "
                             "layers of the model")
    blocks: list[Block] = sorted((start, stop) for start, stop in given)
    for one, other in itertools.pairwise(blocks):
        if other[0] < one[1]:
            raise BlockError(f"block.given {list(one)} and {list(other)} share a layer; name one block for both, or "
                             "blocks without a common layer")
    return blocks


def _greedy(candidates: list[dict[str, Any]], apart: str) -> list[dict[str, Any]]:
    """The candidates, in the order of their scores, that do not overlap an already selected candidate."""
    taken: list[Block] = []
    chosen = []
    for candidate in candidates:
        start, stop = candidate["context" if apart == "context" else "block"]
        if all(stop <= other_start or start >= other_stop for other_start, other_stop in taken):
            taken.append((start, stop))
            chosen.append(candidate)
    return chosen


def check_reachable(ratio: float, shares: list[float], k_max: int, eligible: range) -> None:
    """Raise BlockError if even the last of `shares`, the share of all blocks, does not reach the ratio."""
    if len(shares) == 1:
        raise BlockError(f"k_max {k_max}: no block fits in layers {eligible.start} to {eligible.stop - 1} with finite "
                         "similarity; lower k_max or block.protect")
    least = min(after - before for before, after in itertools.pairwise(shares))
    if least <= 0:
        raise BlockError(f"k_max {k_max}: a stand-in has at least as many parameters as the layers that it replaces "
                         f"({-least:+.2%} of the model); lower its width or raise k_max")
    if ratio > shares[-1] + ROUNDING:
        # the ratio is rounded down, so that the ratio in the message can be reached
        largest = math.floor((shares[-1] + ROUNDING / 2) * 1e4) / 1e4
        raise BlockError(f"ratio {ratio} is too high: the blocks of k_max {k_max} in layers {eligible.start} to "
                         f"{eligible.stop - 1} remove at most {largest:.4f} of all parameters; ask for less")


def one_run(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
            criterion: Angle = "angular_last", protect: Edge = 0.0, match: Match = "nearest") -> Selection:
    """Select the run of consecutive layers over which the direction of the states changes least. The first layer is
    kept.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used; the ratio determines the length of the run.
    module_params: number of parameters of the module that replaces the run.
    criterion: `angular_last`, the mean angle over the last token of sequences, as in ReplaceMe's code, or `angular`,
        the mean angle over all counted tokens.
    protect: share of the layers kept at each end, rounded to whole layers.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(one_run, locals())
    # at least the first layer is kept, because ReplaceMe folds a run into the layer before the run
    eligible = eligible_layers(facts.layers, max(protect, 0.5 / facts.layers))
    return best_run(-getattr(similarity, f"{criterion}_LL"), similarity, facts, eligible, ratio, k_max, module_params,
                 match, criterion, -1.0)


def most_alike(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
               keep_first: Natural = 1, keep_last: Natural = 1, match: Match = "nearest") -> Selection:
    """Select the run of layers whose input and output have the highest cosine similarity, averaged over all tokens.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used; the ratio determines the length of the run.
    module_params: number of parameters of the module that replaces the run.
    keep_first: number of layers at the start that are kept (0 in the code of LLM-Streamline, 1 in LoRP).
    keep_last: number of layers at the end that are kept.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(most_alike, locals())
    eligible = between(facts.layers, keep_first, keep_last)
    return best_run(similarity.cosine_all_LL, similarity, facts, eligible, ratio, k_max, module_params, match, "cosine",
                    1.0)


def as_many(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
            match: Match = "nearest") -> Selection:
    """Select only the number of layers, for a fit that chooses the layers itself.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used.
    module_params: number of parameters that the method adds.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(as_many, locals())
    found = deepest_run(facts, ratio, k_max, module_params, match, keep_last=1)
    return found._replace(blocks=[], scores=[], criterion="fit")


def no_layer(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int) -> Selection:
    """Select no layers. The fit removes parameters inside the layers, in the share that `ratio` gives.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used.
    module_params: number of parameters that the method adds.
    """
    options.check(no_layer, locals())
    largest = sum(facts.params_per_layer) / facts.params_total
    if ratio >= largest:
        raise BlockError(f"ratio {ratio} is too high: all decoder layers together hold {largest:.4f} of all "
                         "parameters; ask for less")
    return Selection([], [], "weights", ratio, ratio, largest, k_max, [], 0)


def as_drops(removed: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Removed parts as in a plan: if both parts of a layer are removed, the layer is one entry, `whole`."""
    found = []
    for layer in sorted({layer for layer, _ in removed}):
        parts = sorted(part for number, part in removed if number == layer)
        found.append((layer, parts[0] if len(parts) == 1 else "whole"))
    return found


def deepest_run(facts: ModelFacts, ratio: float, k_max: int, module_params: int, match: str,
                keep_last: int) -> Selection:
    """Select the deepest layers, without the last `keep_last` layers."""
    eligible = between(facts.layers, 0, keep_last)
    # layers N - n - keep_last .. N - keep_last - 1
    runs = [(eligible.stop - n, eligible.stop) for n in range(1, len(eligible) + 1)]
    return of_length(runs, [0.0] * len(runs), facts, ratio, k_max, module_params, match, "deepest")


def between(layers: int, keep_first: int, keep_last: int) -> range:
    """Layers that may be removed."""
    if keep_first + keep_last >= layers:
        raise BlockError(f"block.keep_first {keep_first} and keep_last {keep_last} of {layers} layers leave none that "
                         "may be removed; lower keep_first or keep_last")
    return range(keep_first, layers - keep_last)


def best_run(alike_LL: Tensor, similarity: Similarity, facts: ModelFacts, eligible: range, ratio: float, k_max: int,
             module_params: int, match: str, criterion: str, sign: float) -> Selection:
    """For each number of layers, find the run with the highest value in `alike_LL`. From these runs, select the run
    that meets the ratio. The recorded score of a run is `sign` times this value."""
    index = {layer: place for place, layer in enumerate(similarity.layers)}
    runs, scores = [], []
    for n in range(1, len(eligible) + 1):
        same_length = [(start, start + n) for start in range(eligible.start, eligible.stop - n + 1)]
        run = max(same_length, key=lambda run: (score_of(alike_LL, index, *run), -run[0]))
        runs.append(run)
        scores.append(sign * score_of(alike_LL, index, *run))
    return of_length(runs, scores, facts, ratio, k_max, module_params, match, criterion)


def of_length(runs: list[Block], scores: list[float], facts: ModelFacts, ratio: float, k_max: int,
              module_params: int, match: str, criterion: str) -> Selection:
    """Select the run that meets the ratio. `runs` contains one run for each number of layers, in ascending order."""
    saved = [shares_of([run], facts, module_params)[-1] for run in runs]
    # a run is no candidate if its replacement has as many parameters or more
    fitting = [index for index, share in enumerate(saved) if share > 0]
    shares = [0.0, *(saved[index] for index in fitting)]
    # the longest run contains all layers that may be removed
    check_reachable(ratio, shares, k_max, range(*runs[-1]))
    chosen = fitting[enough(shares, ratio, match) - 1]
    return Selection([runs[chosen]], [scores[chosen]], criterion, ratio, saved[chosen], shares[-1], k_max, [],
                     layers_of([runs[chosen]]))
