"""The lists of methods in the pages are those of the records."""
import methods_table
import pytest

from kdp_core.methods import METHODS
from tests.workflow.project import ROOT


@pytest.mark.parametrize("name", methods_table.PLACES)
def test_a_page_lists_the_methods_as_they_are(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert methods_table.written(text) == text, "run python workflow_scripts/methods_table.py"


def test_every_method_stands_in_the_table_once():
    table = methods_table.table()
    assert all(table.count(f"`{name}`") == 1 for name in METHODS)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="no lines '<!-- methods -->'"):
        methods_table.written("# Methods")
