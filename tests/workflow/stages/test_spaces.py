"""Three spaces through the workflow, if the config has `spaces`; looks of variants; wrong names are refused at once."""
import copy

import pandas as pd
import pytest
from planning import figures, grid
from planning.config import check
from planning.messages import ConfigError
from planning.schema import schema

from kdp_core.base import store
from tests.workflow.project import CONFIG

SPACES = {"variants": ["remove", "linear"], "probe": {"windows": 2, "positions": 3, "parts": ["mlp"]},
          "compare": {"prompts": 2, "prompt_tokens": 8, "steps": 3, "choices": 4}}


def with_spaces(**spaces):
    return copy.deepcopy(CONFIG) | {"spaces": spaces}


def test_records_and_figures_of_finished_points(copied):
    copied.config["spaces"] = SPACES
    at = "results/figures/pico/few"
    copied.run("--cores", "1", f"{at}/spaces-layers.png", f"{at}/spaces-steps-r0.1.png",
               f"{at}/spaces-choices-r0.1.pdf")
    record = store.read(copied.folder / "results/pico/few/probes.json")
    assert (record.windows, len(record.positions), {row["part"] for row in record.layers}) == (2, 3, {"mlp"})
    own = store.read(copied.folder / "results/pico/few/remove/r0.1-k3/spaces.json")
    assert (own.prompts, own.steps, len(own.choices)) == (2, 3, 4) and own.decoding[0]["kl"] > 0
    steps = pd.read_csv(copied.folder / f"{at}/spaces-steps-r0.1.csv")
    assert set(steps["method"]) == {"remove", "linear"} and len(steps) == 2 * 2 * 3
    # nothing that was there is made again
    assert not {"fold", "evaluate", "hidden", "dense"} & set(copied.planned(f"{at}/spaces-layers.png"))


def test_they_are_figures_of_the_report_where_the_config_has_them():
    names = [[entry["name"] for entry in figures.figure_entries(config)] for config in (CONFIG, with_spaces())]
    new = [name for name in names[1] if name not in names[0]]
    assert new == [f"pico/few/spaces-{name}" for name in ("layers", "split", "estimates", "steps-r0.1", "choices-r0.1")]


@pytest.mark.parametrize("spaces, message", [
    ({"variants": ["kpd"]}, "spaces.variants names 'kpd'.*did you mean 'kdp'"),
    ({"variants": ["linear_sequential"]}, "spaces.variants names 'linear_sequential'"),
    ({"probe": {"part": ["mlp"]}}, "unknown key 'part' at spaces.probe; did you mean 'parts'"),
    ({"compare": {"dropped": [3]}}, "unknown key 'dropped' at spaces.compare"),
])
def test_what_cannot_be_looked_into_is_refused(spaces, message):
    with pytest.raises(ConfigError, match=message):
        check(with_spaces(**spaces))


def test_variants_of_figures_are_variants_of_the_grid():
    with pytest.raises(ConfigError, match=r"figures\.variants names 'linear_sequential'"):
        check(copy.deepcopy(CONFIG) | {"figures": {"variants": ["linear_sequential"]}})
    config = copy.deepcopy(CONFIG) | {"figures": {"variants": ["kdp"]}}
    check(config)
    assert [point["method"] for point in grid.chosen_points(config, "figures")] == ["kdp"]
    assert len(grid.chosen_points(config, "spaces")) == 3


def test_looks_come_from_the_methods_that_the_configuration_names():
    config = copy.deepcopy(CONFIG)
    config["methods"] |= {"small": {"base": "kdp"}, "tuned": {"base": "small", "finetune": {}}, "own": {"base": "lorp"}}
    config["grid"]["methods"] = ["tuned", "small", "kdp", "own"]
    named = [name for name in schema()["methods"] if name in {*CONFIG["methods"], "lorp"}]
    kdp = named.index("kdp")
    assert figures.looks(config, grid.grid_points(config)) == {
        "tuned": [kdp, 2, "fine-tuned", False], "small": [kdp, 1, "layers replaced or merged", False],
        "kdp": [kdp, 0, "layers replaced or merged", False],
        "own": [named.index("lorp"), 1, "layers removed", False]}
    assert schema()["methods"]["wanda"]["x-group"] == "inside the layers"
    assert [name for name, one in schema()["methods"].items() if one["x-own"]] == \
        ["linear_prefix", "kdp_residual", "kdp_narrow"]


def test_models_are_named_with_their_calibration_where_there_are_several():
    assert grid.labels([("a", "news"), ("b", "news")]) == ["a", "b"]
    assert grid.labels([("a", "news"), ("a", "more")]) == ["a, news", "a, more"]
