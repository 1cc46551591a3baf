"""Searches drawn: shares of draws, agreement of pairs, claims, and the best value against layer passes."""
import pytest

from kdp_core.base.measurements import Agreement
from kdp_core.figures import agreement
from kdp_core.figures.style import COLORS, FigureError
from kdp_core.study import objectives
from tests.kdp_core.study.test_agreement import search


def compared():
    """Two searches on two draws."""
    searches = [search([1, 2]), search([1, 3], draw=1), search([2, 3], strategy="greedy"),
                search([2, 3], draw=1, strategy="greedy")]
    rows = [{"variant": f"v{place}", **one, "heldout_nats": 3 + 0.1 * place, "heldout_ppl_ratio": 1.5 + place / 10,
             "heldout_accuracy": 0.5 - place / 100} for place, one in enumerate(searches)]
    return Agreement(rows, objectives.pairs(rows).to_dict("records"), objectives.claims(rows).to_dict("records"),
                     {"layers": 6, "dense_accuracy": 0.7})


def test_a_layer_is_as_dark_as_the_share_of_draws_that_remove_it():
    drawn = agreement.chosen_layers(compared())
    layers, ratio, accuracy = drawn.figure.axes[:3]
    assert [label.get_text() for label in layers.get_yticklabels()] == ["kl, one shot", "kl, greedy"]
    assert layers.images[0].get_array().tolist() == [[0, 1, 0.5, 0.5, 0, 0], [0, 0, 1, 1, 0, 0]]
    circles = [line.get_xdata().tolist() for line in ratio.get_lines() if line.get_marker() == "o"]
    assert circles == [pytest.approx([1.5, 1.6]), pytest.approx([1.7, 1.8])]
    assert accuracy.get_lines()[-1].get_xdata()[0] == 70, "the dense model's accuracy"
    assert drawn.data["removed"].tolist() == ["1 2", "1 3", "2 3", "2 3"]


def test_pairs_and_claims_are_those_of_the_record():
    record = compared()
    drawn = agreement.agreement_of_searches(record)
    jaccard, _, claims = drawn.figure.axes
    assert [label.get_text() for label in jaccard.get_yticklabels()] == ["two searches", "two draws of text"]
    means = [line.get_xdata()[0] for line in jaccard.get_lines() if line.get_marker() == "|"]
    assert means == pytest.approx([1 / 3, (1 / 3 + 1) / 2])
    told = [line for line in claims.get_lines() if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in told] == pytest.approx(
        [one["mean"] for one in record.claims if one["mean"] == one["mean"]])
    assert set(line.get_color() for line in told) <= {COLORS[1], COLORS[2], "#666666"}


def test_the_best_value_is_the_mean_over_draws_from_where_all_have_one():
    record = compared()
    record.rows[1]["best_so_far"] = [{"passes": 12, "value": 0.9}, {"passes": 20, "value": 0.3}]
    record.rows[1]["passes"] = 20
    curve = agreement.best_so_far(record).data.query("strategy == 'one_shot'")
    assert list(zip(curve["passes"], curve["value"], strict=True)) == [(12, pytest.approx(0.7)),
                                                                      (20, pytest.approx(0.4))]


def test_searches_that_differ_in_everything_give_no_pairs():
    with pytest.raises(FigureError, match="no two searches differ in exactly one setting"):
        agreement.agreement_of_searches(compared()._replace(pairs=[]))
