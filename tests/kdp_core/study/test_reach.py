"""What a configuration and the facts of a model refuse is refused by every run, with the same sentence, and no more."""
import pytest
import torch

from kdp_core.base.records import ModelFacts, Search, Similarity
from kdp_core.methods import METHODS
from kdp_core.methods._select import BlockError, in_order
from kdp_core.study.reach import refusal

LAYERS = 30
FACTS = ModelFacts("llama", LAYERS, 576, 49152, 134_515_008, [3_540_096] * LAYERS, 0, "made", "")
"""Of SmolLM2-135M."""


def refused(name, ratio, facts=FACTS, k_max=3, sequences=128, **options):
    return refusal(name, facts, sequences, ratio=ratio, k_max=k_max, options=options)


def test_a_search_that_orders_too_few_layers_is_refused_before_it_runs():
    said = refused("kdp_residual", 0.25, search={"largest": 0.26})
    assert "ratio 0.25: the 8 layers that the search ordered remove at most 0." in said and "search.largest" in said
    assert refused("kdp_residual", 0.25) == "" and refused("kdp_residual", 0.1, search={"largest": 0.26}) == ""
    assert "remove at most" in refused("sleb", 0.5, search={"largest": 0.1})
    assert "remove at most" in refused("shortened_ppl", 0.7, search={"keep_first": 10, "keep_last": 10})
    assert "leave none that may be removed" in refused("shortened_ppl", 0.1, search={"keep_first": 30})


def test_runs_of_removed_layers_are_as_long_as_k_max_lets_them():
    # every second of the 24 layers that may be removed: 12 layers
    assert "the 12 layers" in refused("kdp_residual", 0.7, k_max=2, search={"largest": 1.0})


@pytest.mark.parametrize("name, options, words", [
    ("kdp", {}, "ratio 0.9 is too high: the blocks of k_max 3"),
    ("angular", {}, "ratio 0.9 is too high"),
    ("flap", {}, "all decoder layers together hold"),
    ("kdp_narrow", {}, "all decoder layers together hold"),
    ("kdp", {"block": {"given": [[28, 31]]}}, "0 <= start < stop <= 30"),
])
def test_a_ratio_or_a_block_out_of_reach_is_refused_in_the_words_of_the_method(name, options, words):
    assert words in refused(name, 0.9, **options)


@pytest.mark.parametrize("name, sequences, options, words", [
    ("kdp_residual", 16, {}, "search.judge_sequences 16 of 16 sequences leaves none to fit on"),
    ("kdp", 128, {"kernel": {"heldout": 0.001}}, "kernel.heldout 0.001 of 128 sequences leaves none on one side"),
])
def test_too_few_sequences_are_refused(name, sequences, options, words):
    assert words in refused(name, 0.2, sequences=sequences, **options)


def test_a_family_is_refused_by_name():
    why = refused("replaceme_lstsq", 0.1, facts=FACTS._replace(family="gemma2"))
    assert why == "" or "gemma2" in why
    assert "gemma2" in refused("slicegpt", 0.1, facts=FACTS._replace(family="gemma2"))


def similarity(seed):
    """Random positive similarities."""
    made = torch.rand(LAYERS + 1, LAYERS + 1, generator=torch.Generator().manual_seed(seed))
    alike_LL = (made + made.T) / 2
    return Similarity(list(range(LAYERS + 1)), alike_LL, 1 - alike_LL, 1 - alike_LL, alike_LL, alike_LL, alike_LL,
                      "mask", 1, 0)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items()
                                  if method.search is None or method.select is in_order])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.45, 0.6, 0.7, 0.85])
def test_nothing_is_refused_that_some_data_allow(name, ratio):
    """Where a real selection succeeds, on whatever states, nothing was refused before."""
    method = METHODS[name]
    if not refused(name, ratio):
        return
    counted = method.module_params(FACTS, {})
    for seed in range(3):
        basis = similarity(seed)
        if method.search:
            count = method.orders(FACTS, 3, {"largest": 0.5, "keep_first": 4, "keep_last": 2}) if method.orders else 30
            order = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist()[:count]
            basis = Search(order, [0.0] * count, "", 3, {}, 0, {})
        with pytest.raises(BlockError):
            method.select(basis, FACTS, ratio=ratio, k_max=3, module_params=counted)
