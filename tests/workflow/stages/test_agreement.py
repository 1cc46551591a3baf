"""Searches compared through the workflow, if the config has `agreement`: record, figures, report, wrong names."""
import copy

import pytest
from planning import figures
from planning.config import check
from planning.messages import ConfigError

from kdp_core.base import store
from tests.workflow.project import CONFIG

COMPOSE = {"strategy": "one_shot", "sequences": 6, "positions": 4, "budget": 120}
SEARCHES = {"by_kl": {"base": "layer_search", "compose": COMPOSE},
            "by_kl_1": {"base": "by_kl", "compose": {"draw": 1}},
            "by_state": {"base": "by_kl", "compose": {"objective": "last_state"}},
            "by_state_1": {"base": "by_state", "compose": {"draw": 1}},
            "by_random": {"base": "by_kl", "compose": {"strategy": "random"}},
            "by_random_1": {"base": "by_random", "compose": {"draw": 1, "seed": 1}}}
DRAWN = ["searches-layers", "searches-agreement", "searches-curves"]


def with_agreement(**section):
    config = copy.deepcopy(CONFIG) | {"agreement": section}
    config["methods"] |= SEARCHES
    return config


def test_record_figures_and_claims_of_searches_that_the_grid_does_not_run(copied):
    copied.config = with_agreement(variants=list(SEARCHES), heldout={"windows": 8})
    drawn = [f"results/figures/pico/few/{name}-r0.1.png" for name in DRAWN]
    copied.run("--cores", "1", *drawn, "results/report.html")
    found = store.read(copied.folder / "results/pico/few/agreement-r0.1.json")
    assert [row["variant"] for row in found.rows] == list(SEARCHES)
    assert {row["draw"] for row in found.rows} == {0, 1} and {row["objective"] for row in found.rows} == {
        "kl", "last_state"}
    assert {one["varies"] for one in found.pairs} == {"objective", "strategy", "draw"}
    page = (copied.folder / "results/report.html").read_text()
    assert "Objective or search?" in page and "6 searches" in page and "searches agree more than objectives" in page
    assert not (copied.folder / "results/pico/few/by_kl/r0.1-k3/checkpoint").exists(), "no set is folded for this"
    assert not {"compose", "agreement", "dense"} & set(copied.planned(*drawn))


def test_the_figures_are_those_of_the_report_where_the_config_has_the_section():
    names = [[entry["name"] for entry in figures.figure_entries(config)]
             for config in (CONFIG, with_agreement(variants=list(SEARCHES)))]
    assert [name for name in names[1] if name not in names[0]] == [f"pico/few/{name}-r0.1" for name in DRAWN]


@pytest.mark.parametrize("section, message", [
    ({"variants": ["by_lk", "by_kl"]}, "agreement.variants names 'by_lk'.*did you mean 'by_kl'"),
    ({"variants": ["by_kl", "linear"]}, "agreement.variants names 'linear', which searches under no objective"),
    ({"variants": ["by_kl"]}, r"agreement compares the variants \['by_kl'\]; name at least two"),
    ({}, r"agreement compares the variants \[\]; name at least two"),
    ({"heldout": {"windows": 3}}, "agreement.heldout.windows"),
])
def test_what_cannot_be_compared_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        check(with_agreement(**section))
