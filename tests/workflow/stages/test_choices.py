"""Multiple choice through the workflow, if the config has `choices`: records, figure, limits, wrong names."""
import copy
import json

import pytest
from planning import evaluation, figures
from planning.config import check
from planning.messages import ConfigError

from kdp_core.base import store
from tests import pico
from tests.workflow.project import CONFIG


def with_choices(tmp_path, benchmarks=None, **section):
    rows = [{"goal": text[:40], "sol1": text[40:70], "sol2": text[70:95], "label": i % 2}
            for i, text in enumerate(pico.documents(6, seed=4, words=24))]
    (tmp_path / "eval").mkdir(exist_ok=True)
    (tmp_path / "eval/piqa_val.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = copy.deepcopy(CONFIG) | {"choices": section}
    config["evaluate"]["benchmarks"] = {"tasks": ["piqa"], "data": str(tmp_path)} | (benchmarks or {})
    return config


def test_records_and_figure_of_finished_points(copied, tmp_path):
    copied.config = with_choices(tmp_path, tasks=["piqa"], limit=3, variants=["remove", "linear"])
    figure = "results/figures/pico/few/choices-survival-r0.1.png"
    copied.run("--cores", "1", figure)
    found = store.read(copied.folder / "results/pico/few/remove/r0.1-k3/choices.json")
    assert [row["task"] for row in found.tasks] == ["piqa"] and len(found.items) == 3
    assert not {"fold", "dense", "choices", "choices_dense"} & set(copied.planned(figure))
    copied.config["choices"]["variants"].append("kdp")
    assert copied.planned(figure).get("choices") == 1, "one model more reads the items, and the dense one does not"


@pytest.mark.parametrize("benchmarks, section, limits", [
    ({}, {}, {}), ({"limit": 5}, {}, {"piqa": 5}), ({"limit": 5}, {"limit": 3}, {"piqa": 3}),
    ({"limit": 9, "limits": {"piqa": 2}}, {"limit": 3}, {"piqa": 2})])
def test_items_are_the_first_of_those_that_are_scored(tmp_path, benchmarks, section, limits):
    chosen = evaluation.choices(with_choices(tmp_path, benchmarks, tasks=["piqa"], **section))
    assert chosen == {"tasks": ["piqa"], "data": str(tmp_path), "limits": limits}


def test_the_figure_is_one_of_the_report_where_the_config_has_the_section(tmp_path):
    names = [[entry["name"] for entry in figures.figure_entries(config)]
             for config in (CONFIG, with_choices(tmp_path, tasks=["piqa"]))]
    assert [name for name in names[1] if name not in names[0]] == ["pico/few/choices-survival-r0.1"]


@pytest.mark.parametrize("section, message", [
    ({"tasks": ["copa"]}, "choices.tasks names 'copa'.*add it to evaluate.benchmarks.tasks"),
    ({"tasks": ["piqa"], "variants": ["kpd"]}, "choices.variants names 'kpd'.*did you mean 'kdp'"),
    ({}, "'tasks' is a required property|choices.*tasks"),
])
def test_what_cannot_be_compared_is_refused(tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        check(with_choices(tmp_path, **section))
