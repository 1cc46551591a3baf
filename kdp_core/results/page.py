"""Parts of the report's page: sortable tables, the style sheet and the script. All text is escaped.

Each cell of a table has its text and a value for sorting. A click on a heading sorts the table by that column. The
Enter key or the space bar on a heading also sorts the table. Numbers are sorted by size, and missing values always come
last. Without JavaScript the page shows the same tables, but they cannot be sorted.
"""
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TALL = 20
"""A table with at least this many rows has its own scroll bar, so that its head stays visible."""


class Cell(NamedTuple):
    """One cell of a table."""
    markup: str
    """What is shown, escaped."""
    value: str
    """The value by which the cell is sorted; empty for a missing value."""


class Row(NamedTuple):
    """A row and its CSS class."""
    cells: Sequence[Cell]
    style: str = ""


def text(words: Any) -> str:
    """Text with HTML's special characters escaped."""
    return html.escape(str(words), quote=True)


def cell(words: str, value: Any = None) -> Cell:
    """A cell of plain text. The cell is sorted by `value`. Without `value`, the cell is sorted by the number or the
    text that the cell shows."""
    shown = words.replace(",", "")
    return Cell(text(words), str(value) if value is not None else "" if words == "–" else
                shown if _numeric(shown) else words)


def table(head: Sequence[str], groups: Mapping[str, Sequence[Row]], *, label: str, name: int = 0) -> str:
    """A sortable table. A click on a heading moves rows only within their group. The name of a group is printed above
    its rows.

    label: the name of the table for a screen reader.
    name: the column that names a row; this column stays visible if the table is wider than the window.
    A column is aligned right if every cell is a number or missing. A table without rows is left out.
    """
    rows = [row for group in groups.values() for row in group]
    if not rows:
        return ""
    columns = [[row.cells[place].value for row in rows] for place in range(len(head))]
    right = [any(column) and all(_numeric(value) for value in column if value) for column in columns]
    styles = [" ".join([*(["number"] if side else []), *(["name"] if place == name else [])])
              for place, side in enumerate(right)]
    top = "".join(f'<th scope="col"{_class(style)}><button type="button">{text(word)}</button></th>'
                  for word, style in zip(head, styles, strict=True))
    bodies = "".join(_body(words, group, styles, name) for words, group in groups.items() if group)
    tall = " tall" if len(rows) >= TALL else ""
    return (f'<div class="wide{tall}" role="region" tabindex="0" aria-label="{text(label)}"><table>'
            f"<caption>{text(label)}</caption><thead><tr>{top}</tr></thead>{bodies}</table></div>\n")


def plain(head: Sequence[str], rows: Sequence[Sequence[str]], *, label: str) -> str:
    """A table of texts and numbers, printed unchanged."""
    return table(head, {"": [Row([cell(words) for words in row]) for row in rows]}, label=label)


def meanings(words: Mapping[str, str], heading: str = "What the columns mean") -> str:
    """Terms with their meanings, hidden until the reader unfolds them."""
    said = "".join(f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in words.items())
    return folded(heading, f"<dl>{said}</dl>") if said else ""


def folded(heading: str, markup: str) -> str:
    """Markup that is hidden until the reader clicks on its heading."""
    return f"<details><summary>{text(heading)}</summary>{markup}</details>\n" if markup else ""


def note(words: str) -> str:
    """A short comment in small print."""
    return f'<p class="note">{text(words)}</p>\n' if words else ""


def document(title: str, lead: str, sections: Sequence[tuple[str, str, str]], first: str = "") -> str:
    """The page: its title, its lead, the rest of the first screen, and its sections.

    first: markup below the lead.
    sections: (heading, anchor, markup) of each section; empty sections are left out.
    """
    kept = [part for part in sections if part[2]]
    links = "".join(f'<a href="#{anchor}">{text(heading)}</a> ' for heading, anchor, _ in kept)
    body = "".join(f'<section id="{anchor}"><h2>{text(heading)}</h2>\n{markup}</section>\n'
                   for heading, anchor, markup in kept)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n{POLICY}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{text(title)}</title>\n<style>{CSS}</style></head>\n<body><header><h1>{text(title)}</h1>"
            f'<p class="lead">{text(lead)}</p>{first}<nav aria-label="Sections">{links}</nav></header>\n'
            f"<main>{body}</main>\n<script>{SCRIPT}</script></body></html>\n")


def _body(words: str, rows: Sequence[Row], styles: Sequence[str], name: int) -> str:
    above = f'<tr class="group"><th scope="rowgroup" colspan="{len(styles)}"><span>{text(words)}</span></th></tr>' \
        if words else ""
    return f"<tbody>{above}{''.join(_row(row, styles, name) for row in rows)}</tbody>"


def _row(row: Row, styles: Sequence[str], name: int) -> str:
    made = []
    for place, (one, style) in enumerate(zip(row.cells, styles, strict=True)):
        tag, scope = ("th", ' scope="row"') if place == name else ("td", "")
        # a cell whose text is its value does not repeat the value
        value = "" if one.markup == text(one.value) else f' data-value="{text(one.value)}"'
        made.append(f"<{tag}{scope}{_class(style)}{value}>{one.markup}</{tag}>")
    return f"<tr{_class(row.style)}>{''.join(made)}</tr>"


def _class(style: str) -> str:
    return f' class="{style}"' if style else ""


def _numeric(words: str) -> bool:
    try:
        float(words)
    except ValueError:
        return False
    return True


POLICY = ('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
          '\'unsafe-inline\'; script-src \'unsafe-inline\'">\n')
CSS = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #595959; --line: #dcdcdc; --link: #005a8f; --page: #fff;
  --shade: #f4f4f2; --sure: #00694b; --maybe: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --soft: #a8a8a4; --line: #3a3a3a; --link: #7cc0ee;
  --page: #171717; --shade: #232323; --sure: #5fd0a5; --maybe: #e0b060; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; max-width: 78rem; padding: 1.6rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line); }
header + main > section:first-child h2 { margin-top: 1rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, dl, figcaption { max-width: 48rem; }
.lead { margin: 0 0 .6rem; }
header > .lead { font-size: clamp(1rem, .9rem + .5vw, 1.15rem); max-width: 60rem; margin-bottom: 1rem; }
.first { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem 2rem;
  align-items: start; margin-bottom: 1rem; }
.first figure { margin: 0; } .first img { width: 100%; max-width: 31rem; }
.answers h2 { border: 0; margin: 0 0 .4rem; padding: 0; font-size: 1rem; }
.answers dl { margin: 0 0 .6rem; font-size: .925rem; } .answers dt { color: var(--soft); font-size: .825rem; }
.answers dd { margin: 0 0 .5rem; overflow-wrap: anywhere; } .answers dd b { font-weight: 600; }
.answers details dl { display: block; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; }
a { color: var(--link); text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
.note, figcaption, .pm { color: var(--soft); font-size: .875rem; } .pm { font-size: .85em; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem .5rem; font-size: .925rem; }
.card h4 { font-size: 1rem; margin: 0 0 .3rem; }
.card dl { margin: 0; }
.card dt { color: var(--soft); font-size: .825rem; font-weight: 600; margin-top: .45rem; }
.card dd { margin: 0; }
.level { border: 1px solid; border-radius: 3px; padding: 0 .35em; margin-left: .4em; font-weight: 600; }
.clear { color: var(--sure); } .suggestive { color: var(--maybe); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
.tall { max-height: min(85vh, 60rem); overflow: auto; }
.wide:focus-visible, .panels:focus-visible, th button:focus-visible, summary:focus-visible
  { outline: 2px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .3rem .8rem .3rem .3rem; text-align: left; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--line); background: var(--page); font-weight: 400; }
thead th { position: sticky; top: 0; z-index: 2; font-weight: 600; vertical-align: bottom; white-space: normal;
  border-bottom: 1.5px solid var(--ink); }
.number { text-align: right; padding: .3rem .3rem .3rem .6rem; }
.number + :not(.number) { padding-left: 1.1rem; }
.name { position: sticky; left: 0; z-index: 1; } thead .name { z-index: 3; }
.group th { color: var(--soft); font-weight: 600; padding-top: .9rem; } .group span { position: sticky; left: .3rem; }
tr.dense > * { background: var(--shade); }
th button { all: unset; cursor: pointer; } th button:hover { text-decoration: underline dotted; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
u { text-underline-offset: .2em; }
figure { margin: 0 0 2rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; background: #fff; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); width: max-content; max-width: 100%; }
details dl { display: grid; grid-template-columns: fit-content(14rem) 1fr; gap: .25rem 1.2rem; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { details dl { display: block; } details dt { margin-top: .5rem; } }
@media screen and (max-width: 40rem) { .panels { overflow-x: auto; } .panels img { max-width: none; width: 42rem; } }
pre { overflow: auto; max-height: 40rem; background: var(--shade); padding: .8rem 1rem; font-size: .8rem;
  line-height: 1.45; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --link: #000; --page: #fff;
    --shade: #f2f2f2; --sure: #000; --maybe: #000; }
  @page { size: A4 landscape; margin: 12mm; }
  html { font-size: 10px; } body { max-width: none; padding: 0; font-size: 10px; }
  p, dl, figcaption { max-width: none; }
  nav { display: none; } summary::marker { content: ""; }
  table { font-size: 8.5px; } th, td { padding: .1rem .3rem .1rem 0; } .number { padding: .1rem .15rem .1rem .3rem; }
  .wide, .tall, pre { overflow: visible; max-height: none; } thead th, .name { position: static; }
  pre { white-space: pre-wrap; } th, td { white-space: normal; } td.number { white-space: nowrap; }
  figure, tr, .card { break-inside: avoid; } h2, h3, h4, summary { break-after: avoid; }
  img { max-height: 72mm; width: auto; } }
"""
SCRIPT = """
const value = cell => cell.dataset.value ?? cell.textContent;
const compare = (a, b, sign) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
};
document.querySelectorAll("table").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter(row => row.className !== "group");
      body.append(...rows.sort((one, other) => compare(value(one.cells[place]), value(other.cells[place]), sign)));
    }
  }));
});
// folded parts are opened for printing
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach(part => part.open = true);
});
addEventListener("afterprint", () => opened.forEach(part => part.open = false));
"""
