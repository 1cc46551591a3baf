"""Tables of the page: escaped, named, and sorted by their script as numbers or words."""
import json
import re
import shutil
import subprocess

import pytest

from kdp_core.results import page
from kdp_core.results.page import Cell, Row


def rows(*lines):
    return [Row([page.cell(words) for words in line]) for line in lines]


def test_a_table_says_what_it_is_and_sets_numbers_right():
    made = page.table(["Name", "N", "Mixed"], {"": rows(["a<b", "1,200", "1"], ["c", "–", "x"])}, label="Sizes & all")
    assert "<caption>Sizes &amp; all</caption>" in made and 'role="region" tabindex="0"' in made
    assert '<th scope="row" class="name">a&lt;b</th><td class="number" data-value="1200">1,200</td><td>1</td>' in made
    # what is missing is printed as a dash and sorts as nothing
    assert '<td class="number" data-value="">–</td><td>x</td>' in made
    assert made.count('<th scope="col"') == made.count('<button type="button">') == 3
    assert "tall" not in made and "group" not in made


def test_groups_stand_under_their_words_and_long_tables_scroll():
    made = page.table(["A"], {"": rows(["x"]), "Some <i>": rows(*[[str(n)] for n in range(page.TALL)]), "None": []},
                      label="Long")
    assert made.count("<tbody>") == 2 and 'class="wide tall"' in made
    assert '<tr class="group"><th scope="rowgroup" colspan="1"><span>Some &lt;i&gt;</span></th></tr>' in made
    assert "None" not in made
    assert page.table(["A"], {"": []}, label="Empty") == page.plain(["A"], [], label="Empty") == ""


def test_a_document_leaves_out_empty_sections():
    made = page.document("T", "Lead <1>", [("Here", "here", "<p>x</p>"), ("Gone", "gone", "")])
    assert '<a href="#here">Here</a>' in made and "Gone" not in made and "Lead &lt;1&gt;" in made
    assert page.note("") == page.folded("Nothing", "") == page.meanings({}) == ""


DOM = """
// a table of the page, as much of it as the script touches
const [head, groups, clicks] = JSON.parse(process.argv[1]);
const cellOf = shown => ({textContent: shown, dataset: shown === "–" ? {value: ""} : {}});
const heads = head.map(() => {
  const attributes = {}, button = {addEventListener: (name, act) => button.click = act};
  return {firstChild: button, getAttribute: name => attributes[name], removeAttribute: name => delete attributes[name],
          setAttribute: (name, value) => attributes[name] = value};
});
const bodies = groups.map(lines => {
  const own = {className: "group", cells: []};
  const body = {rows: [own, ...lines.map(line => ({className: "", cells: line.map(cellOf)}))]};
  body.append = (...moved) => body.rows = [...body.rows.filter(row => !moved.includes(row)), ...moved];
  return body;
});
const table = {tHead: {rows: [{cells: heads}]}, tBodies: bodies};
globalThis.document = {querySelectorAll: name => name === "table" ? [table] : []};
globalThis.addEventListener = () => {};
SCRIPT
clicks.forEach(place => heads[place].firstChild.click());
console.log(JSON.stringify([bodies.map(body => body.rows.map(row => row.cells.map(cell => cell.textContent).join(" "))),
                            heads.map(one => one.getAttribute("aria-sort") ?? null)]));
"""


def clicked(lines, *clicks):
    """Rows of each group after clicks on headings, and what a screen reader is told of the headings."""
    program = DOM.replace("SCRIPT", page.SCRIPT)
    done = subprocess.run([shutil.which("node"), "-e", program, json.dumps([lines[0][0], lines, clicks])],
                          capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_sorts_numbers_as_numbers_words_as_words_and_the_missing_last():
    lines = [[["b", "9"], ["a", "–"], ["c", "10"], ["d", "-2.5"]], [["z", "2"], ["y", "1"]]]
    (first, second), heads = clicked(lines, 1)
    # the group's own words stay on top, rows stay in their group
    assert first == ["", "d -2.5", "b 9", "c 10", "a –"] and second == ["", "y 1", "z 2"]
    assert heads == [None, "ascending"]
    (first, _), heads = clicked(lines, 1, 1)
    assert first == ["", "c 10", "b 9", "d -2.5", "a –"] and heads == [None, "descending"]
    (first, _), heads = clicked(lines, 1, 0)
    assert first == ["", "a –", "b 9", "c 10", "d -2.5"] and heads == ["ascending", None]


def test_the_script_reads_what_the_tables_write():
    made = page.table(["A"], {"": rows(["1,000"]), "More": [Row([Cell("<b>x</b>", "7")])]}, label="x")
    assert 'data-value="7"><b>x</b>' in made and "dataset.value" in page.SCRIPT
    assert re.search(r'<tr class="group">', made) and 'className !== "group"' in page.SCRIPT
    assert re.search(r"<th scope=\"col\"[^>]*><button", made) and "head.firstChild.addEventListener" in page.SCRIPT
