"""Functions that mkdocs calls while it builds the site. They add pages that are made from the code, and fill the menu.

The pages are not committed. `config_page`, `command_page`, `library_page` and `method_pages` make them, and the pages
on changes and contributions are the files at the root of the checkout.
"""
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts"), str(Path(__file__).parent)]

import command_page  # noqa: E402
import config_page  # noqa: E402
import library_page  # noqa: E402
import method_pages  # noqa: E402

LINK = re.compile(r"(\]\()([\w./-]+)(#[\w-]+)?(\))")
REFERENCE = {"Configuration": ("reference/configuration.md", config_page.page),
             "Command line": ("reference/command-line.md", command_page.page),
             "Library": ("reference/library.md", library_page.page)}
"""Title in the menu -> path of a reference page and the function that makes it."""
AT_THE_ROOT = {"Contribute": ("contributing.md", "CONTRIBUTING.md"), "Changes": ("changes.md", "CHANGELOG.md")}
"""Title in the menu -> path of a page and the file that it shows."""


def on_config(config: Any) -> Any:
    """Complete the menu: pages from the code, pages at the root, and every page of docs/ that it does not name."""
    menu = {title: pages for entry in config["nav"] for title, pages in entry.items()}
    menu["Methods"] += [{title.capitalize(): [{name: path} for name, path in pages.items()]}
                        for title, pages in method_pages.menu().items()]
    menu["Reference"][:0] = [{title: path} for title, (path, _) in REFERENCE.items()]
    menu["The project"] += [{title: path} for title, (path, _) in AT_THE_ROOT.items()]
    named = set(re.findall(r"[\w/-]+\.md", str(menu)))
    menu["Use it"] += [path.name for path in sorted(Path(config["docs_dir"]).glob("*.md")) if path.name not in named]
    config["nav"] = [{title: pages} for title, pages in menu.items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    made = {path: make() for path, make in REFERENCE.values()}
    made |= {path: from_root((ROOT / file).read_text(encoding="utf-8")) for path, file in AT_THE_ROOT.values()}
    for path, content in (made | method_pages.pages()).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page without links that lead out of docs/: such a link has no page, so its path is shown instead."""
    here = posixpath.dirname(page.file.src_uri)

    def resolved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, found[3]))
        outside = target.startswith("../") and (ROOT / "docs" / target).exists()
        return f"{found[1]} (`{target.removeprefix('../')}`)" if outside else found[0]

    linked = re.sub(r"(?<!!)\[([^]]+)\](\()([\w./-]+)\)", resolved, markdown)
    return "".join(part if part.startswith("```") else nested(part) for part in re.split(r"(```.*?```)", linked,
                                                                                         flags=re.DOTALL))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """The page with the names of options in commands marked, so that no line breaks within such a name."""
    return re.sub(r"<pre>.*?</pre>", lambda block: re.sub(r"(?<=\s)--[a-z][\w-]*", r'<span class="whole">\g<0></span>',
                                                          block[0]), html, flags=re.DOTALL)


def nested(prose: str) -> str:
    """Lists inside lists with four spaces, as mkdocs needs them; GitHub accepts two."""
    return re.sub(r"^  - ", "    - ", prose, flags=re.MULTILINE)


def from_root(text: str) -> str:
    """A page of the root as a page of docs/: its links are changed to start from docs/."""
    pages = {file: path for path, file in AT_THE_ROOT.values()}

    def moved(found: re.Match[str]) -> str:
        target = pages.get(found[2]) or (found[2].removeprefix("docs/") if found[2].startswith("docs/") else
                                         f"../{found[2]}")
        return f"{found[1]}{target}{found[3] or ''}{found[4]}"

    return LINK.sub(moved, text)
