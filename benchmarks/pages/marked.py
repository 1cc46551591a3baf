"""Replaces tables in a page. Each table is between two marker lines: `<!-- NAME -->` and `<!-- end of NAME -->`."""
import re
from collections.abc import Mapping


def written(page: str, tables: Mapping[str, str]) -> str:
    """The page with the given tables; `tables` maps the name in the marker lines to the new table.

    A page without the two marker lines of a table raises ValueError.
    """
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not marked.search(page):
            raise ValueError(f"the page has no lines '<!-- {name} -->' and '<!-- end of {name} -->'; put them around "
                             "the table")
        page = marked.sub(lambda found, table=table: found[1] + table + found[2], page)
    return page
