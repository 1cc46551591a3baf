"""Answers through the workflow, if the config has `answers`: who answers, and where the report shows it."""
import copy

import pytest
from planning import grid
from planning.config import check
from planning.messages import ConfigError

from kdp_core.base import store
from tests.workflow.project import CONFIG

PROMPTS = ["alpha beta", "gamma"]


def with_answers(**own):
    return copy.deepcopy(CONFIG) | {"answers": {"prompts": PROMPTS, **own}}


def test_the_report_shows_what_the_dense_and_the_pruned_models_write(copied):
    copied.config |= with_answers(tokens=4)
    assert {name: count for name, count in copied.planned().items() if name != "all"} == {"answers": 1, "report": 1}
    copied.run("--cores", "1", "results/report.html")
    found = store.read(copied.folder / "results/pico/few/answers.json")
    assert [row["name"] for row in found.rows] == ["dense", "remove", "linear", "kdp"]
    page = (copied.folder / "results/report.html").read_text(encoding="utf-8")
    first = page[:page.index("<main>")]
    assert "What pico writes" in first and all(prompt in first for prompt in PROMPTS)
    # the picture stands beside them and nowhere else
    assert 'alt="How much is removed' in first and page.count('alt="How much is removed') == 1


def test_the_models_of_one_ratio_answer_the_largest_unless_another_is_set():
    config = with_answers()
    config["grid"] |= {"ratios": [0.1, 0.25], "k_max": [3, 4]}
    config["figures"] = {"variants": ["kdp"]}
    assert {point["ratio"] for point in grid.answering(config)} == {"0.25"}
    assert grid.answering_names(grid.answering(config)) == ["dense", "kdp, K max 3", "kdp, K max 4"]
    config["answers"]["ratio"] = 0.1
    check(config)
    assert {point["ratio"] for point in grid.answering(config)} == {"0.1"}
    assert grid.answering(CONFIG) == []


@pytest.mark.parametrize("own, message", [
    ({"ratio": 0.3}, r"answers\.ratio is 0\.3, which is no ratio of the grid; choose one of 0\.1"),
    ({"token": 3}, "unknown key 'token' at answers; did you mean 'tokens'"),
    ({"prompts": []}, "answers.prompts"),
])
def test_what_cannot_be_asked_is_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        check(with_answers(**own))
