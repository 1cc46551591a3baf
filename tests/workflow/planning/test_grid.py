"""Points, calibration seeds and ablations."""
import pytest
from planning import figures, grid
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.planning.configs import with_ablation, with_seeds
from tests.workflow.project import CONFIG


def test_an_ablation_names_points_and_settings():
    config = with_ablation(ratios=[0.1, 0.2])
    check(config)
    made = grid.ablation(config, "size")
    assert made["settings"] == {"kdp": {"kernel.features": 32}, "kdp_8": {"kernel.features": 8}}
    assert made["tokens"] == {"few": 24 * 40} and made["metrics"] == ["ppl", "acc"]
    assert [(p["method"], p["ratio"]) for p in made["points"]] == [("kdp", "0.1"), ("kdp", "0.2"), ("kdp_8", "0.1"),
                                                                  ("kdp_8", "0.2")]
    # the grid has kdp at 0.1 already
    assert len(grid.points(config)) == len(grid.grid_points(config)) + 3
    assert grid.run_variants(config) == ["remove", "linear", "kdp", "kdp_8"]
    assert any(entry["name"] == "ablation-size" for entry in figures.figure_entries(config))
    assert "kdp_8, kernel" in grid.seeds(config)


def test_seeds_become_calibration_sets_of_their_own():
    study = {"title": "A", "caption": "B", "variants": ["kdp"], "x": ["variant"]}
    config = with_seeds(0, 1, 7, ablations={"own": {**study, "calibrations": ["other", "few"]}, "grids": study})
    check(config)
    assert grid.seed_families(config) == {"few": "few", "few-s1": "few", "few-s7": "few"}
    apart = grid.with_seeds_apart(config)
    check(apart)
    assert {name: own["seed"] for name, own in apart["calibrations"].items()} == {
        "few": 0, "few-s1": 1, "few-s7": 7, "other": 0}
    # the set's own seed keeps its name, so what was run before stays
    assert apart["calibrations"]["few"] == apart["calibrations"]["other"] == CONFIG["calibrations"]["few"]
    assert apart["grid"]["calibrations"] == ["few", "few-s1", "few-s7"]
    assert apart["ablations"]["own"]["calibrations"] == ["other", "few", "few-s1", "few-s7"]
    assert "calibrations" not in apart["ablations"]["grids"]
    points = grid.points(apart)
    assert {point["calib"] for point in points} == {"few", "few-s1", "few-s7", "other"}
    assert grid.seeds(apart)["calibration few-s7"] == 7
    assert grid.calibration_sizes(apart)["few-s7"] == (40, 960)
    assert config["grid"]["calibrations"] == ["few"], "the given config stays as it is"


def test_one_seed_is_no_axis():
    for config in (CONFIG, with_seeds(0)):
        assert grid.seed_families(config) == {}
        assert list(grid.with_seeds_apart(config)["calibrations"]) == list(config["calibrations"])
    assert grid.with_seeds_apart(CONFIG) == CONFIG


def test_ablations_name_the_papers_tables_once_each():
    study = {"title": "A", "caption": "B", "variants": ["kdp"], "x": ["variant"], "paper": 3}
    config = {**CONFIG, "ablations": {"a": study, "b": {**study, "paper": 4}, "c": {**study, "paper": 11}}}
    check(config)
    assert {number: own["name"] for number, own in grid.paper_ablations(config).items()} == {
        3: "ablation-a", 4: "ablation-b", 11: "ablation-c"}
    for number, words in ((4, "ablations.b.paper is 4, and so is that of a"), (5, "must be one of [3, 4, 9, 11]")):
        with pytest.raises(ConfigError) as refused:
            check({**CONFIG, "ablations": {"a": {**study, "paper": number}, "b": {**study, "paper": number}}})
        assert words in str(refused.value)
