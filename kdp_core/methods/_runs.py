"""One run of consecutive layers for a ratio, and the counting for rows whose fit chooses what goes.

angular     l* = argmin_l D(l, n), D(l, n) = mean over sequences of arccos(cos(x_l, x_l+n)) / pi at the last token
            (Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers"); l = 0 .. N - n as in the
            paper. The released PruneMe never takes layer 0 (`keep_first: 1`) and takes its last state after the final
            norm. Its sequences end where a document or a chat turn does; packed sequences end anywhere.
deepest     the paper's data-free rule: the deepest n layers but the last one, N - n - 1 .. N - 2.
most_alike  l* = argmax_l of the mean cosine over all counted tokens, as LLM-Streamline selects (Chen et al. 2025);
            without a replacement it is what LoRP calls LLM-Streamline, here `cosine_run`.
one_run     by the mean angle over all counted tokens, for ReplaceMe, which folds the run into the layer before it.

Runs of different lengths are chosen anew: they need not be nested. Equal scores go to the lowest layer.
"""
from torch import Tensor

from kdp_core.base.records import Block, ModelFacts, Selection, Similarity
from kdp_core.methods._select import (
    BlockError,
    check,
    check_reachable,
    eligible_layers,
    enough,
    layers_of,
    score_of,
    shares_of,
)

ANGLES = ("angular", "angular_last")


def one_run(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int,
            criterion: str = "angular", protect: float = 0.1, match: str = "nearest") -> Selection:
    """The run of consecutive layers over which states turn least, as long as `ratio` asks; the first layer stays.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read: the run is as long as the ratio asks.
    module_params: parameters of what takes the run's place.
    criterion: `angular`, the mean angle over all counted tokens, or `angular_last`, over last tokens (ReplaceMe).
    protect: share of the layers that stay at each end, rounded to whole layers.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    if criterion not in ANGLES:
        raise BlockError(f"block.criterion {criterion!r}: choose one of {', '.join(ANGLES)}")
    check(ratio, k_max, "cosine", protect, "k_max-1", "context", match)
    # at least the first layer stays: ReplaceMe folds the run into the layer before it
    eligible = eligible_layers(facts.layers, max(protect, 0.5 / facts.layers))
    return _best(-getattr(similarity, f"{criterion}_LL"), similarity, facts, eligible, ratio, k_max, module_params,
                 match, criterion, -1.0)


def angular(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int,
            keep_first: int = 0, keep_last: int = 0, match: str = "nearest") -> Selection:
    """The run over which the last token's state turns least.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read: the run is as long as the ratio asks.
    module_params: parameters of what takes the run's place.
    keep_first: layers at the start that stay.
    keep_last: layers at the end that stay.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    eligible = _between(facts.layers, keep_first, keep_last)
    check(ratio, k_max, "cosine", 0.0, "k_max-1", "context", match)
    return _best(-similarity.angular_last_LL, similarity, facts, eligible, ratio, k_max, module_params, match,
                 "angular_last", -1.0)


def most_alike(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int,
               keep_first: int = 1, keep_last: int = 1, match: str = "nearest") -> Selection:
    """The run whose two ends have the highest mean cosine.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read: the run is as long as the ratio asks.
    module_params: parameters of what takes the run's place.
    keep_first: layers at the start that stay; the code of LLM-Streamline lets them go, LoRP keeps one.
    keep_last: layers at the end that stay.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    eligible = _between(facts.layers, keep_first, keep_last)
    check(ratio, k_max, "cosine", 0.0, "k_max-1", "context", match)
    return _best(similarity.cosine_LL, similarity, facts, eligible, ratio, k_max, module_params, match, "cosine", 1.0)


def deepest(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int,
            keep_last: int = 1, match: str = "nearest") -> Selection:
    """The deepest layers but the last.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read: the run is as long as the ratio asks.
    module_params: parameters of what takes the run's place.
    keep_last: layers at the end that stay.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    eligible = _between(facts.layers, 0, keep_last)
    check(ratio, k_max, "cosine", 0.0, "k_max-1", "context", match)
    # layers N - n - keep_last .. N - keep_last - 1
    runs = [(eligible.stop - n, eligible.stop) for n in range(1, len(eligible) + 1)]
    return _of_length(runs, [0.0] * len(runs), facts, ratio, k_max, module_params, match, "deepest")


def as_many(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int,
            match: str = "nearest") -> Selection:
    """No layers, but how many go, for a fit that chooses them itself.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read.
    module_params: parameters put back.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    found = deepest(similarity, facts, ratio=ratio, k_max=k_max, module_params=module_params, match=match)
    return found._replace(blocks=[], scores=[], criterion="fit")


def no_layer(similarity: Similarity, facts: ModelFacts, *, ratio: float, k_max: int, module_params: int) -> Selection:
    """No layer goes; the fit takes the ratio from inside the layers.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read.
    module_params: parameters put back.
    """
    check(ratio, k_max, "cosine", 0.0, "k_max-1", "context", "nearest")
    largest = sum(facts.params_per_layer) / facts.params_total
    if ratio >= largest:
        raise BlockError(f"ratio {ratio} is too high: all decoder layers together hold {largest:.4f} of all "
                         "parameters; ask for less")
    return Selection([], [], "weights", ratio, ratio, largest, k_max, [], 0)


def _between(layers: int, keep_first: int, keep_last: int) -> range:
    """Layers that may go."""
    if keep_first < 0 or keep_last < 0 or keep_first + keep_last >= layers:
        raise BlockError(f"block.keep_first {keep_first} and keep_last {keep_last} of {layers} layers leave none that "
                         "may go; lower them")
    return range(keep_first, layers - keep_last)


def _best(alike_LL: Tensor, similarity: Similarity, facts: ModelFacts, eligible: range, ratio: float, k_max: int,
          module_params: int, match: str, criterion: str, sign: float) -> Selection:
    """Of each length the run of highest value, and of these the one for the ratio; scores are sign times the value."""
    row = {layer: index for index, layer in enumerate(similarity.layers)}
    runs, scores = [], []
    for n in range(1, len(eligible) + 1):
        of_length = [(start, start + n) for start in range(eligible.start, eligible.stop - n + 1)]
        run = max(of_length, key=lambda run: (score_of(alike_LL, row, *run), -run[0]))
        runs.append(run)
        scores.append(sign * score_of(alike_LL, row, *run))
    return _of_length(runs, scores, facts, ratio, k_max, module_params, match, criterion)


def _of_length(runs: list[Block], scores: list[float], facts: ModelFacts, ratio: float, k_max: int,
               module_params: int, match: str, criterion: str) -> Selection:
    """The run whose length suits the ratio; `runs` holds one a length, ascending."""
    saved = [shares_of([run], facts, module_params)[-1] for run in runs]
    # a run no larger than what takes its place is no candidate
    fitting = [index for index, share in enumerate(saved) if share > 0]
    shares = [0.0, *(saved[index] for index in fitting)]
    # the longest run holds all layers that may go
    check_reachable(ratio, shares, k_max, range(*runs[-1]))
    chosen = fitting[enough(shares, ratio, match) - 1]
    return Selection([runs[chosen]], [scores[chosen]], criterion, ratio, saved[chosen], shares[-1], k_max, [],
                     layers_of([runs[chosen]]))
