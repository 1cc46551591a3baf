"""Runs of consecutive layers against brute force."""
import pytest
import torch

from kdp_core.base.records import Similarity
from kdp_core.methods import _select as runs
from kdp_core.methods import gromov
from kdp_core.methods._select import BlockError, one_run
from tests.kdp_core.methods.test_select import OUTSIDE, facts, of_random


def run_of(similarity, layers, ratio, **options):
    """By the mean angle over all counted tokens, with a tenth of the layers kept at each end."""
    return one_run(similarity, facts(layers), ratio=ratio, k_max=3, module_params=0,
                   **{"criterion": "angular", "protect": 0.1} | options)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_one_run_is_the_one_over_which_states_turn_least(length):
    layers = 14
    for seed in range(5):
        similarity = of_random(layers, seed)
        similarity.angular_LL.abs_()
        found = run_of(similarity, layers, length * 100 / (layers * 100 + OUTSIDE))
        starts = range(1, 13 - length + 1)
        best = min(starts, key=lambda start: similarity.angular_LL[start, start + length].item())
        assert found.blocks == [(best, best + length)] and found.criterion == "angular"
        assert found.scores == [similarity.angular_LL[best, best + length].item()]
        assert found.ratio_planned == pytest.approx(length * 100 / (layers * 100 + OUTSIDE))


def test_one_run_leaves_the_first_layer_whatever_is_protected():
    """What takes its place is folded into the layer before it."""
    similarity = of_random(4)
    similarity.angular_LL[:] = 0.5
    similarity.angular_LL[0, 2] = 0.0
    assert run_of(similarity, 4, 2 * 100 / 900, protect=0.0).blocks == [(1, 3)]


@pytest.mark.parametrize("match, ratio, length", [("nearest", 0.059, 1), ("nearest", 0.061, 2), ("reach", 0.041, 2),
                                                  ("reach", 0.08, 2), ("nearest", 0.001, 1)])
def test_length_of_the_run(match, ratio, length):
    # 2,500 parameters and layers of 100: shares 0.04, 0.08, ...
    (start, stop), = run_of(of_random(20), 20, ratio, match=match).blocks
    assert stop - start == length


def test_a_run_that_would_be_too_long_names_a_ratio_that_works():
    with pytest.raises(BlockError, match=r"ratio 0\.9 is too high: .* remove at most 0\.6400 of all parameters"):
        run_of(of_random(20), 20, 0.9)
    assert run_of(of_random(20), 20, 0.64).blocks == [(2, 18)]


def test_one_run_reads_last_tokens_and_protects_the_first_layer_alone_as_released():
    similarity = of_random(14)
    last_LL = similarity.angular_last_LL
    found = one_run(similarity, facts(14), ratio=300 / 1900, k_max=3, module_params=0)
    best = min(range(1, 12), key=lambda start: last_LL[start, start + 3].item())
    assert found.blocks == [(best, best + 3)] and found.criterion == "angular_last" and found.layers == 3


# the other rules

def chosen(rule, similarity, layers, length, **options):
    return rule(similarity, facts(layers), ratio=length * 100 / (layers * 100 + OUTSIDE), k_max=3, module_params=0,
                **options)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_angular_is_the_run_over_which_last_tokens_turn_least_any_layer_in(length):
    for seed in range(6):
        similarity = of_random(12, seed)
        found = chosen(gromov.angular, similarity, 12, length)
        distance = {start: similarity.angular_last_LL[start, start + length].item() for start in range(13 - length)}
        best = min(distance, key=distance.get)
        assert found.blocks == [(best, best + length)] and found.scores == [distance[best]]


@pytest.mark.parametrize("length", [1, 4, 10])
def test_most_alike_has_the_highest_cosine_and_leaves_both_ends(length):
    for seed in range(6):
        similarity = of_random(12, seed)
        found = chosen(runs.most_alike, similarity, 12, length)
        cosine = {start: similarity.cosine_all_LL[start, start + length].item() for start in range(1, 12 - length)}
        best = max(cosine, key=cosine.get)
        assert found.blocks == [(best, best + length)] and found.scores == [cosine[best]]
        assert found.criterion == "cosine" and found.layers == length


def test_ties_of_runs_go_to_the_lowest_layer():
    flat_LL = torch.full((13, 13), 0.25, dtype=torch.float64)
    similarity = Similarity(list(range(13)), *[flat_LL] * 6, "raw", 1, 0)
    assert chosen(gromov.angular, similarity, 12, 3).blocks == [(0, 3)]
    assert chosen(runs.most_alike, similarity, 12, 3).blocks == [(1, 4)]


@pytest.mark.parametrize("length", [1, 3, 11])
def test_deepest_keeps_the_last_layer(length):
    found = chosen(gromov.deepest, of_random(12), 12, length)
    assert found.blocks == [(11 - length, 11)]
    assert chosen(gromov.deepest, of_random(12), 12, 2, keep_last=3).blocks == [(7, 9)]


def test_a_run_that_one_layer_replaces_is_one_layer_longer():
    found = runs.most_alike(of_random(12), facts(12), ratio=300 / 1700, k_max=3, module_params=100)
    (start, stop), = found.blocks
    assert stop - start == 4 and found.ratio_planned == pytest.approx(300 / 1700)
    least = runs.most_alike(of_random(12), facts(12), ratio=0.001, k_max=3, module_params=100)
    assert least.blocks[0][1] - least.blocks[0][0] == 2, "one layer for one layer saves nothing"


def test_rows_that_choose_in_their_fit_get_a_number():
    found = chosen(runs.as_many, of_random(12), 12, 4)
    assert (found.blocks, found.layers, found.criterion) == ([], 4, "fit")
    assert found.ratio_planned == pytest.approx(400 / 1700)
    weights = runs.no_layer(of_random(12), facts(12), ratio=0.3, k_max=3, module_params=0)
    assert (weights.blocks, weights.layers, weights.ratio_planned) == ([], 0, 0.3)


@pytest.mark.parametrize("rule, ratio, options, message", [
    (gromov.angular, 0.8, {}, r"ratio 0\.8 is too high: .* remove at most 0\.7058 of all parameters"),
    (runs.most_alike, 0.6, {}, r"in layers 1 to 10 remove at most 0\.5882"),
    (gromov.angular, 0.2, {"keep_first": 6, "keep_last": 6}, r"keep_first 6 and keep_last 6 of 12 layers leave none"),
    (gromov.deepest, 0.2, {"keep_last": -1}, "keep_last is -1; give a number at least 0"),
    (gromov.angular, 1.5, {}, r"ratio is 1\.5; give a number below 1"),
    (runs.one_run, 0.2, {"criterion": "cka"}, "criterion is 'cka'; choose one of angular, angular_last"),
    (runs.no_layer, 0.75, {}, r"ratio 0\.75 is too high: all decoder layers together hold 0\.7059"),
])
def test_runs_that_cannot_be_are_refused(rule, ratio, options, message):
    with pytest.raises(ValueError, match=message):
        rule(of_random(12), facts(12), ratio=ratio, k_max=3, module_params=0, **options)
