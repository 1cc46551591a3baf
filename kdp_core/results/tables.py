"""Tables as text: CSV, Markdown, or LaTeX with booktabs."""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from kdp_core.results.columns import COLUMNS, DENSE, MAIN, RELATIVE, Column, TableError, heading, number
from kdp_core.results.marks import marks

KEY_HEADINGS = {"model": "Model", "ratio": "Target (%)", "method": "Method", "calib": "Calibration", "k_max": "K max"}
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
       "†": r"\textdagger{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
       **{character: "\\" + character for character in "&%$#_{}"}}
"""Characters that LaTeX cannot print directly, with their replacements."""


def render(frame: pd.DataFrame, format: Literal["csv", "md", "tex"], *, columns: Sequence[str] = MAIN,
           caption: str = "", label: str = "", known: Mapping[str, Column] = COLUMNS,
           comparisons: pd.DataFrame | None = None, note: str = "", wide: bool = False) -> str:
    """A summary as text: CSV (all columns, full precision), a Markdown table, or a LaTeX booktabs table.

    Rows are grouped by model and ratio; calib and k_max are printed only if they vary. In each group, the best values
    are bold and the second-best values are underlined. The function `marks` selects the bold and the underlined values
    by the tests in `comparisons` (compare.compare). `caption` and `label` are printed only in LaTeX, which scales a
    `wide` table to the page. `note` is printed below the table, and `known` describes how each column is printed.
    Raises TableError for an unknown format or column.
    """
    if format == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    if format not in ("md", "tex"):
        raise TableError(f"unknown table format {format!r}; choose csv, md or tex")
    unknown = [name for name in columns if name not in known or name not in frame]
    if unknown:
        raise TableError(f"unknown column {unknown[0]!r}; choose among {', '.join(known)}")
    keys = shown_keys(frame)
    head = [escape(text, format)
            for text in [*(KEY_HEADINGS[key] for key in keys), *(heading(known[c]) for c in columns)]]
    body = _body(frame, keys, columns, format, known, comparisons)
    return grid(head, body, format, keys=len(keys), caption=caption, label=label, note=note, wide=wide)


def grid(head: Sequence[str], body: Sequence[tuple[Any, Sequence[str]]], format: Literal["md", "tex"], *,
         keys: int | None, caption: str = "", label: str = "", note: str = "", wide: bool = False) -> str:
    """A Markdown or LaTeX table. `body` has a pair (group, cells) for each row, and the cells are already escaped.

    The first `keys` columns are aligned left and the other columns right. If `keys` is None, the Markdown viewer
    chooses the alignment. The group of a row is a tuple. In LaTeX, a line separates neighbouring groups whose first
    elements differ, and a space separates all other neighbouring groups.
    """
    if format == "tex":
        return _tex(head, body, keys or 0, caption, label, note, wide)
    rule = "|" + "---|" * len(head) if keys is None else _line([":--"] * keys + ["--:"] * (len(head) - keys))
    lines = [f"{line}\n" for line in [_line(head), rule, *(_line(cells) for _, cells in body)]]
    return "".join(lines) + (f"\n{escape(note, format)}\n" if note else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown_keys(frame: pd.DataFrame) -> list[str]:
    """The keys that are printed as columns. Model, ratio and method are always printed. The keys calib and k_max are
    printed only if they differ between pruned rows."""
    pruned = frame[frame["method"] != DENSE]
    return ["model", "ratio", "method", *(key for key in ("calib", "k_max") if pruned[key].nunique() > 1)]


def key_text(key: str, row: Any) -> str:
    """The text of a row's key. A ratio is printed in percent. For the dense model, the keys calib, k_max and ratio are
    printed as a dash."""
    if key == "ratio":
        return "–" if row["method"] == DENSE else f"{100 * row['ratio']:g}"
    if row["method"] == DENSE and key in ("calib", "k_max"):
        return "–"
    if key != "method":
        return str(row[key])
    return row[key] + ("†" if row.get("finetuned", False) else "") + (" (zeros)" if row["params_zeroed"] > 0 else "")


def _body(frame: pd.DataFrame, keys: Sequence[str], columns: Sequence[str], format: str,
          known: Mapping[str, Column], comparisons: pd.DataFrame | None) -> list[tuple[tuple[Any, ...], list[str]]]:
    """A pair (group, cells) for each row of the table. A model or ratio that is the same as in the row above is left
    blank."""
    wrap = _wrap_md if format == "md" else _wrap_tex
    found = {name: marks(frame, name, known, comparisons) for name in columns}
    rows, above = [], ("", "", False)
    for label, row in frame.iterrows():
        group = (row["model"], key_text("ratio", row), row["params_zeroed"] > 0)
        cells = [escape(key_text(key, row), format) for key in keys]
        if group[0] == above[0]:
            cells[0] = ""
            cells[1] = "" if group[:2] == above[:2] else cells[1]
        for name in columns:
            column = known[name]
            text = wrap(escape(number(column, row[name]), format), found[name].get(label, ""))
            error = row[column.stderr] if column.stderr and name not in RELATIVE else math.nan
            cells.append(text + ("" if pd.isna(error) else _error(number(column, error), format)))
        rows.append((group, cells))
        above = group
    return rows


def _error(text: str, format: str) -> str:
    return f" ± {text}" if format == "md" else rf" {{\scriptsize$\pm$ {text}}}"


def _wrap_md(text: str, mark: str) -> str:
    return {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(mark, text)


def _wrap_tex(text: str, mark: str) -> str:
    return {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}.get(mark, text)


def _tex(head: Sequence[str], body: Sequence[tuple[Any, Sequence[str]]], keys: int, caption: str, label: str,
         note: str, wide: bool) -> str:
    kind, packages = ("table*", "booktabs,graphicx") if wide else ("table", "booktabs")
    lines = [rf"% needs \usepackage{{{packages}}}", rf"\begin{{{kind}}}[t]", r"\centering", r"\small"]
    lines += [rf"\caption{{{escape(caption, 'tex')}}}"] if caption else []
    lines += [rf"\label{{{label}}}"] if label else []
    lines += [r"\resizebox{\textwidth}{!}{%"] if wide else []
    lines += [rf"\begin{{tabular}}{{{'l' * keys}{'r' * (len(head) - keys)}}}", r"\toprule",
              " & ".join(head) + r" \\", r"\midrule"]
    for place, (group, cells) in enumerate(body):
        if place and group != body[place - 1][0]:
            lines.append(r"\midrule" if group[0] != body[place - 1][0][0] else r"\addlinespace")
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}" + "}" * wide]
    lines += [rf"\par\smallskip{{\footnotesize {escape(note, 'tex')}\par}}"] if note else []
    return "\n".join([*lines, rf"\end{{{kind}}}", ""])


def escape(text: str, format: Literal["md", "tex"]) -> str:
    """The text with the special characters of the format escaped."""
    if format == "tex":
        return "".join(TEX.get(character, character) for character in text)
    for character in "\\|*_<`":
        text = text.replace(character, "\\" + character)
    return text
