"""The paper's tables from made-up scores: which rows and columns stand where, what is left out and why."""
import io
import re
import subprocess
import sys

import pandas as pd
import pytest

from kdp_core.base.measurements import Score, Scores
from kdp_core.results import compare, marks, paper
from kdp_core.results.ablations import Ablation
from kdp_core.results.compare import Entry, Outcomes
from kdp_core.results.summary import summarise, tidy
from tests.kdp_core import points


def scores(ppl=20.0, acc=0.5, rouge=0.2, group=0.4):
    """Tasks out of the paper's order, one group with a member, two metrics of ROUGE."""
    return Scores([Score("wikitext", "ppl", ppl, 0.2, 39, False, "ppl"),
                   Score("c4", "ppl", 2 * ppl, 0.4, 39, False, "ppl"),
                   Score("xsum", "rouge1", rouge, 0.01, 50, True, "share"),
                   Score("xsum", "rouge1,strict", 0.9, 0.01, 50, True, "share"),
                   Score("arc_easy", "acc", acc, 0.02, 64, True, "share"),
                   Score("cmmlu", "acc", group, 0.02, 64, True, "share"),
                   Score("cmmlu/law", "acc", 0.99, 0.02, 64, True, "share"),
                   Score("mmlu", "acc", acc, 0.02, 64, True, "share"),
                   Score("hellaswag", "acc", 0.11, 0.02, 64, True, "share"),
                   Score("hellaswag", "acc_norm", acc, 0.02, 64, True, "share")], 1.0, {})


def made(*more, **known):
    grid = [points.dense(scores=scores(20.0, 0.6, 0.3, 0.5)), points.pruned("kdp", scores(25.0)),
            points.pruned("remove", scores(40.0, 0.3), blocks=((5, 6), (8, 11)))._replace(fit_seconds=None),
            points.pruned("kdp_tuned", scores(24.0))._replace(finetuned=True), *more]
    return paper.Run(**{"summary": summarise(grid), "scores": tidy(grid),
                        "families": {"tiny": "llama", "opt": "opt"}, "calibrations": {"news": (128, 16384)},
                        "ablations": {}} | known)


def opt():
    return [points.dense("opt", scores=scores(15.0)), points.pruned("kdp", scores(30.0), model="opt")]


def test_table_1_has_tasks_in_the_papers_order_and_each_group_once():
    table = paper.build(made())[1]
    assert table.columns == ["params_removed", "hellaswag", "mmlu", "cmmlu", "arc_easy", "acc", "rp"]
    assert table.frame["hellaswag"].tolist() == [0.6, 0.5, 0.3, 0.5]  # acc_norm, not acc
    assert table.frame["cmmlu_stderr"].tolist() == [0.02] * 4
    text = paper.render(table, "md")
    assert "| Model | Target (%) | Method | Removed (%) | hellaswag (%) | mmlu (%) |" in text.splitlines()[0]
    assert "| kdp | 19.0 | <u>50.0</u> ± 2.0 |" in text and "kdp_tuned†".replace("_", r"\_") in text
    assert marks.NOTE.split(".")[0] in text


def test_table_2_has_texts_rouge_and_both_retained_performances():
    table = paper.build(made())[2]
    assert table.columns == ["params_removed", "wikitext", "c4", "xsum", "rp_ppl", "rp_rouge"]
    kdp = table.frame[table.frame["method"] == "kdp"].iloc[0]
    assert kdp["xsum"] == 0.2 and kdp["rp_rouge"] == pytest.approx(100 * 0.2 / 0.3)
    assert kdp["rp_rouge_stderr"] == pytest.approx(100 * 0.01 / 0.3)
    assert kdp["rp_ppl"] == pytest.approx(80.0)
    # two texts: their mean of ratios is not what perplexities are tested by
    assert table.known["rp_ppl"].test == ("", "")


def test_opt_models_have_tables_of_their_own():
    built = paper.build(made(*opt()))
    assert set(built[1].frame["model"]) == set(built[2].frame["model"]) == {"tiny"}
    assert set(built[6].frame["model"]) == set(built[7].frame["model"]) == {"opt"}
    assert not {6, 7} & set(paper.build(made()))


def test_table_5_names_the_layers_that_are_gone():
    table = paper.build(made())[5]
    # half-open blocks (5, 8), (8, 11) and (5, 6)
    assert table.frame["layers"].tolist() == ["[5,7], [8,10]", "[5], [8,10]", "[5,7], [8,10]"]


def test_table_8_tells_what_was_trained_on_how_much():
    frame = paper.build(made())[8].frame.set_index("method")
    assert frame["trained"].to_dict() == {"kdp": "yes", "remove": "no", "kdp_tuned": "yes"}
    assert frame["tuned"].to_dict() == {"kdp": "no", "remove": "no", "kdp_tuned": "yes"}
    assert set(frame["sequences"]) == {128} and set(frame["tokens"]) == {16384}


def study(number):
    keys = {"model": "tiny", "calib": "news", "ratio": 0.2, "k_max": 3}
    return {number: Ablation("linearisation", "Linear maps", ["variant"], ["ppl", "hellaswag"],
                             [keys | {"method": name} for name in ("kdp", "remove")], {}, {})}


def test_an_ablation_is_the_table_that_it_says():
    built = paper.build(made(ablations=study(3)))
    assert built[3].columns == ["params_removed", "ppl", "hellaswag"]
    assert built[3].frame["method"].tolist() == ["dense", "kdp", "remove"] and built[3].caption == "Linear maps."
    assert not {4, 9, 11} & set(built)


def test_the_index_links_what_there_is_and_says_what_is_missing():
    built = paper.build(made(ablations=study(3)))
    text = paper.index(built, {number: f"measured/table{number}.md" for number in built} |
                       {10: "table10.md", 12: "table12.md"})
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) == 12 and lines[0].startswith("- [Table 1](measured/table1.md): Accuracy")
    assert lines[2].startswith("- [Table 3](measured/table3.md): Linear maps.") and "(table10.md)" in lines[9]
    assert lines[3] == "- Table 4: left out; it needs an ablation with `paper: 4`; configs/ablations.yaml has one."
    assert "an OPT model under models" in lines[5]
    assert set(paper.NEEDS) == set(paper.TABLES) == set(range(1, 13)) - {10, 12}


def test_nothing_measured_makes_no_tables():
    run = made()
    empty = run._replace(summary=run.summary.iloc[:1], scores=run.scores[run.scores["task"] == "efficiency"])
    assert paper.build(empty) == {}


def test_every_format_of_every_table():
    run = made(*opt(), ablations=study(11))
    tested = compare.compare([])
    for number, table in paper.build(run).items():
        raw = pd.read_csv(io.StringIO(paper.render(table, "csv")))
        assert len(raw) == len(table.frame) and {"model", "method", table.columns[-1]} <= set(raw)
        text = paper.render(table, "tex", tested)
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1 and len(body) == len(table.frame) + 1
        assert text.count(r"\begin{") == text.count(r"\end{") and rf"\label{{tab:paper-{number}}}" in text
        assert not re.search(r"(?<!\\)[_#]", text.replace("tab:paper", "")) and "nan" not in text
        assert len({line.count(" | ") for line in paper.render(table, "md").splitlines() if line[:1] == "|"}) == 1


def test_task_columns_are_marked_by_the_tests_of_the_task():
    def entry(method, right):
        values = pd.Series([1.0] * right + [0.0] * (64 - right)).to_numpy()
        ids = [f"hellaswag:{i}:h" for i in range(64)]
        return Entry(("tiny", "news", method, 0.2, 3), False, [
            Outcomes("hellaswag", "acc_norm", "acc", ids, values, values * 0 + 1)])
    tested = compare.compare([entry("kdp", 33), entry("remove", 20), entry("kdp_tuned", 32)])
    table = paper.build(made())[1]
    lines = paper.render(table, "md", tested).splitlines()
    # kdp and kdp_tuned differ in one item of 64
    assert [line.split(" | ")[4][:3] for line in lines[3:6]] == ["<u>", "30.", "<u>"]


def test_no_model_is_loaded_for_the_tables():
    code = ("import sys; import kdp_core.results.paper, kdp_core.results.compare; "
            "sys.exit(bool({'transformers', 'lm_eval', 'datasets'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
