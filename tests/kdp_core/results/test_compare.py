"""Pairs of models: who is compared with whom, items that do not match, samples on disk."""
import math

import numpy as np
import pytest

from kdp_core.base.measurements import Score, Scores
from kdp_core.results import compare, marks, tables
from kdp_core.results.compare import Entry, Outcomes
from kdp_core.results.summary import summarise
from kdp_core.score import task_records
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


def test_a_pairs_p_does_not_depend_on_who_else_is_there():
    rng = np.random.default_rng(10)
    entries = [entry(name, *(outcomes(rng.integers(0, 2, 30), task) for task in ("one", "two")))
               for name in ("kdp", "remove", "linear")]
    p_values = [frame[(frame["task"] == "all") & ~frame[["method", "other"]].eq("remove").any(axis=1)]["p"].tolist()
                for frame in (compare.compare(entries), compare.compare(entries[::2]))]
    assert p_values[0] == p_values[1] and len(p_values[0]) == 1


def test_a_collapsed_model_is_behind_all_others_and_equal_ones_are_level():
    text = [-300.0, -310.0, -290.0]
    frame = compare.compare([entry(name, outcomes(values, "text", "ppl", [100] * 3)) for name, values in
                             (("kdp", text), ("twin", text), ("lost", [-300.0, math.nan, -290.0]))])
    assert pair(frame, "lost", "kdp")["difference"] == math.inf and pair(frame, "lost", "kdp")["p"] == 0
    assert pair(frame, "twin", "kdp")["difference"] == 0 and pair(frame, "twin", "kdp")["p"] == 1


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
    (outcomes([1, 0, 1], "riddle"), "was scored on quiz"),
])
def test_other_items_are_refused(other, words):
    with pytest.raises(compare.CompareError) as refused:
        compare.compare([entry("kdp", outcomes([1, 1, 0])), entry("remove", other)])
    assert words in str(refused.value) and "tiny/news/kdp/0.2/3 and tiny/news/remove/0.2/3" in str(refused.value)


def sample(place, hash_of="row", name="none", **metrics):
    return {"doc_id": place, "target": "", "filtered_resps": [], "filter": name, "metrics": list(metrics), **metrics,
            "doc_hash": f"{hash_of}{place}", "prompt_hash": ""}


def score(task, metric, items, unit="share"):
    return Score(task, metric, 0.5, 0.1, items, True, unit)


def write_samples(folder, samples):
    """As an evaluation writes them."""
    for task, rows in samples.items():
        (folder / f"{task}.jsonl").write_text("".join(task_records.sample_lines(rows)), encoding="utf-8")


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
    frame = summarise([points.dense(), *(
        points.pruned(name, Scores([Score("text", "ppl", ppl, 0.2 * ppl, 40, False, "ppl"), *rest], 1.0, {}))
        for name, ppl in (("kdp", 20.0), ("remove", 22.0), ("lossy", 22.2)))])
    tested = compare.compare(entries)
    assert marks.marks(frame, "ppl") == {}
    assert marks.marks(frame, "ppl", comparisons=tested) == {1: "best", 2: "second"}
    assert "**20.00** ± 4.00" in tables.render(frame, "md", columns=["ppl"], comparisons=tested, note=marks.NOTE)
