"""The evaluator: values of full passes, costs counted on the layers that really ran, and the budget."""
import itertools

import pytest
import torch
from torch.nn.functional import kl_div

from kdp_core.methods._judge import RankError
from kdp_core.methods._search.evaluator import Spent
from kdp_core.model import families
from tests import pico
from tests.kdp_core.methods.searching.whole import IDS_ST, LAYERS, evaluator, logits

SETS = [frozenset(removed) for removed in ([3], [1, 3], [3, 4], [2, 3], [1, 4], [3, 5], [2, 4, 5], [0])]


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3_text"])
def model(request):
    return pico.lively(pico.model(request.param, layers=LAYERS))


def whole_kl(model, removed):
    """KL(dense || pruned) from the logits of whole models, without the last position."""
    logp, logq = (logits(model, gone, IDS_ST)[:, :-1].flatten(0, 1).log_softmax(-1) for gone in ([], removed))
    return (kl_div(logq, logp, log_target=True, reduction="sum") / len(logp)).item()


def test_values_are_those_of_whole_models(model):
    judged = evaluator(model)
    for removed in SETS:
        assert judged.value(removed) == pytest.approx(whole_kl(model, removed), rel=1e-4, abs=1e-6)


def test_values_do_not_depend_on_what_was_judged_before(model):
    """To the bit: whatever states are kept, the same layers run on the same states."""
    alone = {removed: evaluator(model).value(removed) for removed in SETS}
    for order in (SETS, SETS[::-1]):
        for trails in (1, 3):
            judged = evaluator(model, trails=trails)
            assert {removed: judged.value(removed) for removed in order} == alone


def test_the_cost_is_the_number_of_layers_that_ran(model, monkeypatch):
    judged, ran = evaluator(model), []
    batches = len(IDS_ST.split(2))
    for layer in families.decoder_layers(model):
        monkeypatch.setattr(layer, "forward", lambda *args, own=layer.forward, **kwargs: (ran.append(1),
                                                                                        own(*args, **kwargs))[1])
    for removed in SETS:
        before, foreseen = judged.spent, judged.cost(removed)
        ran.clear()
        judged.value(removed)
        assert len(ran) / batches == judged.spent - before == foreseen


def test_only_layers_after_the_first_change_are_run():
    judged = evaluator(pico.model("llama", layers=LAYERS))
    assert judged.spent == LAYERS, "the dense model"
    assert judged.cost(frozenset([3])) == 2, "layers 4 and 5"
    judged.value(frozenset([3]))
    assert judged.cost(frozenset([3])) == 0
    assert judged.cost(frozenset([3, 5])) == 0, "the states up to layer 5 are kept, and no layer follows it"
    assert judged.cost(frozenset([1, 3])) == 3, "layers 2, 4 and 5"
    assert judged.cost(frozenset([3, 4])) == 1, "layer 5, from the states without layer 3"


def test_the_states_of_the_last_used_sets_are_kept():
    judged = evaluator(pico.model("llama", layers=LAYERS), trails=1)
    judged.value(frozenset([1]))
    assert judged.cost(frozenset([1, 4])) == 1
    judged.value(frozenset([2]))
    assert judged.cost(frozenset([1, 4])) == 3, "layers 2, 3 and 5, since the states without layer 1 are gone"
    for _ in range(9):
        judged.value(frozenset([2]))
    assert judged.cost(frozenset([4])) == 1, "the dense model's states always stay"


def test_full_passes_are_counted_beside_it():
    judged = evaluator(pico.model("llama", layers=LAYERS))
    for removed in SETS:
        judged.value(removed)
    assert judged.without_trails == LAYERS + sum(LAYERS - len(removed) for removed in SETS)
    assert judged.spent < judged.without_trails


def test_no_evaluation_begins_that_would_exceed_the_budget():
    judged = evaluator(pico.model("llama", layers=LAYERS), budget=LAYERS + 2)
    with pytest.raises(Spent):
        judged.value(frozenset([2]))
    with pytest.raises(Spent):
        judged.value(frozenset([3]), reserve=1)
    assert judged.spent == LAYERS and frozenset([2]) not in judged.values
    judged.value(frozenset([3]))
    assert judged.spent == LAYERS + 2
    judged.value(frozenset([3])), judged.value(frozenset())
    assert judged.spent == LAYERS + 2, "known values are free"


def test_the_best_set_and_its_curve():
    judged = evaluator(pico.lively(pico.model("llama", layers=LAYERS)))
    pairs = [frozenset(pair) for pair in itertools.combinations(range(1, 5), 2)]
    judged.value(frozenset([1]))
    assert judged.best is None and judged.curve == [], "one layer is not the wanted size"
    for pair in pairs:
        judged.value(pair)
    assert judged.best == min(pairs, key=judged.values.get)
    values = [row["value"] for row in judged.curve]
    assert values == sorted(values, reverse=True) and judged.curve[-1]["removed"] == sorted(judged.best)
    assert judged.curve[-1]["value"] == judged.values[judged.best]


def test_of_equal_values_the_smallest_set_is_best():
    model = pico.model("llama", layers=LAYERS)
    with torch.no_grad():
        for layer in families.decoder_layers(model):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    judged = evaluator(model)
    for pair in ([3, 4], [1, 4], [2, 3]):
        judged.value(frozenset(pair))
    assert judged.best == frozenset([1, 4])


def test_stand_ins_take_the_place_of_removed_layers():
    model = pico.lively(pico.model("llama", layers=LAYERS))

    class Half(torch.nn.Module):
        def forward(self, h):
            return h / 2

    judged = evaluator(model, stand_ins={3: Half()})
    passes = judged.passes
    h_BTD = model.model.embed_tokens(IDS_ST)
    last_BTD = passes.run(h_BTD, [0, 1, 2, Half(), 4, 5])
    logp, logq = (passes.head(passes.to_head(h))[:, :-1].flatten(0, 1).log_softmax(-1).detach()
                  for h in (passes.run(h_BTD, range(LAYERS)), last_BTD))
    expected = (kl_div(logq, logp, log_target=True, reduction="sum") / len(logp)).item()
    assert judged.value(frozenset([3])) == pytest.approx(expected, rel=1e-4)
    assert judged.value(frozenset([4])) == evaluator(model).value(frozenset([4])), "this one has none"


def test_a_value_that_is_no_number_is_refused():
    model = pico.model("llama", layers=LAYERS)
    judged = evaluator(model)
    with torch.no_grad():
        next(families.decoder_layers(model)[4].parameters()).fill_(float("nan"))
    with pytest.raises(RankError, match=r"without layers \[2\] the kl is nan; try dtype float32"):
        judged.value(frozenset([2]))
