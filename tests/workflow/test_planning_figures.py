"""The figures of the report."""
from planning import figures

from tests.workflow.project import CONFIG


def test_words_of_a_figure_for_snakemakes_own_report():
    entries = figures.figure_entries(CONFIG)
    assert figures.entry_of(entries, "layers")["rule"] == "figure_layers"
    assert figures.entry_of(entries, "other") == {"name": "other", "title": "other", "rule": "", "caption": ""}
    assert figures.as_rst(r"a_b *c* `d` |e| \f") == r"a\_b \*c\* \`d\` \|e\| \\f"
