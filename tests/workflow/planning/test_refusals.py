"""Points that cannot be made are left out of a run with all that only they need, until something changes."""
import copy
import json
from pathlib import Path

import pytest
from planning import figures, grid, refusals
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.project import CONFIG


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The pico configuration with two ratios and an ablation, where no result is yet."""
    monkeypatch.chdir(tmp_path)
    made = copy.deepcopy(CONFIG)
    made["grid"]["ratios"] = [0.1, 0.2]
    made["methods"]["kdp_small"] = {"base": "kdp", "inverse": {"width": 8}}
    made["ablations"] = {"width": {"title": "t", "caption": "c", "variants": ["kdp", "kdp_small"], "x": ["variant"]}}
    return check(made)


def refuse(config, *where, reason="KernelCollapsed: the features are nearly constant"):
    """Write what a job writes that refuses the points of a variant at these ratios."""
    for point in grid.points(config):
        if (point["method"], point["ratio"]) in where:
            refusals._write(config, point, reason)


def test_without_a_refusal_nothing_changes(config):
    assert refusals.without_refused(config) is config and refusals.named(config) == {}


def test_a_refused_point_is_left_out_and_named(config):
    refuse(config, ("kdp", "0.2"))
    found = refusals.without_refused(config)
    left = {(point["method"], point["ratio"]) for point in grid.points(found)}
    assert ("kdp", "0.1") in left and ("kdp", "0.2") not in left and ("linear", "0.2") in left
    assert refusals.named(found) == {"kdp on pico, few, ratio 0.2, K max 3":
                                     "KernelCollapsed: the features are nearly constant"}
    assert found["grid"]["methods"] == config["grid"]["methods"]


def test_a_variant_without_a_point_is_gone_from_grid_studies_and_figures(config):
    refuse(config, ("kdp", "0.1"), ("kdp", "0.2"))
    found = refusals.without_refused(config)
    assert found["grid"]["methods"] == ["remove", "linear"]
    assert found["ablations"]["width"]["variants"] == ["kdp_small"]
    assert not any("kdp/" in entry["name"] for entry in figures.figure_entries(found))
    # other points still count its stand-ins
    assert "kdp" in found["methods"]


def test_a_ratio_without_a_point_is_gone(config):
    refuse(config, *[(name, "0.2") for name in ("remove", "linear", "kdp", "kdp_small")])
    assert refusals.without_refused(config)["grid"]["ratios"] == [0.1]


def test_a_fine_tuned_point_goes_with_the_one_that_it_starts_from(config):
    config["methods"]["tuned"] = {"base": "linear", "finetune": {}}
    config["grid"]["methods"].append("tuned")
    refuse(config, ("linear", "0.1"))
    left = {(point["method"], point["ratio"]) for point in grid.points(refusals.without_refused(config))}
    assert ("tuned", "0.1") not in left and ("tuned", "0.2") in left


def test_a_point_is_tried_again_when_its_options_change_and_only_then(config):
    refuse(config, ("kdp", "0.2"))
    config["methods"]["linear"] = {"fit": {"ridge": 0.5}}
    assert "refused" in refusals.without_refused(config)
    config["methods"]["kdp"]["kernel"]["features"] = 64
    assert refusals.without_refused(config) is config


def test_if_no_point_is_left_the_configuration_is_refused(config):
    config.pop("ablations")
    refuse(config, *[(name, ratio) for name in ("remove", "linear", "kdp") for ratio in ("0.1", "0.2")])
    with pytest.raises(ConfigError, match=r"no point of the grid can be made; remove on pico, few, ratio 0\.1"):
        refusals.without_refused(config)


@pytest.mark.parametrize("kind, kept", [("kdp_core.methods._select.BlockError", True),
                                        ("kdp_core.base.store.StoreError", False), ("builtins.ValueError", False),
                                        ("builtins.MemoryError", False)])
def test_only_what_would_end_alike_again_is_written_down(config, kind, kept):
    import importlib

    module, name = kind.rsplit(".", 1)
    error = getattr(importlib.import_module(module), name)("a reason\nin two lines")
    point = next(point for point in grid.points(config) if point["method"] == "kdp")
    wildcards = {key: point[key] for key in grid.KEYS}
    refusals.record("fold", wildcards, config, error)
    refusals.record("evaluate", wildcards | {"ratio": "0.2"}, config, error)
    files = list(Path("results").rglob("refused.json"))
    assert [str(file.parent) for file in files] == ([grid.folder(point)] if kept else [])
    if kept:
        assert json.loads(files[0].read_text())["reason"] == "BlockError: a reason in two lines"


def test_every_question_about_a_point_is_answered(config, tmp_path):
    """Variants with all that a configuration may say, `sized_as`, `finetune` and studies in."""
    from planning.foreseen import answers

    from tests import pico

    pico.save(tmp_path / "model", "llama")
    config["methods"] |= {"tuned": {"base": "linear", "finetune": {}}, "searched": {"base": "kdp_residual", "search": {
        "largest": 0.1, "judge_sequences": 4}}}
    config["grid"]["methods"] += ["tuned", "searched"]
    points = grid.points(config)
    found = dict(zip([(point["method"], point["ratio"]) for point in points], answers(
        [refusals.question(config, point) for point in points]), strict=True))
    # of a model this small a single layer is less than a tenth
    assert {name for name, why in found.items() if why} == {("searched", "0.1"), ("searched", "0.2")}
    assert "search.largest" in found["searched", "0.2"]
