"""Expected generation through the workflow, if the config has `generation`: record, figure, report, wrong names."""
import copy

import pytest
from planning import figures
from planning.config import check
from planning.messages import ConfigError

from kdp_core.base import store
from tests.workflow.project import CONFIG

GENERATION = {"variants": ["remove", "linear"], "statistics": {"windows": 3}}


def with_generation(**section):
    return copy.deepcopy(CONFIG) | {"generation": section}


def test_records_figure_and_sentences_of_finished_points(copied):
    copied.config["generation"] = GENERATION
    figure = "results/figures/pico/few/generation-expected-r0.1.png"
    copied.run("--cores", "1", figure, "results/report.html")
    found = store.read(copied.folder / "results/pico/few/remove/r0.1-k3/expectation.json")
    assert 0 < found.losses["quality"] <= 1 and found.statistics["kl"] > 0
    page = (copied.folder / "results/report.html").read_text()
    assert page.count("Expect this model to keep") == 2 and "Will it still generate?" in page
    assert "remove, few, ratio 0.1, K max 3: Expect" in page
    assert not {"fold", "evaluate", "hidden", "dense", "expect"} & set(copied.planned(figure))


def test_the_figure_is_one_of_the_report_where_the_config_has_the_section():
    names = [[entry["name"] for entry in figures.figure_entries(config)] for config in (CONFIG, with_generation())]
    assert [name for name in names[1] if name not in names[0]] == ["pico/few/generation-expected-r0.1"]


@pytest.mark.parametrize("section, message", [
    ({"variants": ["kpd"]}, "generation.variants names 'kpd'.*did you mean 'kdp'"),
    ({"statistics": {"window": 3}}, "unknown key 'window' at generation.statistics; did you mean 'windows'"),
    ({"statistics": {"windows": 0}}, "generation.statistics.windows"),
])
def test_what_cannot_be_expected_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        check(with_generation(**section))
