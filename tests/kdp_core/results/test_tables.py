"""Tables as text: groups, marks, escaping, notes."""
import io
import re

import pandas as pd
import pytest

from kdp_core.results import columns, marks, tables
from kdp_core.results.summary import summarise
from tests.kdp_core import points


@pytest.fixture(scope="module")
def summary():
    return summarise(points.grid())


def test_models_of_zeros_stand_apart_and_compete_among_themselves():
    sparse = [point._replace(facts=point.facts._replace(params_zeroed=20_000_000)) for point in (
        points.pruned("wanda", points.scores(15.0, 0.6, 0.8)),
        points.pruned("sparsegpt", points.scores(12.0, 0.7, 0.9)))]
    frame = summarise([points.dense(), sparse[0], *points.grid()[2:4], sparse[1]])
    assert frame["method"].tolist() == ["dense", "remove", "lossy", "wanda", "sparsegpt"]
    assert frame["params_zeroed"].tolist()[3:] == [0.2, 0.2]
    marked = marks.marks(frame, "acc")
    assert marked[4] == "best" and marked[3] == "second" and sorted(marked.values()) == sorted(["best", "second"] * 2)
    assert "wanda (zeros)" in tables.render(frame, "md") and "wanda (zeros)" in tables.render(frame, "tex")


def test_csv_comes_back_whole(summary):
    back = pd.read_csv(io.StringIO(tables.render(summary, "csv")), keep_default_na=True)
    assert list(back.columns) == list(columns.SUMMARY)
    assert back["acc"].tolist() == summary["acc"].tolist()


def test_markdown(summary):
    lines = tables.render(summary, "md").splitlines()
    assert len(lines) == 2 + len(summary)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| 20 | kdp | 19.0 | 4 | **55.0** ± 0.7 |" in lines[3]
    assert lines[4].startswith("|  |  | remove |") and "<u>40.0</u>" in lines[4]
    assert "K max" not in lines[0] and "Calibration" not in lines[0]


def test_varying_keys_get_a_column():
    more = [*points.grid(), points.pruned("kdp", points.scores(25.0, 0.45, 0.65), k_max=5)]
    assert "| K max |" in tables.render(summarise(more), "md").splitlines()[0]


def test_latex_escapes_and_balances():
    odd = "a_b&c%d#e$f{g}~^\\"
    frame = summarise([points.dense(odd), points.pruned("kdp_m256", points.scores(25.0, 0.4, 0.6), model=odd)])
    text = tables.render(frame, "tex", caption="50 % & more", label="tab:x")
    assert r"a\_b\&c\%d\#e\$f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert r"\caption{50 \% \& more}" in text and r"\label{tab:x}" in text and r"kdp\_m256" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(columns.MAIN) + 3 - 1}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_wide_tables_and_notes(summary):
    note = "p < 0.05 & more_\u2020"
    text = tables.render(summary, "tex", caption="Wide", wide=True, note=note)
    lines = text.splitlines()
    assert lines[0] == r"% needs \usepackage{booktabs,graphicx}" and lines[1] == r"\begin{table*}[t]"
    assert text.count(r"\begin{") == text.count(r"\end{") == 2 and r"\end{tabular}}" in lines
    assert r"p \textless{} 0.05 \& more\_\textdagger{}" in text
    bare = re.sub(r"\\[{}%]", "", text)
    assert bare.count("{") == bare.count("}")
    assert tables.render(summary, "md", note="a_b").endswith("|\n\na\\_b\n")


def test_refusals(summary):
    with pytest.raises(columns.TableError, match="unknown table format 'xls'"):
        tables.render(summary, "xls")
    with pytest.raises(columns.TableError, match="unknown column 'beauty'"):
        tables.render(summary, "md", columns=["beauty"])
