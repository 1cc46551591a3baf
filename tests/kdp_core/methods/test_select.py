"""Blocks against brute force on small models, and every reading of the paper told apart."""
import itertools
import math

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import ModelFacts, Search, Similarity
from kdp_core.methods._select import BlockError, eligible_layers, in_order, most_similar

OUTSIDE = 500
"""Parameters of the embedding and norms."""


def facts(layers: int, per_layer: list[int] | None = None) -> ModelFacts:
    per_layer = per_layer or [100] * layers
    return ModelFacts("llama", layers, 4, 384, sum(per_layer) + OUTSIDE, per_layer, 0, "made", "")


def of_matrix(scores_LL: torch.Tensor) -> Similarity:
    """The same scores under each criterion, in different orders so that they cannot be mixed up."""
    return Similarity(list(range(len(scores_LL))), -scores_LL, scores_LL, scores_LL.abs(), scores_LL,
                      scores_LL.square(), scores_LL.pow(3), "raw", 1, 0)


def of_random(layers: int, seed: int = 0) -> Similarity:
    scores_LL = torch.randn(layers + 1, layers + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return of_matrix(scores_LL + scores_LL.mT)


def of_first_layers(layers: int, k_max: int, score: dict[int, float], rest: float = 0.1) -> Similarity:
    """Scores by the first layer of the context."""
    scores_LL = torch.full((layers + 1, layers + 1), rest, dtype=torch.float64)
    for first, value in score.items():
        scores_LL[first, first + k_max] = value
    return of_matrix(scores_LL)


def brute(similarity, layers, k_max, count, *, removes="k_max-1", apart="context", protect=0.1):
    """The first `count` blocks, by rescanning all layers for the best block that still fits."""
    edge = int(protect * layers + 0.5)
    taken, blocks = set(), []
    for _ in range(count):
        best = None
        for first in range(layers - k_max + 1):
            context = set(range(first, first + k_max))
            gone = context - {first} if removes == "k_max-1" else context
            if min(gone) < edge or max(gone) >= layers - edge or taken & (context if apart == "context" else gone):
                continue
            score = similarity.cka_linear_LL[first, first + k_max].item()
            if best is None or score > best[0]:
                best = (score, gone, context)
        if best is None:
            return blocks
        taken |= best[2] if apart == "context" else best[1]
        blocks.append((min(best[1]), max(best[1]) + 1))
    return blocks


def selected(similarity, layers, ratio, k_max=3, module_params=0, per_layer=None, **options):
    return most_similar(similarity, facts(layers, per_layer), ratio=ratio, k_max=k_max, module_params=module_params,
                        **options)


READINGS = list(itertools.product(["k_max-1", "k_max"], ["context", "removed"]))


@pytest.mark.parametrize("removes, apart", READINGS)
@pytest.mark.parametrize("layers, k_max, protect", [(10, 3, 0.1), (13, 2, 0.1), (20, 4, 0.1), (7, 3, 0.0),
                                                    (16, 3, 0.25)])
def test_greedy_is_the_brute_force(layers, k_max, protect, removes, apart):
    gone = k_max - 1 if removes == "k_max-1" else k_max
    for seed in range(4):
        similarity = of_random(layers, seed)
        everything = brute(similarity, layers, k_max, layers, removes=removes, apart=apart, protect=protect)
        for count in range(1, len(everything) + 1):
            ratio = count * gone * 100 / (layers * 100 + OUTSIDE)
            found = selected(similarity, layers, ratio, k_max, removes=removes, apart=apart, protect=protect)
            assert found.blocks == sorted(everything[:count])
            assert found.ratio_planned == pytest.approx(ratio)
            kept = k_max - gone
            assert found.scores == [similarity.cka_linear_LL[a - kept, b].item() for a, b in found.blocks]


@pytest.mark.parametrize("removes, apart", READINGS)
def test_every_candidate_is_eligible_and_listed_best_first(removes, apart):
    layers, k_max = 20, 3
    found = selected(of_random(layers), layers, 0.05, k_max, removes=removes, apart=apart)
    scores = [candidate["score"] for candidate in found.candidates]
    assert scores == sorted(scores, reverse=True)
    gone = {layer for candidate in found.candidates for layer in range(*candidate["block"])}
    assert gone == set(range(2, 18)), "the first and last 10 % of 20 layers stay, all others may go"
    length = k_max - 1 if removes == "k_max-1" else k_max
    assert all(b - a == length and d - c == k_max and d == b for (a, b), (c, d) in
               ((candidate["block"], candidate["context"]) for candidate in found.candidates))
    assert len(found.candidates) == 16 - length + 1


@pytest.mark.parametrize("layers, protect, expected", [
    (10, 0.1, range(1, 9)), (12, 0.1, range(1, 11)), (15, 0.1, range(2, 13)), (32, 0.1, range(3, 29)),
    (30, 0.1, range(3, 27)), (4, 0.1, range(0, 4)), (10, 0.0, range(0, 10)), (10, 0.4, range(4, 6)),
])
def test_eligible_layers(layers, protect, expected):
    assert eligible_layers(layers, protect) == expected


def test_ties_go_to_the_lowest_layer():
    similarity = of_first_layers(20, 3, {}, rest=0.5)
    found = selected(similarity, 20, 4 * 100 / 2500)
    # contexts 1-3 and 4-6: the first layer of each stays
    assert found.blocks == [(2, 4), (5, 7)]
    assert [candidate["block"] for candidate in found.candidates] == sorted(c["block"] for c in found.candidates)


def test_contexts_apart_or_removed_layers_apart():
    """As LLaMA-2-13B in Table 5, [7, 8] [9, 10]: the contexts 6-8 and 8-10 share layer 8."""
    similarity = of_first_layers(20, 3, {6: 0.9, 8: 0.8, 9: 0.7})
    ratio = 4 * 100 / 2500
    assert selected(similarity, 20, ratio, apart="removed").blocks == [(7, 9), (9, 11)]
    assert selected(similarity, 20, ratio, apart="context").blocks == [(7, 9), (10, 12)]


def test_first_layer_of_the_context_stays_or_goes():
    similarity = of_first_layers(20, 3, {6: 0.9})
    assert selected(similarity, 20, 0.08).blocks == [(7, 9)]
    assert selected(similarity, 20, 0.08, removes="k_max").blocks == [(6, 9)]


def test_a_protected_layer_may_be_context_but_never_goes():
    similarity = of_first_layers(20, 3, {0: 0.99, 1: 0.9, 15: 0.8, 16: 0.95})
    assert selected(similarity, 20, 0.16).blocks == [(2, 4), (16, 18)]
    assert selected(similarity, 20, 0.12, removes="k_max").blocks == [(15, 18)]


@pytest.mark.parametrize("criterion", ["cka_linear", "cka_rbf", "cosine"])
def test_criterion(criterion):
    similarity = of_random(16)
    found = selected(similarity, 16, 0.1, criterion=criterion)
    matrix_LL = getattr(similarity, f"{criterion}_LL")
    (start, stop), = found.blocks
    assert found.scores == [matrix_LL[start - 1, stop].item()]
    assert found.scores == [max(matrix_LL[k, k + 3].item() for k in range(1, 12))]
    assert found.criterion == criterion


@pytest.mark.parametrize("match, ratio, count", [
    # 2,500 parameters and blocks of 200 less a module of 50: shares 0.06, 0.12, 0.18, ...
    ("nearest", 0.06, 1), ("nearest", 0.089, 1), ("nearest", 0.091, 2), ("nearest", 0.12, 2), ("nearest", 0.149, 2),
    ("nearest", 0.151, 3), ("nearest", 0.01, 1), ("reach", 0.01, 1), ("reach", 0.06, 1), ("reach", 0.061, 2),
    ("reach", 0.089, 2), ("reach", 0.121, 3),
])
def test_match(match, ratio, count):
    found = selected(of_random(20), 20, ratio, module_params=50, match=match)
    assert len(found.blocks) == count
    assert found.ratio_planned == pytest.approx(0.06 * count)
    assert found.ratio_target == ratio
    shares = [0.06 * n for n in range(1, 6)]
    best = min(shares, key=lambda share: abs(share - ratio)) if match == "nearest" else \
        min(share for share in shares if share >= ratio - 1e-12)
    assert found.ratio_planned == pytest.approx(best)


def test_shares_are_counted_layer_by_layer():
    per_layer = [100 + 7 * k for k in range(16)]
    total, similarity = sum(per_layer) + OUTSIDE, of_random(16)
    found = selected(similarity, 16, 0.2, module_params=33, per_layer=per_layer)
    gone = sum(per_layer[layer] for block in found.blocks for layer in range(*block))
    assert found.ratio_planned == pytest.approx((gone - 33 * len(found.blocks)) / total)
    blocks = brute(similarity, 16, 3, 16)
    largest = sum(per_layer[layer] for block in blocks for layer in range(*block)) - 33 * len(blocks)
    assert found.ratio_largest == pytest.approx(largest / total)


@pytest.mark.parametrize("removes, apart", READINGS)
@pytest.mark.parametrize("match", ["nearest", "reach"])
def test_blocks_are_nested_in_the_ratio_and_never_overlap(removes, apart, match):
    similarity, before, context = of_random(24), set(), []
    largest = selected(similarity, 24, 0.01, removes=removes, apart=apart, module_params=20).ratio_largest
    for step in range(1, 41):
        found = selected(similarity, 24, largest * step / 40, removes=removes, apart=apart, match=match,
                         module_params=20)
        assert before <= set(found.blocks)
        before = set(found.blocks)
        assert found.blocks == sorted(found.blocks)
        kept = 1 if removes == "k_max-1" and apart == "context" else 0
        spans = [(start - kept, stop) for start, stop in found.blocks]
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        context.append(len(before))
    assert context == sorted(context) and context[-1] > context[0]


@pytest.mark.parametrize("layers", range(10, 26))
def test_a_ratio_too_high_names_one_that_works(layers):
    similarity = of_random(layers, seed=layers)
    with pytest.raises(BlockError, match=r"ratio 0\.95 is too high.* remove at most 0\.\d{4} of all") as error:
        selected(similarity, layers, 0.95, module_params=13)
    named = float(str(error.value).split("at most ")[1].split()[0])
    found = selected(similarity, layers, named, module_params=13)
    assert found.ratio_planned == pytest.approx(found.ratio_largest)
    assert named - 1e-12 <= found.ratio_largest < named + 1e-4
    assert selected(similarity, layers, found.ratio_largest, module_params=13).blocks == found.blocks
    with pytest.raises(BlockError, match="too high"):
        selected(similarity, layers, named + 1e-4, module_params=13)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_share_asked_for_exactly_is_met_exactly(count):
    """0.28 or 0.07 have no exact binary form, and sums of shares stray in the last digit."""
    for total in (700, 1000, 1500, 3000):
        per_layer = [7] * 20
        made = facts(20, per_layer)._replace(params_total=total)
        found = most_similar(of_random(20), made, ratio=count * 14 / total, k_max=3, module_params=0, match="reach")
        assert len(found.blocks) == count and found.ratio_planned == count * 14 / total


@pytest.mark.parametrize("ratio, words", [(0, "above 0"), (0.0, "above 0"), (1, "below 1"), (1.5, "below 1"),
                                          (-0.1, "above 0"), (math.nan, "above 0")])
def test_ratio_must_be_a_share(ratio, words):
    with pytest.raises(OptionError, match=rf"ratio is {ratio}; give a number {words}"):
        selected(of_random(10), 10, ratio)


@pytest.mark.parametrize("module_params", [200, 250])
def test_a_module_as_large_as_its_block_is_refused(module_params):
    with pytest.raises(BlockError, match="stand-in has at least as many parameters as the layers that it replaces"):
        selected(of_random(10), 10, 0.1, module_params=module_params)
    assert selected(of_random(10), 10, 0.0006, module_params=199).ratio_planned == pytest.approx(1 / 1500)


def test_a_module_too_large_for_a_later_block_is_refused():
    per_layer = [100] * 10 + [10] * 10
    similarity = of_first_layers(20, 3, {3: 0.9, 12: 0.8})
    with pytest.raises(BlockError, match="stand-in has at least as many parameters"):
        selected(similarity, 20, 0.2, module_params=50, per_layer=per_layer)


@pytest.mark.parametrize("options, message", [
    ({"k_max": 1}, "k_max 1: a block would remove no layer"),
    ({"k_max": 0, "removes": "k_max"}, "k_max is 0; give a number at least 1"),
    ({"k_max": 11}, "k_max 11: no block fits in layers 1 to 8"),
    ({"protect": 0.5}, r"protect is 0\.5; give a number below 0\.5"),
    ({"protect": -0.1}, r"protect is -0\.1; give a number at least 0"),
    ({"criterion": "cka"}, "criterion is 'cka'; choose one of cka_linear, cka_rbf, cosine"),
    ({"removes": "all"}, "removes is 'all'; choose one of k_max-1, k_max"),
    ({"apart": "no"}, "apart is 'no'; choose one of context, removed"),
    ({"match": "above"}, "match is 'above'; choose one of nearest, reach"),
])
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        selected(of_random(10), 10, 0.1, **options)


def test_one_layer_blocks_of_the_literal_reading():
    assert len(selected(of_random(10), 10, 0.06, k_max=1, removes="k_max").blocks) == 1


def test_a_state_that_was_not_stored_is_named():
    similarity = of_random(9)._replace(layers=[0, 1, 2, 3, 5, 6, 7, 8, 9, 10])
    with pytest.raises(BlockError, match=r"similarity lacks state 4; set hidden\.layers to all"):
        selected(similarity, 10, 0.1)


def test_scores_that_are_not_finite_are_no_candidates():
    similarity = of_first_layers(20, 3, {6: math.nan, 9: 0.9})
    found = selected(similarity, 20, 0.08)
    assert found.blocks == [(10, 12)]
    assert all(candidate["context"] != (6, 9) for candidate in found.candidates)
    with pytest.raises(BlockError, match="no block fits in layers 2 to 17 with finite similarity"):
        selected(of_matrix(torch.full((21, 21), math.nan)), 20, 0.08)


def test_an_initial_block_grows_at_its_end():
    """Table 4: [6,7] for K_max = 3 becomes [6,7,8] for 4, whatever the scores of longer contexts say."""
    similarity = of_random(30)
    similarity.cka_linear_LL[5, 8] = 100.0
    for k_max in (3, 4, 5, 6):
        found = selected(similarity, 30, 0.01, k_max, expand_from=3)
        assert found.blocks == [(6, 5 + k_max)] and found.scores == [100.0] and found.k_max == k_max
    assert selected(similarity, 30, 0.01, 5).blocks != [(6, 10)], "chosen anew it is another block"


@pytest.mark.parametrize("removes, apart", READINGS)
def test_growing_from_its_own_k_max_changes_nothing(removes, apart):
    for seed in range(3):
        similarity = of_random(20, seed)
        assert selected(similarity, 20, 0.2, 4, removes=removes, apart=apart, expand_from=4) == \
            selected(similarity, 20, 0.2, 4, removes=removes, apart=apart)


@pytest.mark.parametrize("removes, apart", READINGS)
def test_grown_blocks_stay_apart_and_out_of_the_protected_end(removes, apart):
    layers = 24
    for seed in range(6):
        similarity = of_random(layers, seed)
        largest = selected(similarity, layers, 0.01, 5, removes=removes, apart=apart, expand_from=3).ratio_largest
        found = selected(similarity, layers, largest, 5, removes=removes, apart=apart, expand_from=3)
        kept = 1 if removes == "k_max-1" else 0
        assert all(stop - start == 5 - kept and start >= 2 and stop <= 22 for start, stop in found.blocks)
        spans = [(start - kept if apart == "context" else start, stop) for start, stop in found.blocks]
        assert len(spans) > 1 and all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
        initial = {c["context"][0]: c["score"] for c in selected(similarity, layers, 0.01, 3, removes=removes,
                                                                 apart=apart).candidates}
        assert found.scores == [initial[start - kept] for start, _ in found.blocks]


def test_given_blocks_are_taken_as_they_are():
    similarity = of_random(10)
    found = selected(similarity, 10, 0.9, k_max=5, module_params=30, given=[[7, 10], [0, 2]])
    assert found.blocks == [(0, 2), (7, 10)], "protected layers go if named"
    assert found.ratio_planned == found.ratio_largest == pytest.approx((5 * 100 - 2 * 30) / 1500)
    assert found.scores == [similarity.cka_linear_LL[0, 2].item(), similarity.cka_linear_LL[6, 10].item()]
    assert found.ratio_target == 0.9 and found.k_max == 5


@pytest.mark.parametrize("given, words", [
    ([], "block.given is empty"), ([[2, 11]], r"block\.given \[2, 11\]: .* <= 10, the layers of the model"),
    ([[4, 4]], r"\[4, 4\]: a block is"), ([[-1, 2]], r"\[-1, 2\]: a block is"), ([[1, 2, 3]], r"\[1, 2, 3\]: a block"),
    ([[5, 8], [2, 6]], r"\[2, 6\] and \[5, 8\] share a layer"),
])
def test_given_blocks_that_cannot_be(given, words):
    with pytest.raises(BlockError, match=words):
        selected(of_random(10), 10, 0.1, given=given)


@pytest.mark.parametrize("removes, expand_from", [("k_max-1", 1), ("k_max", 5), ("k_max-1", 5)])
def test_a_block_can_only_grow(removes, expand_from):
    with pytest.raises(BlockError, match=rf"block\.expand_from {expand_from}: must lie between \d and k_max, here 4"):
        selected(of_random(20), 20, 0.1, 4, removes=removes, expand_from=expand_from)


# the order of a search

ORDER = [5, 9, 4, 12, 8, 2]


def searched(order=ORDER, k_max=3):
    return Search(order, [0.1 * (rank + 1) ** 2 for rank in range(len(order))], "divergence", k_max, {}, 20, {})


def ordered(ratio, layers=20, module_params=0, per_layer=None, k_max=3, **options):
    return in_order(searched(), facts(layers, per_layer), ratio=ratio, k_max=k_max, module_params=module_params,
                    **options)


@pytest.mark.parametrize("count", range(1, 7))
def test_the_first_layers_of_the_order_go_each_by_itself(count):
    found = ordered(count * 80 / 2500, module_params=20)
    assert found.blocks == sorted((layer, layer + 1) for layer in ORDER[:count])
    assert found.ratio_planned == pytest.approx(count * 80 / 2500)
    assert found.ratio_largest == pytest.approx(6 * 80 / 2500)
    assert found.criterion == "divergence" and found.k_max == 3 and found.ratio_target == count * 80 / 2500
    score = {layer: 0.1 * (rank + 1) ** 2 for rank, layer in enumerate(ORDER)}
    assert found.scores == [score[start] for start, _ in found.blocks] and found.layers == count
    assert [candidate["block"] for candidate in found.candidates] == [(layer, layer + 1) for layer in ORDER]


def test_a_higher_ratio_keeps_what_a_lower_one_took():
    before = set()
    for step in range(1, 25):
        blocks = set(ordered(0.24 * step / 24, match="reach").blocks)
        assert before <= blocks
        before = blocks
    assert len(before) == 6


@pytest.mark.parametrize("match, ratio, count", [
    ("nearest", 0.059, 1), ("nearest", 0.061, 2), ("reach", 0.041, 2), ("reach", 0.08, 2), ("nearest", 0.001, 1),
    ("nearest", 0.101, 3), ("reach", 0.24, 6),
])
def test_match_of_an_order(match, ratio, count):
    assert len(ordered(ratio, match=match).blocks) == count


def test_layers_of_an_order_are_counted_one_by_one():
    per_layer = [100 + 7 * k for k in range(20)]
    found = ordered(0.1, per_layer=per_layer, module_params=33)
    gone = sum(per_layer[start] - 33 for start, _ in found.blocks)
    assert found.ratio_planned == pytest.approx(gone / (sum(per_layer) + OUTSIDE))


@pytest.mark.parametrize("options, message", [
    ({"ratio": 0.25}, r"ratio 0\.25: the 6 layers that the search ordered remove at most 0\.240 of all parameters"),
    ({"ratio": 0.1, "k_max": 4}, "k_max 4: the search was made for k_max 3; search again"),
    ({"ratio": 1.2}, r"ratio is 1\.2; give a number below 1"), ({"ratio": 0.1, "match": "above"}, "match is 'above'; "),
])
def test_orders_that_cannot_serve_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ordered(**options)
