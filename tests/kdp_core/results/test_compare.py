"""Paired statistics against binomial sums, closed forms and loops over items; spread over seeds by hand."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdp_core.base.records import Score, Scores
from kdp_core.results import compare, tables
from kdp_core.results.compare import Entry, Outcomes
from kdp_core.score import evaluate
from tests.kdp_core import points


def outcomes(values, task="quiz", kind="acc", weights=None):
    values = np.asarray(values, dtype=float)
    return Outcomes(task, {"acc": "acc", "ppl": "ppl"}[kind], kind, [f"{task}:{i}:h{i}" for i in range(len(values))],
                    values, np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float))


def entry(method, *answers, ratio=0.2, k_max=3, calib="news", zeros=False):
    return Entry(("tiny", "" if method == "dense" else calib, method, ratio, k_max), zeros, list(answers))


def pair(frame, method, other, task="all", against=None):
    found = frame[(frame["method"] == method) & (frame["other"] == other) & (frame["task"] == task)]
    return (found if against is None else found[found["against"] == against]).iloc[0]


# One task -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("right_alone, wrong_alone", [(9, 2), (2, 9), (5, 5), (1, 0), (0, 0), (30, 12)])
def test_mcnemar_is_the_binomial_sum(right_alone, wrong_alone):
    both, neither, n = 7, 4, right_alone + wrong_alone
    mine = [1] * both + [0] * neither + [1] * right_alone + [0] * wrong_alone
    theirs = [1] * both + [0] * neither + [0] * right_alone + [1] * wrong_alone
    x = min(right_alone, wrong_alone)
    by_hand = (2 * sum(math.comb(n, i) for i in range(x)) + math.comb(n, x)) / 2 ** n
    found = compare.mcnemar(np.array([mine, theirs], dtype=float).T)
    assert found[0, 1] == found[1, 0] == pytest.approx(min(by_hand, 1))
    assert found[0, 0] == 1


def test_mcnemar_of_a_known_table():
    # 1 against 9: 2 * 1 / 1024 + 10 / 1024
    values = np.array([[1, 0]] * 9 + [[0, 1]], dtype=float)
    assert compare.mcnemar(values)[0, 1] == pytest.approx(12 / 1024)


def test_a_difference_has_the_error_of_the_items_differences():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, (50, 3)).astype(float)
    table = compare.accuracies({"quiz": values}, {"quiz": "acc"}, [], draws=50)["quiz"]
    for j, k in itertools.combinations(range(3), 2):
        d = values[:, j] - values[:, k]
        assert table.difference_JJ[j, k] == pytest.approx(d.mean())
        assert table.stderr_JJ[j, k] == pytest.approx(d.std(ddof=1) / math.sqrt(50))
    assert table.test == "mcnemar" and table.items == 50


def test_scores_between_0_and_1_are_bootstrapped():
    rng = np.random.default_rng(2)
    values = np.stack([rng.random(80), rng.random(80)], axis=1)
    table = compare.accuracies({"f1": values}, {"f1": "em"}, [(0, 1)])["f1"]
    exact = stats.ttest_rel(values[:, 0], values[:, 1]).pvalue
    assert table.test == "bootstrap" and table.p_JJ[0, 1] == pytest.approx(exact, abs=0.03)


# Several tasks --------------------------------------------------------------------------------------------------------

def test_bootstrap_has_the_closed_forms_spread_and_the_same_draws_again():
    values = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.7, 0.2])
    drawn = compare.resampled_means(values, 20_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.002)
    assert drawn.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.03)
    assert np.array_equal(drawn, compare.resampled_means(values, 20_000, np.random.default_rng(0)))


def test_bootstrap_in_pieces_draws_as_many(monkeypatch):
    values = np.random.default_rng(4).random(9)
    monkeypatch.setattr(compare, "CELLS", 30)
    assert compare.resampled_means(values, 101, np.random.default_rng(0)).shape == (101,)


def test_a_pairs_p_does_not_depend_on_who_else_is_there():
    rng = np.random.default_rng(10)
    entries = [entry(name, *(outcomes(rng.integers(0, 2, 30), task) for task in ("one", "two")))
               for name in ("kdp", "remove", "linear")]
    p_values = [frame[(frame["task"] == "all") & ~frame[["method", "other"]].eq("remove").any(axis=1)]["p"].tolist()
                for frame in (compare.compare(entries), compare.compare(entries[::2]))]
    assert p_values[0] == p_values[1] and len(p_values[0]) == 1


def test_the_mean_over_tasks_weighs_tasks_alike_and_is_stratified():
    rng = np.random.default_rng(5)
    values = {"small": rng.integers(0, 2, (40, 2)).astype(float), "large": rng.integers(0, 2, (400, 2)).astype(float)}
    table = compare.accuracies(values, {"small": "acc", "large": "acc_norm"}, [(0, 1)], draws=20_000)["all"]
    d = {task: v[:, 0] - v[:, 1] for task, v in values.items()}
    difference = (d["small"].mean() + d["large"].mean()) / 2
    stderr = math.sqrt(d["small"].var(ddof=1) / 40 + d["large"].var(ddof=1) / 400) / 2
    assert table.difference_JJ[0, 1] == pytest.approx(difference) and table.items == 440
    assert table.stderr_JJ[0, 1] == pytest.approx(stderr)
    assert table.p_JJ[0, 1] == pytest.approx(2 * stats.norm.sf(abs(difference) / stderr), abs=0.03)
    other = compare.accuracies(values, {"small": "acc", "large": "acc_norm"}, [(0, 1)], draws=20_000, seed=1)["all"]
    assert other.p_JJ[0, 1] != table.p_JJ[0, 1]


# Perplexity -----------------------------------------------------------------------------------------------------------

def test_perplexities_are_paired_and_agree_with_evaluate_and_scipy():
    rng = np.random.default_rng(6)
    tokens = np.full(30, 127.0)
    hard = rng.normal(400, 80, 30)
    ll = -np.stack([hard, hard + 10 + rng.normal(0, 5, 30), np.zeros(30)], axis=1)
    table = compare.perplexities({"text": ll}, {"text": tokens}, {"text": "ppl"})["text"]
    exact = stats.ttest_rel(ll[:, 0], ll[:, 1])
    assert table.difference_JJ[1, 0] == pytest.approx((ll[:, 0] - ll[:, 1]).mean() / 127)
    assert table.p_JJ[0, 1] == pytest.approx(exact.pvalue)
    # against a model of probability 1 only one model's error is left: that of its own score
    own = evaluate.nats_stderr([(value, 127) for value in ll[:, 0].tolist()])
    assert table.stderr_JJ[0, 2] == pytest.approx(own)
    assert table.stderr_JJ[0, 1] < own / 5


def test_the_error_of_a_ratio_counts_the_lengths():
    rng = np.random.default_rng(7)
    tokens = rng.integers(20, 400, 25).astype(float)
    ll = -np.stack([3.1 * tokens, 3.0 * tokens], axis=1) + rng.normal(0, 20, (25, 2))
    table = compare.perplexities({"text": ll}, {"text": tokens}, {"text": "ppl"})["text"]
    d = ll[:, 1] - ll[:, 0]
    # -(ll_0 - ll_1) has the log-likelihood -d
    assert table.stderr_JJ[0, 1] == pytest.approx(evaluate.nats_stderr(list(zip((-d).tolist(), tokens, strict=True))))


def test_several_texts_have_welchs_degrees_of_freedom():
    rng = np.random.default_rng(8)
    ll = {name: rng.normal(-300, 30, (size, 2)) for name, size in (("a", 12), ("b", 40))}
    tokens = {name: np.full(len(values), 100.0) for name, values in ll.items()}
    table = compare.perplexities(ll, tokens, dict.fromkeys(ll, "ppl"))["all"]
    d = {name: (values[:, 1] - values[:, 0]) / 100 for name, values in ll.items()}
    # the mean of the two is half their sum: Welch's test of a's mean against that of -b
    welch = stats.ttest_ind(d["a"], -d["b"], equal_var=False)
    assert table.difference_JJ[0, 1] == pytest.approx((d["a"].mean() + d["b"].mean()) / 2)
    assert table.p_JJ[0, 1] == pytest.approx(welch.pvalue)


def test_a_collapsed_model_is_behind_all_others_and_equal_ones_are_level():
    text = [-300.0, -310.0, -290.0]
    frame = compare.compare([entry(name, outcomes(values, "text", "ppl", [100] * 3)) for name, values in
                             (("kdp", text), ("twin", text), ("lost", [-300.0, math.nan, -290.0]))])
    assert pair(frame, "lost", "kdp")["difference"] == math.inf and pair(frame, "lost", "kdp")["p"] == 0
    assert pair(frame, "twin", "kdp")["difference"] == 0 and pair(frame, "twin", "kdp")["p"] == 1


# Groups ---------------------------------------------------------------------------------------------------------------

def quiz(*, right, of=40):
    return outcomes([1] * right + [0] * (of - right))


def test_every_question_has_its_own_correction():
    frame = compare.compare([entry("dense", quiz(right=38), ratio=0.0, k_max=0), entry("kdp", quiz(right=30)),
                             entry("linear", quiz(right=24)), entry("remove", quiz(right=22)),
                             entry("kdp", quiz(right=10), ratio=0.4)])
    task = frame[frame["task"] == "quiz"]
    # one of two nested sets of right answers: all that differ count for one side, p = 1 / 2^n
    against = {name: part.set_index("method") for name, part in task[task["ratio"] == 0.2].groupby("against")}
    best = against["best"]
    assert best["other"].tolist() == ["kdp", "kdp"] and best.loc["remove", "difference"] == pytest.approx(-8 / 40)
    assert best["p"].tolist() == pytest.approx([2 ** -6, 2 ** -8])
    assert best["p_holm"].tolist() == pytest.approx([2 ** -6, 2 * 2 ** -8])
    assert against["baseline"]["p"].to_dict() == pytest.approx({"kdp": 2 ** -8, "linear": 2 ** -2})
    assert against["dense"]["p"].to_dict() == pytest.approx({"kdp": 2 ** -8, "linear": 2 ** -14, "remove": 2 ** -16})
    # linear and remove are compared as baseline already; the point at 40 % is alone
    assert set(against) == {"best", "baseline", "dense"}
    assert task[task["ratio"] == 0.4]["against"].tolist() == ["dense"]
    assert list(frame.columns) == list(compare.COLUMNS)


def test_models_of_zeros_and_other_calibrations_find_their_own_opponents():
    frame = compare.compare([entry("kdp", quiz(right=30)), entry("remove", quiz(right=20)),
                             entry("kdp", quiz(right=28), calib="more"), entry("wanda", quiz(right=36), zeros=True),
                             entry("magnitude", quiz(right=35), zeros=True)])
    assert pair(frame, "magnitude", "wanda", "quiz")["against"] == "best"
    assert set(frame[frame["method"] == "kdp"]["other"]) == {"remove", "kdp"}
    assert len(frame[(frame["against"] == "baseline") & (frame["task"] == "quiz")]) == 1
    alone = frame[(frame["against"] == "") & (frame["task"] == "quiz")]
    assert alone["p_holm"].isna().all() and alone["calib"].tolist() == ["news"] and len(alone) == 1


@pytest.mark.parametrize("other, words", [
    (outcomes([1, 0, 1])._replace(ids=["quiz:0:h0", "quiz:1:changed", "quiz:2:h2"]), "(item 1 differ)"),
    (outcomes([1, 0]), "(3 and 2 items, or their lengths differ)"),
    (outcomes([1, 0, 1], weights=[1, 1, 2]), "3 and 3 items"),
    (outcomes([1, 0, 1], "riddle"), "one alone was scored on quiz"),
])
def test_other_items_are_refused(other, words):
    with pytest.raises(compare.CompareError) as refused:
        compare.compare([entry("kdp", outcomes([1, 1, 0])), entry("remove", other)])
    assert words in str(refused.value) and "tiny/news/kdp/0.2/3 and tiny/news/remove/0.2/3" in str(refused.value)


# From disk ------------------------------------------------------------------------------------------------------------

def sample(place, hash_of="row", name="none", **metrics):
    return {"doc_id": place, "target": "", "filtered_resps": [], "filter": name, "metrics": list(metrics), **metrics,
            "doc_hash": f"{hash_of}{place}", "prompt_hash": ""}


def score(task, metric, items, unit="share"):
    return Score(task, metric, 0.5, 0.1, items, True, unit)


def write_samples(folder, samples):
    """As an evaluation writes them."""
    for task, rows in samples.items():
        (folder / f"{task}.jsonl").write_text("".join(evaluate._sample_lines(rows)), encoding="utf-8")


def test_samples_of_tasks_groups_filters_and_windows(tmp_path):
    write_samples(tmp_path, {
        "cloze": [sample(i, acc=0.0, acc_norm=float(i)) for i in range(2)],
        "law": [sample(0, acc=1.0)], "art": [sample(0, acc=0.0), sample(1, acc=1.0)],
        "math": [sample(0, name="strict", exact_match=0.0), sample(0, name="loose", exact_match=1.0)],
        "text": [sample(0, ppl=(-300.5, 127)), sample(1, ppl=(float("nan"), 127))]})
    scores = Scores([score("cloze", "acc", 2), score("cloze", "acc_norm", 2), score("mmlu", "acc", 3),
                     score("mmlu/arts", "acc", 2), score("mmlu/arts/art", "acc", 2), score("mmlu/law", "acc", 1),
                     score("math", "exact_match", 1), score("math", "exact_match,loose", 1),
                     score("text", "ppl", 2, "ppl")], 1.0, {})
    found = {one.task: one for one in compare.read_outcomes(tmp_path, scores)}
    assert list(found) == ["cloze", "math", "mmlu", "text"]
    assert found["cloze"].metric == "acc_norm" and found["cloze"].values_I.tolist() == [0, 1]
    assert found["mmlu"].values_I.tolist() == [0, 1, 1] and found["mmlu"].ids == ["art:0:row0", "art:1:row1",
                                                                                 "law:0:row0"]
    assert found["math"].values_I.tolist() == [0]
    assert found["text"].weights_I.tolist() == [127, 127] and math.isnan(found["text"].values_I[1])


def test_missing_samples_are_named(tmp_path):
    with pytest.raises(compare.CompareError, match=r"quiz\.jsonl does not exist; evaluate this model again"):
        compare.read_outcomes(tmp_path, Scores([score("quiz", "acc", 2)], 1.0, {}))
    write_samples(tmp_path, {"quiz": [sample(0, acc=1.0)]})
    with pytest.raises(compare.CompareError, match="holds 1 items of quiz, its score is of 2"):
        compare.read_outcomes(tmp_path, Scores([score("quiz", "acc", 2)], 1.0, {}))


def test_marks_follow_the_pairs_where_unpaired_errors_see_nothing():
    """A lead on every item is sure, however much the items differ."""
    hard = np.random.default_rng(9).normal(300, 90, 40)
    entries = [entry(name, outcomes(-hard - lead, "text", "ppl", [100] * 40)) for name, lead in
               (("kdp", np.linspace(-1, 1, 40)), ("remove", 9 + np.linspace(1, -1, 40)), ("lossy", 10.0))]
    rest = points.scores(20, 0.5, 0.7).scores[1:]
    frame = tables.summarise([points.dense(), *(
        points.pruned(name, Scores([Score("text", "ppl", ppl, 0.2 * ppl, 40, False, "ppl"), *rest], 1.0, {}))
        for name, ppl in (("kdp", 20.0), ("remove", 22.0), ("lossy", 22.2)))])
    tested = compare.compare(entries)
    assert tables.marks(frame, "ppl") == {}
    assert tables.marks(frame, "ppl", comparisons=tested) == {1: "best", 2: "second"}
    assert "**20.00** ± 4.00" in tables.render(frame, "md", columns=["ppl"], comparisons=tested, note=tables.NOTE)


# Over seeds -----------------------------------------------------------------------------------------------------------

def test_mean_and_spread_over_seeds_by_hand():
    made = [points.pruned("kdp", points.scores(ppl, acc, 0.65), calib=calib) for calib, ppl, acc in
            (("news", 20.0, 0.45), ("news-s1", 26.0, 0.41), ("news-s2", 29.0, 0.37), ("other", 99.0, 0.1))]
    summary = tables.summarise([points.dense(), *made])
    frame = compare.over_seeds(summary, {"news": "news", "news-s1": "news", "news-s2": "news"})
    assert frame["method"].tolist() == ["dense", "kdp"] and frame["calib"].tolist() == ["", "news"]
    kdp = frame.iloc[1]
    assert kdp["seeds"] == 3 and kdp["ppl"] == pytest.approx(25.0)
    assert kdp["ppl_spread"] == pytest.approx(math.sqrt((25 + 1 + 16) / 2))
    assert kdp["acc"] == pytest.approx(0.53) and kdp["acc_spread"] == pytest.approx(0.02)
    assert kdp["acc_stderr"] == pytest.approx(math.sqrt(2) * 0.01 / 2)
    assert kdp["ppl_stderr"] == pytest.approx(0.01 * math.sqrt((20 ** 2 + 26 ** 2 + 29 ** 2) / 3))
    text = compare.render_seeds(frame, "md")
    assert "53.0 ± 2.0" in text and "**" not in text and "<u>" not in text and "–" in text.splitlines()[2]
    assert r"\resizebox" in compare.render_seeds(frame, "tex")
    assert "ppl_spread" in compare.render_seeds(frame, "csv").splitlines()[0]
