"""Heat maps and paths through the workflow, on a block that no grid point selects; wrong names are refused at once."""
import copy

import pandas as pd
import pytest
from planning import figures
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.project import CONFIG

VIEWS = {"variants": ["kdp"], "blocks": ["2-4"], "heatmaps": {"positions": [0, 7]},
         "trajectories": {"samples": 12, "perplexity": 5.0}}


def with_views(**views):
    return copy.deepcopy(CONFIG) | {"views": views}


def test_views_of_a_named_block(copied):
    copied.config["views"] = VIEWS
    at = "results/figures/pico/few"
    copied.run("--cores", "1", f"{at}/kdp-heatmaps.png", f"{at}/trajectories.png")
    rows = pd.read_csv(copied.folder / f"{at}/kdp-heatmaps.csv")
    assert set(rows["block"]) == {"2-4"} and len(rows) == 2 * 32 and rows["error"].between(0, 10).all()
    places = pd.read_csv(copied.folder / f"{at}/trajectories.csv")
    assert places["sequence"].nunique() == 12 and sorted(places["layer"].unique()) == list(range(11))
    straight = pd.read_csv(copied.folder / "results/pico/few/straightness.csv")
    assert set(straight["space"]) == {"states", "t-SNE"} and straight["chord"].between(0, 1).all()


def test_views_are_figures_of_the_report_where_the_config_has_them():
    names = [entry["name"] for entry in figures.figure_entries(with_views(**VIEWS))]
    assert {"pico/few/trajectories", "pico/few/kdp-heatmaps"} <= set(names)
    assert not any("heatmaps" in entry["name"] or "trajectories" in entry["name"]
                   for entry in figures.figure_entries(CONFIG))


@pytest.mark.parametrize("views, message", [
    ({"variants": ["kpd"]}, "views.variants names 'kpd'.*did you mean 'kdp'"),
    ({"variants": ["linear"]}, "'linear', which trains no kernel"),
    ({"variants": ["kdp"], "blocks": ["4-4"]}, "'4-4', an empty run"),
    ({"variants": ["kdp"], "blocks": ["4"]}, "views.blocks.0 is '4', but must match"),
    ({"heatmaps": {"seed": 3}}, "unknown key 'seed' at views.heatmaps"),
])
def test_wrong_views_are_refused(views, message):
    with pytest.raises(ConfigError, match=message):
        check(with_views(**views))


def test_a_variant_outside_the_grid_needs_blocks():
    config = with_views(variants=["wide"])
    config["methods"]["wide"] = {"base": "kdp", "kernel": {"bandwidth_scale": 9.0}}
    with pytest.raises(ConfigError, match=r"'wide', of which .*views\.blocks"):
        check(config)
    config["views"]["blocks"] = ["2-4"]
    check(config)
