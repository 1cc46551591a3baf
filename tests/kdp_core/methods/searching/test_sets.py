"""The row `layer_search`: what it removes, what it says of itself, refusals, same bits."""
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import ModelFacts
from kdp_core.methods._judge import RankError
from kdp_core.methods._method import Sizes
from kdp_core.methods._search.objectives import drawn
from kdp_core.methods._select import BlockError
from kdp_core.methods.searching.sets import as_many_replaced, compose, flops, module_params
from kdp_core.model import checkpoints
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.hidden import extract
from tests import pico
from tests.kdp_core.methods.searching.test_objectives import ENTRIES, write
from tests.kdp_core.methods.searching.whole import LAYERS, TOKENS, as_many, evaluator

OPTIONS = {"sequences": 5, "budget": 60, "batch_sequences": 2, "positions": None}


class Dense(NamedTuple):
    """A checkpoint."""
    folder: Any
    model: Any


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model, folder = pico.lively(pico.model("llama", layers=LAYERS)), tmp_path_factory.mktemp("dense") / "model"
    model.save_pretrained(folder)
    pico.tokenizer().save_pretrained(folder)
    return Dense(folder, model)


def run(dense, count=2, **more):
    return compose(dense.folder, None, TOKENS, as_many(count), **OPTIONS | more)


def test_what_a_search_says_of_itself(dense):
    found = run(dense, strategy="swaps")
    stats = found.stats
    assert found.plan.drop == [(layer, "whole") for layer in stats["removed"]] and len(stats["removed"]) == 2
    assert stats["value"] == stats["best_so_far"][-1]["value"] and stats["passes"] <= 60
    assert set(stats["single"]) == {"1", "2", "3", "4"} and stats["eligible"] == [1, 2, 3, 4]
    assert (stats["objective"], stats["strategy"], stats["budget"]) == ("kl", "swaps", 60)
    assert stats["passes"] < stats["passes_without_trails"] and stats["tokens"] == 5 * 24


def test_single_removals_are_rises_over_the_dense_model(dense):
    found = run(dense, objective="loss", strategy="one_shot").stats
    judged = evaluator(dense.model, "loss", ids_ST=TOKENS.ids_ST)
    assert found["dense_value"] > 1, "a loss, not a distance"
    assert all(-found["dense_value"] < rise < found["dense_value"] for rise in found["single"].values())
    assert judged.values[frozenset()] == pytest.approx(found["dense_value"], rel=0.2)


@pytest.mark.parametrize("strategy", ["greedy", "evolution", "tpe"])
def test_same_seed_same_bits(dense, strategy):
    one, other = (run(dense, strategy=strategy) for _ in range(2))
    assert one.plan == other.plan
    assert {**one.stats, "seconds": 0} == {**other.stats, "seconds": 0}


def test_another_draw_is_other_text(dense):
    one, other = (run(dense, objective="loss", draw=draw).stats["dense_value"] for draw in (0, 1))
    assert one != other


@pytest.mark.parametrize("kind", ["affine", "residual"])
def test_sets_are_judged_with_stand_ins_that_the_pruned_model_has(dense, tmp_path, kind):
    extract(dense.model, TOKENS, tmp_path / "hidden.zarr")
    states = hidden.read(tmp_path / "hidden.zarr")
    found = compose(dense.folder, states, TOKENS, as_many(2), **OPTIONS, strategy="swaps", stand_in=kind)
    removed, plan = found.stats["removed"], found.plan
    assert plan.drop == [(layer, "whole") for layer in removed]
    assert [one.block for one in plan.modules] == [(layer, layer + 1) for layer in removed]
    assert found.stats["value"] < run(dense, strategy="swaps").stats["value"], "a map is nearer than nothing"
    assert [one["block"] for one in found.fits] == [one.block for one in plan.modules]
    fold(plan, dense.folder, tmp_path / "pruned")
    pruned = checkpoints.load_model(tmp_path / "pruned")
    ids_ST = drawn(TOKENS, 5, 0)
    with torch.no_grad():
        logp, logq = (one(ids_ST).logits[:, :-1].log_softmax(-1) for one in (dense.model, pruned))
    assert found.stats["value"] == pytest.approx((logp.exp() * (logp - logq)).sum(-1).mean().item(), abs=1e-4)


def test_stand_ins_are_counted_for_each_layer():
    facts = ModelFacts("llama", 6, 10, 100, 1000, [130] * 6, 0, "made", "")
    kinds = {kind: module_params(facts, {"compose": {"stand_in": kind}}) for kind in ("none", "affine", "residual")}
    # an affine map of 10 x 10 with its bias; with 96 gated neurons of 11 inputs and 10 outputs
    assert kinds == {"none": 0, "affine": 110, "residual": 110 + 96 * (2 * 11 + 10)}
    # a layer of 130 parameters gives 20 back, so that 26 % of 1,000 need 13 layers, and there are 5
    assert as_many_replaced(None, facts, ratio=0.26, k_max=3, module_params=0).layers == 2
    with pytest.raises(BlockError, match=r"ratio 0\.26 is too high"):
        as_many_replaced(None, facts, ratio=0.26, k_max=3, module_params=110)
    assert as_many_replaced(None, facts, ratio=0.08, k_max=3, module_params=110).layers == 4


def test_items_of_a_file_are_judged(dense, tmp_path):
    path = write(tmp_path / "items.jsonl", ENTRIES)
    found = run(dense, objective="margin", items=str(path), sequences=2).stats
    assert found["value"] >= -50 and found["tokens"] > 0
    assert found["dense_value"] != run(dense, objective="margin", sequences=5).stats["dense_value"]


@pytest.mark.parametrize("count, options, message", [
    (2, {"budget": 21}, "budget is 21 layer passes, and judging every single removal takes 22"),
    (5, {}, "5 of 6 layers must be removed, but compose.keep_first 1 and keep_last 1 allow only 4"),
    (1, {"keep_first": 4, "keep_last": 4}, "allow only 0"),
    (2, {"draw": 3}, "draw 3 of 5 sequences needs 20 calibration sequences, and there are 16"),
    (2, {"objective": "margin", "choices": 6}, "choices is 6, but the ends of only 5"),
    (2, {"objective": "margin", "items": "nowhere.jsonl"}, r"items nowhere\.jsonl cannot be read"),
    (2, {"objective": "bleu"}, "objective is 'bleu'; choose one of loss, kl, margin, accuracy, last_state"),
    (2, {"strategy": "grid"}, "strategy is 'grid'; choose one of random, one_shot"),
    (2, {"choices": 1}, "choices is 1; give a number at least 2"),
])
def test_options_that_cannot_be_are_named_before_the_model_is_read(dense, monkeypatch, count, options, message):
    monkeypatch.setattr("kdp_core.model.checkpoints.load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises((RankError, OptionError), match=message):
        run(dense, count, **options)


def test_the_planner_counts_the_budget():
    sizes = Sizes(sequences=100, length=128, width=64, layers=30, layer_macs=1e6, head_macs=10**7)
    small, large = (flops(sizes, {"sequences": 16, "budget": budget, "positions": None})
                    for budget in (1000, 2000))
    assert large == 2 * small and small == 2 * 16 * 128 * (1000 * 1e6 + 1000 / 15 * 1e7)
    thinned = flops(sizes, {"sequences": 16, "budget": 1000, "positions": 16})
    assert thinned == 2 * 16 * (128 * 1000 * 1e6 + 16 * 1000 / 15 * 1e7)
