"""The site of the documentation: its menu and links, the pages that are made from the code, and the whole build."""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import typer
import yaml

from kdp.app import app
from kdp_core.base import options
from kdp_core.methods import METHODS, parts
from kdp_core.methods._method import GRID_ARGUMENTS
from tests.test_structure import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MADE = ("reference/", "methods/", "contributing.md", "changes.md")
"""What the code makes, in no checkout."""


@pytest.fixture(scope="module", autouse=True)
def _makers():
    """The modules that make pages are found as the hook finds them."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT / "workflow_scripts", DOCS / "site"):
            patch.syspath_prepend(str(folder))
        yield


def named(menu):
    """The paths of a menu of mkdocs.yml."""
    if isinstance(menu, str):
        return [menu]
    entries = menu.values() if isinstance(menu, dict) else menu
    return [path for entry in entries for path in named(entry)]


def test_the_menu_names_pages_that_are_there():
    paths = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(paths) == len(set(paths)) > 10
    assert [path for path in paths if not (DOCS / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_between_pages_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", prose)
    assert [target for target in targets if not target.startswith(MADE) and not (DOCS / target).exists()] == []


def test_every_cell_of_the_comparison_has_a_source():
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    tools = [row[0] for row in rows(page.split("## At a glance")[0])]
    topics = page.split("\n## ")[2:]
    linked = re.findall(r"^\| \[[\w ]+\]\(#([\w-]+)\)", page, re.MULTILINE)
    assert [topic.splitlines()[0].lower().replace(" ", "-") for topic in topics] == linked and len(linked) == 9
    for topic in topics:
        found = rows(topic)
        assert [row[0] for row in found] == ["kdp", *tools]
        assert all(row[1] and ("`" in row[2] or row[2].startswith("not found in")) for row in found)
        for path in re.findall(r"`([\w./-]+)`", found[0][2]):
            assert (ROOT / path).exists(), path


def rows(text):
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_page_on_the_configuration_has_every_section_and_what_the_demo_sets():
    import config_page
    from planning import schema

    page = config_page.page()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(schema.schema()["properties"])
    # a key of a block inside a section stands under its whole name
    assert "| `benchmarks.allow_code` | true or false |" in page and "| `lastword_items` |" in page
    assert re.search(r"\| `batch_sequences` \|[^|]*\|[^|]*\| `8` \|", page)
    assert "exclusiveMinimum" not in page


def test_the_page_on_the_command_line_has_every_option():
    import command_page

    page = command_page.page()
    for name, command in typer.main.get_command(app).commands.items():
        own = page.split(f"## kdp {name}\n")[1].split("\n## ")[0]
        for param in command.params:
            shown = param.opts[0] if param.opts[0].startswith("-") else param.name.upper()
            assert param.name == "help" or f"| `{shown}` |" in own


def test_the_page_on_the_library_writes_signatures_as_the_source_does():
    import library_page

    page = library_page.page()
    assert "prune_model(\n    model: 'PreTrainedModel',\n" in page and "    ratio: float=0.25,\n" in page
    assert "- `ratio`: share of all parameters to remove, between 0 and 1." in page


def test_every_method_has_a_page_with_all_its_options():
    import method_pages

    pages = method_pages.pages()
    assert set(pages) == {path for group in method_pages.menu().values() for path in group.values()}
    for name, method in METHODS.items():
        page = pages[f"methods/{name}.md"]
        assert method.paper.split("|")[0].replace("<", "&lt;").replace("*", "\\*") in page
        for part, function in parts(method).items():
            known = set(options.arguments(function, filled=GRID_ARGUMENTS))
            assert {option for option in known if f"| `{part}.{option}` |" not in page} == set()


def test_docstrings_become_paragraphs_lists_and_equations():
    import method_pages

    text = ("Head * of it.\n\nA line:\n    m = 1 / |x|\nWhere we differ:\n    The first thing.\n        It goes on.\n"
            "    The second.\nNow:\n- one\n  more\n")
    assert method_pages.head(type("Module", (), {"__doc__": text})).split("\n") == [
        "Head \\* of it.", "", "A line:", "", "    m = 1 / |x|", "", "Where we differ:", "", "- The first thing.",
        "  It goes on.", "- The second.", "", "Now:", "", "- one", "  more", ""]


class Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        for key in ("src", "href", "srcset"):
            if tag != "a" and re.match(r"(https?:)?//", given.get(key) or ""):
                self.found.append(given[key])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site as `make docs` builds it."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    made = tmp_path_factory.mktemp("built") / "site"
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(made)],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES) + len(METHODS)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loads = Loads()
        loads.feed(text)
        # the theme would fetch a library for such a drawing
        assert loads.found == [] and 'class="mermaid"' not in text, page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_search_has_what_it_needs_beside_the_pages(site):
    for page in site.rglob("*.html"):
        script, = re.findall(r'<script src="([\w./-]*iframe-worker\.js)">', page.read_text(encoding="utf-8"))
        # the page of errors is served at every depth, so its paths begin at the root
        assert ((site if script.startswith("/") else page.parent) / script.lstrip("/")).is_file()
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {") and all(f'"{page.stem}.html' in index for page in PAGES)


def test_the_search_finds_words_in_a_site_that_is_opened_from_disk(site):
    if not (browser := shutil.which("chromium")):
        pytest.skip("chromium is not installed")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
                           "--dump-dom", f"{(site / 'index.html').as_uri()}?q=padding"],
                          capture_output=True, text=True, check=True, timeout=120)
    assert re.search(r'href="file://[^"]*tried\.html\?h=padding[^"]*" class="md-search-result__link"', done.stdout)
