"""The tables of methods in the pages are those of the records."""
import html

import methods_table
import pytest

from kdp_core.methods import METHODS
from kdp_core.model.families import FAMILIES
from tests.workflow.project import ROOT


@pytest.mark.parametrize("page", methods_table.PLACES)
def test_a_page_has_the_tables_as_they_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert methods_table.written(page, text) == text, "run python workflow_scripts/methods_table.py"


def test_every_method_stands_in_the_table_once():
    table = methods_table.methods()
    assert all(table.count(f"`{name}`") == 1 for name in METHODS)


def test_every_method_has_its_paper_and_the_file_that_names_it():
    for row in methods_table.files().splitlines()[2:]:
        name, paper, file = row.strip("| ").split(" | ")
        assert html.unescape(paper) == METHODS[name.strip("`")].paper
        assert f'Method("{name.strip("`")}"' in (ROOT / file.strip("`")).read_text(encoding="utf-8")


def test_every_method_works_on_a_family_or_is_refused_with_a_reason():
    """The battery runs what works here, and the refusals that it finds are those of the records."""
    table, _, reasons = methods_table.families().split("\n\n")
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert head[1:] == [f"`{name}`" for name in FAMILIES]
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS]
    reasons = dict(line[3:].split(") ", 1) for line in reasons.splitlines())
    for method, row in zip(METHODS.values(), rows, strict=True):
        for record, cell in zip(FAMILIES.values(), row[1:], strict=True):
            why = method.refuses(record)
            assert cell == "works" if not why else reasons[cell.removeprefix("refused (").removesuffix(")")] == why


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"README\.md has no lines '<!-- methods -->'"):
        methods_table.written("README.md", "# Methods")
