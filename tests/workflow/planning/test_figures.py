"""The figures of a run: which the report has, in which order, with which words."""
import copy

import figures_table
import pytest
from planning import figures

from kdp_core.figures import Entry, described, figure_of
from kdp_core.figures._entry import READS, SETTINGS, check
from kdp_core.figures.style import FigureError
from tests.workflow.project import CONFIG


def test_words_of_a_figure_for_snakemakes_own_report():
    entries = figures.figure_entries(CONFIG)
    assert figures.entry_of(entries, "layers")["rule"] == "figure_all"
    assert figures.entry_of(entries, "other") == {"name": "other", "title": "other", "rule": "", "caption": ""}
    assert figures.as_rst(r"a_b *c* `d` |e| \f") == r"a\_b \*c\* \`d\` \|e\| \\f"


def test_figures_stand_in_the_order_of_the_report_with_the_words_of_their_scope():
    config = copy.deepcopy(CONFIG)
    config["grid"]["ratios"] = [0.1, 0.25]
    config |= {"spaces": {}, "theory": {}, "views": {"variants": ["kdp"]},
               "ablations": {"size": {"title": "Size of {2m}", "caption": "Wider."}}}
    entries = figures.figure_entries(config)
    at = "pico/few"
    assert [entry["name"] for entry in entries] == [
        "score-size", "score-ratio", "tasks-ratio", "layers", "similarity-models", "locality", "ablation-size",
        f"{at}/similarity", f"{at}/theory", f"{at}/errors-r0.1", f"{at}/errors-r0.25", f"{at}/trajectories",
        f"{at}/kdp-heatmaps", f"{at}/spaces-layers", f"{at}/spaces-split", f"{at}/spaces-estimates",
        f"{at}/spaces-steps-r0.1", f"{at}/spaces-choices-r0.1", f"{at}/spaces-steps-r0.25",
        f"{at}/spaces-choices-r0.25", f"{at}/kdp-training", f"{at}/kdp-operators"]
    titles = {entry["name"]: entry["title"] for entry in entries}
    assert titles["ablation-size"] == "Ablation: Size of {2m}"
    assert titles[f"{at}/errors-r0.25"] == "Error of states at ratio 0.25: pico, few"
    assert titles[f"{at}/kdp-training"] == "Training: kdp, pico, few"
    assert figures.entry_of(entries, "ablation-size")["caption"].startswith("Wider. Bars are one standard error")


def test_every_figure_reads_and_asks_for_what_the_rules_know():
    for entry in described()["figures"]:
        assert set(entry["reads"]) <= set(READS) and set(entry["settings"]) <= set(SETTINGS)
        assert entry["reads"], entry["name"]
    assert (figure_of("training").reads, figure_of("tasks-ratio").settings) == (["kernels", "inverses"],
                                                                              ["tasks", "looks"])


@pytest.mark.parametrize("change, message", [
    ({"scope": "point"}, "unknown scope 'point'; choose among all"),
    ({"needs": "luck"}, "unknown condition 'luck'"),
    ({"draw": lambda weather: None}, "unknown record 'weather'"),
])
def test_an_entry_that_the_rules_could_not_draw_is_refused(change, message):
    entry = Entry("new", "New", "Words.", lambda summary: None, "all", 1)
    check(entry)
    with pytest.raises(FigureError, match=message):
        check(entry._replace(**change))


def test_an_unknown_figure_is_refused_with_the_known_ones():
    with pytest.raises(FigureError, match="'score' is unknown; choose one of score-size"):
        figure_of("score")


def test_the_page_has_the_table_of_the_entries():
    page = figures_table.PAGE.read_text(encoding="utf-8")
    assert figures_table.with_table(page) == page, "run `python workflow_scripts/figures_table.py`"
