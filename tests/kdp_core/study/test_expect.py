"""The predictor of generation loss: its ends, its honesty about left-out methods, and what it says."""
import numpy as np
import pandas as pd
import pytest
import torch

from kdp_core.base import store
from kdp_core.base.measurements import SingleStep
from kdp_core.study import expect, single_step
from kdp_core.study.expect import FEATURES, LOSSES, ExpectError
from tests import pico

METHODS = ("a", "b", "c", "d", "e")


def frame(methods=METHODS, ratios=(0.1, 0.2, 0.3), seed=0):
    """Rows whose loss grows with the statistics, as 1 - exp(-2 sqrt(kl))."""
    draw, rows = np.random.default_rng(seed), []
    for method in methods:
        for ratio in ratios:
            damage = ratio * draw.uniform(0.5, 4)
            values = {name: damage ** (1 / power) * draw.uniform(0.95, 1.05) for name, power in FEATURES.items()}
            loss = float(1 - np.exp(-2 * damage))
            rows.append({"model": "pico", "method": method, "ratio": ratio, **values,
                         **{f"loss_{name}": loss for name in LOSSES}})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def predictor():
    return expect.fit(frame(), {"command": "python benchmarks/generation.py"})


def step(**values):
    return SingleStep(4, 11, {**dict.fromkeys(FEATURES, 0.0), **values}, {})


def test_a_model_that_equals_the_dense_one_is_expected_to_lose_nothing(predictor):
    same = pico.model("llama")
    ids_ST = torch.randint(8, 384, (3, 12), generator=torch.Generator().manual_seed(0))
    found = expect.expectation(single_step.compare(same, same, ids_ST), predictor)
    assert found.losses == pytest.approx(dict.fromkeys(LOSSES, 0.0), abs=1e-6)
    assert found.sentence.startswith("Expect this model to keep 100 % of the dense model's generation quality")


def test_a_scrambled_model_is_expected_to_lose_much(predictor):
    ids_ST = torch.randint(8, 384, (3, 12), generator=torch.Generator().manual_seed(0))
    measured = single_step.compare(pico.model("llama"), pico.model("llama", seed=1), ids_ST)
    assert expect.expectation(measured, predictor).losses["quality"] > 0.7


def test_more_damage_is_never_predicted_less_loss(predictor):
    assert all(weight >= 0 for weights in predictor.coefficients.values() for weight in weights)
    for name in FEATURES:
        low, high = (expect.expectation(step(**{name: value}), predictor).losses["quality"] for value in (0.1, 0.4))
        assert low <= high


def test_left_out_methods_are_ordered_where_the_statistics_tell_the_loss(predictor):
    found = predictor.validation["quality"]
    assert found["spearman"] > 0.9 and found["low"] <= found["spearman"] <= found["high"]
    assert (found["rows"], found["groups"]) == (15, 5) and found["error"] < 0.1


def test_the_left_out_method_is_never_trained_on():
    """A planted statistic that tells the loss of one method alone is of no use for that method."""
    table = frame()
    own = table["method"] == "c"
    for name in FEATURES:
        table[name] = np.where(own, 0.0, table[name])
    # entropy_change is 0 everywhere but in c, where it tells the whole loss
    table["entropy_change"] = np.where(own, 1.0, 0.0)
    table.loc[own, "kl"] = [1e-9, 2e-9, 3e-9]
    table.loc[own, "loss_quality"] = 0.9
    scaled_RF = expect.lengths(table) / np.sqrt((expect.lengths(table) ** 2).mean(axis=0)).clip(min=1e-12)
    weights_F, _ = expect.weights(scaled_RF, table["loss_quality"].to_numpy(), expect.groups(table))
    assert weights_F[list(FEATURES).index("entropy_change")] > 0.5
    assert expect.left_out(table, "quality")[own] == pytest.approx(0.0, abs=1e-3)


def test_what_is_predicted_for_a_method_does_not_depend_on_its_own_loss():
    table, own = frame(), frame()["method"] == "b"
    before = expect.left_out(table, "quality")
    table.loc[own, "loss_quality"] = 0.0
    after = expect.left_out(table, "quality")
    assert np.array_equal(before[own], after[own]) and not np.array_equal(before[~own], after[~own])


def test_methods_that_made_the_same_model_are_left_out_together():
    table = frame()
    table.loc[table.index[table["method"] == "d"][0], "kl"] = table["kl"][table["method"] == "a"].iloc[0]
    assert expect.groups(table).tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["a"] * 3 + ["e"] * 3


def test_rank_correlation_and_its_interval():
    values, groups = np.arange(6.0), np.array(list("aabbcc"))
    assert expect.rank_correlation(values, values ** 3) == 1 and expect.rank_correlation(values, -values) == -1
    assert expect.rank_correlation(values, np.ones(6)) is None
    assert expect.validated(frame(), "quality", np.ones(len(frame())))["spearman"] == 0, "a constant orders nothing"
    low, high = expect.interval(values, values, groups)
    assert low == pytest.approx(1) and high == pytest.approx(1)
    noisy = np.array([0.0, 2, 1, 5, 3, 4])
    assert expect.interval(values, noisy, groups) == expect.interval(values, noisy, groups)


def test_a_chain_of_tokens_agrees_as_the_sum_says():
    # agreement a = 0.5 over 2 steps: (0.5 + 0.25) / 2
    assert expect.chain(np.array([0.5, 0.0, 1.0]), 2) == pytest.approx([1 - 0.375, 0, 1])


def test_the_sentence_names_the_nearest_row_and_what_exceeds_the_fit(predictor):
    row = frame().iloc[4]
    found = expect.expectation(step(**{name: float(row[name]) for name in FEATURES}), predictor)
    assert found.nearest["method"] == "b" and found.nearest["distance"] == pytest.approx(0, abs=1e-9)
    assert "the nearest measured model (b on pico, ratio 0.2)" in found.sentence and not found.beyond
    assert found.low["quality"] <= found.losses["quality"] <= found.high["quality"]
    far = expect.expectation(step(**dict.fromkeys(FEATURES, 1e3)), predictor)
    assert far.beyond and "exceed all that were measured" in far.sentence


def test_what_cannot_be_predicted_is_refused(predictor):
    with pytest.raises(ExpectError, match="2 groups of methods; measure at least three"):
        expect.fit(frame(("a", "b")), {})
    with pytest.raises(ExpectError, match="statistic kl is missing"):
        expect.expectation(SingleStep(1, 1, {}, {}), predictor)
    with pytest.raises(ExpectError, match="no number"):
        expect.expectation(step(kl=float("nan")), predictor)


def test_a_predictor_comes_back_from_disk(predictor, tmp_path):
    store.write(tmp_path / "expect.json", predictor)
    again = store.read(tmp_path / "expect.json")
    assert expect.expectation(step(kl=0.3), again) == expect.expectation(step(kl=0.3), predictor)
