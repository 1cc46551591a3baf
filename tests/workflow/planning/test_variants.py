"""Variants on variants: options, steps, searches and sources."""
import pytest
from planning import figures, grid, variants
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.project import CONFIG


def test_a_variant_overrides_its_base_key_by_key():
    config = {**CONFIG, "methods": {**CONFIG["methods"], "a": {"base": "kdp", "kernel": {"features": 8}},
                                    "b": {"base": "a", "inverse": {"width": 4}}}}
    check(config)
    assert variants.base_of(config, "b") == "kdp" and variants.steps(config, "b") == ["kernel", "inverse"]
    assert variants.options(config, "b") == {"kernel": {"features": 8, "epochs": 2, "batch_sequences": 20},
                                             "inverse": {"width": 4, "epochs": 2}}


def test_a_fine_tuned_variant_starts_from_the_first_variant_without_and_inherits_options():
    more = {"a": {"base": "kdp", "finetune": {"rank": 4, "lr": 0.001}}, "b": {"base": "a", "finetune": {"rank": 2}}}
    config = {**CONFIG, "methods": {**CONFIG["methods"], **more}, "grid": {**CONFIG["grid"], "methods": ["b", "kdp"]}}
    check(config)
    assert [variants.source_of(config, name) for name in ("kdp", "a", "b")] == ["kdp"] * 3
    assert variants.options(config, "b")["finetune"] == {"rank": 2, "lr": 0.001}
    assert [point.get("source") for point in grid.points(config)] == ["kdp", None]
    assert variants.learned(config) == ["kdp"] and grid.seeds(config)["b, finetune"] == 0


def test_a_search_is_shared_up_to_the_lowest_variant_with_the_same_options():
    more = {"kdp_residual": {"search": {"entries": 8}}, "a": {"base": "kdp_residual", "compose": {"epochs": 0}},
            "b": {"base": "a", "search": {"entries": 8}}, "c": {"base": "b", "search": {"seed": 1}},
            "d": {"base": "kdp_residual", "search": {"entries": 8, "seed": 1}}, "linear_prefix": {}}
    config = {**CONFIG, "methods": CONFIG["methods"] | more,
              "grid": CONFIG["grid"] | {"methods": ["kdp", *more]}}
    check(config)
    assert {point["method"]: point.get("search") for point in grid.points(config)} == {
        "kdp": None, "kdp_residual": "kdp_residual", "a": "kdp_residual", "b": "kdp_residual", "c": "c", "d": "d",
        "linear_prefix": None}
    assert {name: variants.search_of(config, name) for name in "abcd"} == {
        "a": "kdp_residual", "b": "kdp_residual", "c": "c", "d": "d"}
    assert variants.steps(config, "a") == [] and variants.fits(config, "a") == ["compose"]
    assert variants.fits(config, "kdp") == ["kernel", "inverse"]
    # of a's options only those of the stand-in's shape count for the choice of blocks
    assert variants.size_options(config, "a") == {"compose": {}}
    made = grid.seeds(config)
    assert made["c, search"] == 1 and made["c, compose"] == 0 and "linear_prefix, search" not in made
    # a, and what stands on it, has no epoch to draw; linear_prefix has none to set
    assert variants.learned(config) == ["kdp"] and variants.jointly(config) == ["kdp_residual", "d"]


def test_a_search_reads_the_similarity_with_the_options_that_its_method_names():
    more = {"kdp_residual": {"search": {"order": "cka"}}, "a": {"base": "kdp_residual", "search": {"largest": 0.4}},
            "b": {"base": "a", "search": {"order": "divergence"}}, "shortgpt": {}}
    config = {**CONFIG, "methods": CONFIG["methods"] | more}
    assert [name for name in config["methods"] if variants.reads_similarity(config, name)] == ["kdp_residual", "a"]
    assert not variants.reads_similarity({**config, "methods": {"kdp_residual": {}}}, "kdp_residual")


def test_only_variants_that_train_have_curves_to_draw():
    more = {"still": {"base": "kdp", "kernel": {"epochs": 0}}}
    config = {**CONFIG, "methods": CONFIG["methods"] | more,
              "grid": CONFIG["grid"] | {"methods": ["linear", "kdp", "still"]}}
    assert variants.learned(config) == ["kdp"]
    assert not any("still" in entry["name"] for entry in figures.figure_entries(config))


def test_a_method_needs_no_variant():
    config = {**CONFIG, "grid": CONFIG["grid"] | {"methods": ["linear", "sleb"]},
              "methods": CONFIG["methods"] | {"tuned": {"base": "laco", "finetune": {}}}}
    made = check(config)
    assert {name: own for name, own in made["methods"].items() if name not in config["methods"]} == {
        "sleb": {}, "laco": {}}
    assert [point["method"] for point in grid.points(made)] == ["linear", "sleb"]
    assert "sleb" not in CONFIG["methods"], "the given config stays as it is"
    with pytest.raises(ConfigError, match=r"grid\.methods names 'slebs', which is not defined"):
        check({**config, "grid": CONFIG["grid"] | {"methods": ["slebs"]}})


def searching(**agreement):
    """The configuration with two searches, of which the second one has its own draw."""
    more = {"by_kl": {"base": "layer_search"},
            "by_loss": {"base": "by_kl", "compose": {"objective": "loss", "draw": 2}}}
    return {**CONFIG, "methods": CONFIG["methods"] | more, "agreement": agreement,
            "grid": CONFIG["grid"] | {"methods": ["kdp", "by_kl"]}}


def test_draws_repeat_each_compared_search_on_other_calibration_text():
    config = check(searching(variants=["by_kl", "by_loss"], draws=3))
    assert grid.compared(config) == ["by_kl", "by_kl-d1", "by_kl-d2", "by_loss", "by_loss-d1", "by_loss-d2"]
    assert {name: variants.options(config, name)["compose"] for name in grid.compared(config) if "-" in name} == {
        "by_kl-d1": {"draw": 1, "seed": 1}, "by_kl-d2": {"draw": 2, "seed": 2},
        "by_loss-d1": {"objective": "loss", "draw": 3, "seed": 1},
        "by_loss-d2": {"objective": "loss", "draw": 4, "seed": 2}}
    assert check(config) == config and {point["method"] for point in grid.points(config)} == {"kdp", "by_kl"}
    # without names, the searches of the grid are repeated
    assert grid.compared(check(searching(draws=2))) == ["by_kl", "by_kl-d1"]


@pytest.mark.parametrize(("name", "message"), [
    ("by_typo", r"agreement\.variants names 'by_typo'"),
    ("kdp", r"agreement\.variants names 'kdp', which searches under no")])
def test_a_wrong_name_is_refused_before_draws_are_made_from_it(name, message):
    with pytest.raises(ConfigError, match=message):
        check(searching(variants=["by_kl", name], draws=2))


def test_a_draw_may_not_take_the_name_of_a_variant():
    config = searching(variants=["by_kl", "by_loss"], draws=2)
    config["methods"] = config["methods"] | {"by_kl-d1": {"base": "by_kl"}}
    with pytest.raises(ConfigError, match=r"agreement\.draws makes a variant 'by_kl-d1', which already exists; rename"):
        check(config)
