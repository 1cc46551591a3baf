"""Paired statistics against binomial sums, closed forms and loops over items."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdp_core.results import paired
from kdp_core.score import standard_errors


@pytest.mark.parametrize("right_alone, wrong_alone", [(9, 2), (2, 9), (5, 5), (1, 0), (0, 0), (30, 12)])
def test_mcnemar_is_the_binomial_sum(right_alone, wrong_alone):
    both, neither, n = 7, 4, right_alone + wrong_alone
    mine = [1] * both + [0] * neither + [1] * right_alone + [0] * wrong_alone
    theirs = [1] * both + [0] * neither + [0] * right_alone + [1] * wrong_alone
    x = min(right_alone, wrong_alone)
    by_hand = (2 * sum(math.comb(n, i) for i in range(x)) + math.comb(n, x)) / 2 ** n
    found = paired.mcnemar(np.array([mine, theirs], dtype=float).T)
    assert found[0, 1] == found[1, 0] == pytest.approx(min(by_hand, 1))
    assert found[0, 0] == 1


def test_mcnemar_of_a_known_table():
    # 1 against 9: 2 * 1 / 1024 + 10 / 1024
    values = np.array([[1, 0]] * 9 + [[0, 1]], dtype=float)
    assert paired.mcnemar(values)[0, 1] == pytest.approx(12 / 1024)


def test_a_difference_has_the_error_of_the_items_differences():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, (50, 3)).astype(float)
    table = paired.accuracies({"quiz": values}, {"quiz": "acc"}, [], draws=50)["quiz"]
    for j, k in itertools.combinations(range(3), 2):
        d = values[:, j] - values[:, k]
        assert table.difference_JJ[j, k] == pytest.approx(d.mean())
        assert table.stderr_JJ[j, k] == pytest.approx(d.std(ddof=1) / math.sqrt(50))
    assert table.test == "mcnemar" and table.items == 50


def test_scores_between_0_and_1_are_bootstrapped():
    rng = np.random.default_rng(2)
    values = np.stack([rng.random(80), rng.random(80)], axis=1)
    table = paired.accuracies({"f1": values}, {"f1": "em"}, [(0, 1)])["f1"]
    exact = stats.ttest_rel(values[:, 0], values[:, 1]).pvalue
    assert table.test == "bootstrap" and table.p_JJ[0, 1] == pytest.approx(exact, abs=0.03)


def test_bootstrap_has_the_closed_forms_spread_and_the_same_draws_again():
    values = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.7, 0.2])
    drawn = paired.resampled_means(values, 20_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.002)
    assert drawn.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.03)
    assert np.array_equal(drawn, paired.resampled_means(values, 20_000, np.random.default_rng(0)))


def test_bootstrap_in_pieces_draws_as_many(monkeypatch):
    values = np.random.default_rng(4).random(9)
    monkeypatch.setattr(paired, "CELLS", 30)
    assert paired.resampled_means(values, 101, np.random.default_rng(0)).shape == (101,)


def test_the_mean_over_tasks_weighs_tasks_alike_and_is_stratified():
    rng = np.random.default_rng(5)
    values = {"small": rng.integers(0, 2, (40, 2)).astype(float), "large": rng.integers(0, 2, (400, 2)).astype(float)}
    table = paired.accuracies(values, {"small": "acc", "large": "acc_norm"}, [(0, 1)], draws=20_000)["all"]
    d = {task: v[:, 0] - v[:, 1] for task, v in values.items()}
    difference = (d["small"].mean() + d["large"].mean()) / 2
    stderr = math.sqrt(d["small"].var(ddof=1) / 40 + d["large"].var(ddof=1) / 400) / 2
    assert table.difference_JJ[0, 1] == pytest.approx(difference) and table.items == 440
    assert table.stderr_JJ[0, 1] == pytest.approx(stderr)
    assert table.p_JJ[0, 1] == pytest.approx(2 * stats.norm.sf(abs(difference) / stderr), abs=0.03)
    other = paired.accuracies(values, {"small": "acc", "large": "acc_norm"}, [(0, 1)], draws=20_000, seed=1)["all"]
    assert other.p_JJ[0, 1] != table.p_JJ[0, 1]


def test_perplexities_are_paired_and_agree_with_evaluate_and_scipy():
    rng = np.random.default_rng(6)
    tokens = np.full(30, 127.0)
    hard = rng.normal(400, 80, 30)
    ll = -np.stack([hard, hard + 10 + rng.normal(0, 5, 30), np.zeros(30)], axis=1)
    table = paired.perplexities({"text": ll}, {"text": tokens}, {"text": "ppl"})["text"]
    exact = stats.ttest_rel(ll[:, 0], ll[:, 1])
    assert table.difference_JJ[1, 0] == pytest.approx((ll[:, 0] - ll[:, 1]).mean() / 127)
    assert table.p_JJ[0, 1] == pytest.approx(exact.pvalue)
    # against a model of probability 1 only one model's error is left: that of its own score
    own = standard_errors.nats([(value, 127) for value in ll[:, 0].tolist()])
    assert table.stderr_JJ[0, 2] == pytest.approx(own)
    assert table.stderr_JJ[0, 1] < own / 5


def test_the_error_of_a_ratio_counts_the_lengths():
    rng = np.random.default_rng(7)
    tokens = rng.integers(20, 400, 25).astype(float)
    ll = -np.stack([3.1 * tokens, 3.0 * tokens], axis=1) + rng.normal(0, 20, (25, 2))
    table = paired.perplexities({"text": ll}, {"text": tokens}, {"text": "ppl"})["text"]
    d = ll[:, 1] - ll[:, 0]
    # -(ll_0 - ll_1) has the log-likelihood -d
    assert table.stderr_JJ[0, 1] == pytest.approx(standard_errors.nats(list(zip((-d).tolist(), tokens, strict=True))))


def test_several_texts_have_welchs_degrees_of_freedom():
    rng = np.random.default_rng(8)
    ll = {name: rng.normal(-300, 30, (size, 2)) for name, size in (("a", 12), ("b", 40))}
    tokens = {name: np.full(len(values), 100.0) for name, values in ll.items()}
    table = paired.perplexities(ll, tokens, dict.fromkeys(ll, "ppl"))["all"]
    d = {name: (values[:, 1] - values[:, 0]) / 100 for name, values in ll.items()}
    # the mean of the two is half their sum: Welch's test of a's mean against that of -b
    welch = stats.ttest_ind(d["a"], -d["b"], equal_var=False)
    assert table.difference_JJ[0, 1] == pytest.approx((d["a"].mean() + d["b"].mean()) / 2)
    assert table.p_JJ[0, 1] == pytest.approx(welch.pvalue)


@pytest.mark.parametrize("given, corrected", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01; then 2 x 0.03, which holds for 0.04 too
    ([0.5, 0.9, 0.001], [1.0, 1.0, 0.003]),
    ([math.nan, 0.02], [math.nan, 0.02]),
    ([], []),
])
def test_holm_by_hand(given, corrected):
    assert paired.holm(given) == pytest.approx(corrected, nan_ok=True)
