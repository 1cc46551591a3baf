"""Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers": one run of layers is removed.

angular     l* = argmin_l D(l, n), D(l, n) = mean over sequences of arccos(cos(x_l, x_l+n)) / pi at the last token,
            l = 0 .. N - n as in the paper.
deepest     the paper's rule without data: the n deepest layers before the last layer, N - n - 1 .. N - 2.

The released PruneMe never removes layer 0 (`keep_first: 1`), and it reads the last state after the final norm. The
sequences of PruneMe end at the end of a document or of a chat turn, while packed sequences may end anywhere in a text.
"""
from kdp_core.base import options
from kdp_core.base.options import Count, Natural, Share
from kdp_core.base.records import ModelFacts, Selection, Similarity
from kdp_core.methods._method import Method
from kdp_core.methods._select import Match, best_run, between, deepest_run


def angular(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
            keep_first: Natural = 0, keep_last: Natural = 0, match: Match = "nearest") -> Selection:
    """Select the run of layers over which the direction of the last token's state changes least.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used; the ratio determines the length of the run.
    module_params: number of parameters of the module that replaces the run.
    keep_first: number of layers at the start that are kept.
    keep_last: number of layers at the end that are kept.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(angular, locals())
    eligible = between(facts.layers, keep_first, keep_last)
    return best_run(-similarity.angular_last_LL, similarity, facts, eligible, ratio, k_max, module_params, match,
                 "angular_last", -1.0)


def deepest(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
            keep_last: Natural = 1, match: Match = "nearest") -> Selection:
    """Select the deepest layers, without the last `keep_last` layers.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not used; the ratio determines the length of the run.
    module_params: number of parameters of the module that replaces the run.
    keep_last: number of layers at the end that are kept.
    match: `nearest` removes the share nearest to the ratio, `reach` removes at least the ratio.
    """
    options.check(deepest, locals())
    return deepest_run(facts, ratio, k_max, module_params, match, keep_last)


METHODS = (
    Method("angular", "Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers: the run of least "
                      "angular distance, at the last token", "layers removed", angular),
    Method("deepest", "Gromov et al. 2024: the deepest layers but the last", "layers removed", deepest),
)
