"""Searches compared: held-out loss and accuracy beside whole models without the layers, whatever the order of sets."""
import pytest
import torch

from kdp_core.methods._search.objectives import items_of_text
from kdp_core.model.passes import Passes
from kdp_core.study import agreement
from kdp_core.study.agreement import AgreementError
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.methods.searching.whole import LAYERS, logits

IDS_ST = stored.tokens().ids_ST
SETS = [frozenset(one) for one in ([2, 3], [1, 4], [2, 3], [1, 2])]


@pytest.fixture(scope="module")
def model():
    return pico.lively(pico.model("llama", layers=LAYERS))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("dense") / "model"
    model.save_pretrained(made)
    return made


def search(removed, draw=0, **more):
    return {"objective": "kl", "strategy": "one_shot", "draw": draw, "removed": sorted(removed), "value": 0.5,
            "single": {"1": 0.1, "2": 0.2, "3": 0.3}, "dense_value": 0.0, "passes": 10, "passes_without_trails": 20,
            "evaluations": 4, "budget": 30, "tokens": 96, "seconds": 1.0,
            "best_so_far": [{"passes": 10, "evaluations": 4, "value": 0.5, "removed": sorted(removed)}]} | more


def test_held_out_figures_are_those_of_whole_models(model, monkeypatch):
    monkeypatch.setattr(agreement, "AT_ONCE", 8)
    found = agreement.heldout(Passes(model, IDS_ST.shape[1]), SETS, IDS_ST, 2)
    assert set(found) == {frozenset(), *SETS}
    for removed, (nats, accuracy) in found.items():
        logq = logits(model, removed, IDS_ST)[:, :-1].log_softmax(-1)
        assert nats == pytest.approx(-logq.gather(-1, IDS_ST[:, 1:, None]).mean().item(), abs=1e-4)
        right = 0
        for ids_CT in IDS_ST.split(8):
            items = items_of_text(ids_CT, agreement.CHOICES)
            logq = logits(model, removed, items.ids_RT)[:, :-1].log_softmax(-1)
            ends = items.choice_RT[:, 1:] * logq.gather(-1, items.ids_RT[:, 1:, None])[..., 0]
            score_RC = ends.sum(dim=1).view(len(ids_CT), agreement.CHOICES)
            right += (score_RC.argmax(dim=1) == items.right_R.view_as(score_RC).long().argmax(dim=1)).sum().item()
        assert accuracy == right / len(IDS_ST)


def test_a_record_holds_searches_pairs_and_claims(folder):
    searches = {"a": search(SETS[0]), "b": search(SETS[1], draw=1),
                "c": search(SETS[0], objective="loss", single={"1": 0.3, "2": 0.2, "3": 0.1})}
    found = agreement.measure(folder, searches, IDS_ST, windows=8)
    by = {row["variant"]: row for row in found.rows}
    assert by["a"]["heldout_nats"] == by["c"]["heldout_nats"] != by["b"]["heldout_nats"]
    dense = torch.tensor(found.stats["dense_nats"])
    assert by["b"]["heldout_ppl_ratio"] == pytest.approx((by["b"]["heldout_nats"] - dense).exp().item())
    pairs = {one["varies"]: (one["jaccard"], one["spearman"]) for one in found.pairs}
    assert pairs == {"draw": (0.0, pytest.approx(1)), "objective": (1.0, pytest.approx(-1))}
    assert {one["told"] for one in found.claims} == {"cannot be told here"} and len(found.claims) == 4
    assert (found.stats["windows"], found.stats["layers"]) == (8, LAYERS)


@pytest.mark.parametrize("searches, windows, message", [
    ({"a": search([1])}, 8, "one search agrees with none; name at least two variants"),
    ({"a": search([1]), "b": search([2])}, 17, r"windows is 17, but the held-out text has 16 windows of 24 tokens"),
])
def test_what_cannot_be_compared_is_named(folder, searches, windows, message):
    with pytest.raises(AgreementError, match=message):
        agreement.measure(folder, searches, IDS_ST, windows=windows)
