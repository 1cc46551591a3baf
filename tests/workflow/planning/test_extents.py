"""Sections that ask for more layers, positions, states or tokens than there are, before any job."""
import copy
import json
from pathlib import Path

import pytest
from planning import extents, refusals
from planning.config import check
from planning.messages import ConfigError

from tests import pico
from tests.workflow.project import CONFIG

THEORY = {"method": "kdp", "run": [2, 6]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with pico models of ten layers: `model`, and `opt`, which learns its 256 positions."""
    folder = tmp_path_factory.mktemp("models")
    pico.save(folder / "model", "llama")
    pico.save(folder / "opt", "opt")
    return folder


@pytest.fixture
def config(models, monkeypatch):
    """The pico configuration in that folder."""
    monkeypatch.chdir(models)
    return copy.deepcopy(CONFIG)


@pytest.mark.parametrize("own, words", [
    ({"theory": {**THEORY, "run": [2, 11]}}, "theory.run is [2, 11], but models.pico has layers 0 to 9"),
    ({"theory": {**THEORY, "gaps": [5]}}, "theory.gaps is [5], but theory.run [2, 6] has 4 layers; give 1 to 4"),
    ({"theory": {**THEORY, "gaps": []}}, "theory.gaps is []"),
    ({"theory": {**THEORY, "run": [6, 6]}}, "an empty run"),
    ({"theory": {**THEORY, "feature_counts": [7]}}, "theory.feature_counts is [7], but must be a multiple of 2"),
    ({"theory": {**THEORY, "kernel": {"heldout": 0.001}}}, "theory holds out 0.001 of the 40 sequences"),
    ({"theory": THEORY, "hidden": {"layers": [0, 2, 3, 5, 6]}}, "theory.run is [2, 6], but state 4 is not stored"),
    ({"views": {"variants": ["kdp"], "blocks": ["8-11"]}}, "views.blocks names '8-11', but models.pico has layers 0"),
    ({"views": {"variants": ["kdp"], "heatmaps": {"positions": [24, 30]}}}, "few have 24 tokens; give positions"),
    ({"views": {"variants": ["kdp"], "trajectories": {"samples": 3, "perplexity": 11}}}, "give 33 points; give less"),
    ({"views": {"variants": ["kdp"]}, "hidden": {"layers": [0, 10]}}, "through 2 states of models.pico"),
    ({"spaces": {"probe": {"positions": 24}}}, "spaces.probe.positions is 24, but windows have the 24 tokens"),
    # the default is 64
    ({"spaces": {}}, "spaces.compare.prompt_tokens is 64, but windows have the 24 tokens"),
    ({"efficiency": {**CONFIG["efficiency"], "tokens": 255}}, "more than the 256 positions of models.pico"),
    ({"calibrations": {"few": {**CONFIG["calibrations"]["few"], "length": 1}}}, "length is 1, but must be at least 2"),
])
def test_more_than_there_is_is_refused_with_the_place_and_the_remedy(config, own, words):
    with pytest.raises(ConfigError) as refused:
        check(config | own)
    assert words in str(refused.value)


@pytest.mark.parametrize("own", [
    {"theory": {**THEORY, "run": [2, 10], "gaps": [8]}}, {"views": {"variants": ["kdp"], "blocks": ["8-10"]}},
    {"spaces": {"probe": {"positions": 23}, "compare": {"prompt_tokens": 24}}},
    {"efficiency": {**CONFIG["efficiency"], "tokens": 254}},
])
def test_what_just_fits_is_not_refused(config, own):
    check(config | own)


def test_only_a_model_that_learns_its_positions_limits_the_length_of_sequences(config):
    config["calibrations"]["few"]["length"] = 300
    check(config)
    config["models"]["pico"]["source"] = "opt"
    with pytest.raises(ConfigError, match=r"calibrations\.few\.length is 300, but models\.pico has 256 positions"):
        check(config)


def test_a_model_that_is_not_known_yet_is_asked_about_by_the_first_job_that_runs_it(config, tmp_path, monkeypatch):
    config = check(config) | {"theory": {**THEORY, "run": [2, 11]}}
    config["models"]["pico"]["source"] = "pypi:made==1.0/model.gguf"
    monkeypatch.chdir(tmp_path)
    assert extents.extent_of(config, "pico") is None
    extents.check(config)
    place = Path("results/pico")
    pico.save(place / "dense", "llama")
    facts = {"fields": {"source": "another model"}}
    (place / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    # these are the results of a model that had the name before
    extents.check(config)
    (place / "facts.json").write_text(json.dumps({"fields": {"source": config["models"]["pico"]["source"]}}))
    with pytest.raises(ConfigError, match="layers 0 to 9"):
        refusals.stop_before_work({"model": "pico", "calib": "few"}, config)
