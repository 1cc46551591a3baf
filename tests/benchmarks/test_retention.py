"""The comparison on real tasks, on a pico model and made-up sets: plan, rows, tables, paired tests, resumption."""
import json

import numpy as np
import pandas as pd
import pytest

from kdp_core.base import store
from kdp_core.methods import METHODS, check_options
from tests import pico
from tests.benchmarks.command import FOLDER, load, write_project

EXAMPLE = METHODS["kdp_narrow"].example
QUICK = {"kdp_narrow_closed": {**EXAMPLE, "compose": {**EXAMPLE["compose"], "epochs": 0}}}
COLUMNS = ["model", "method", "group", "ratio", "seed", "params_removed", "acc", "acc_stderr",
           "acc_above_chance_retained", "ppl_ratio_news", "ppl_ratio_wiki", "ppl_ratio_web", "fit_seconds", "peak_gib",
           "speedup_prefill", "speedup_decode"]


def write_sets(folder, sources):
    """Calibration and evaluation files in the fields of the real sets, from pico text."""
    lines = pico.documents(60)
    rows = {"text": lines, "page": lines, "article": lines}
    for which in ("calib", "eval"):
        (folder / which).mkdir(parents=True)
    for source in sources.values():
        for name, _ in source.files:
            made = [{**{key: one[n] for key, one in rows.items()}, "passage": line, "question": line, "goal": line,
                     "sol1": line, "choices": line, "premise": line, "hypothesis": line}
                    for n, line in enumerate(lines)]
            write(folder / f"calib/{name}.jsonl", made)
    write(folder / "eval/wikitext2_test.jsonl", [{"page": line} for line in lines])
    write(folder / "eval/c4_sample.jsonl", [{"text": line} for line in lines])
    write(folder / "eval/piqa_val.jsonl", [{"goal": one[:20], "sol1": one[20:40], "sol2": one[40:60], "label": n % 2}
                                           for n, one in enumerate(lines)])
    write(folder / "eval/lambada_openai_test.jsonl", [{"text": one} for one in lines])


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    module, patch = load("retention"), pytest.MonkeyPatch()
    root = write_project(tmp_path_factory.mktemp("root"))
    write_sets(root / "sets", module.text.MIX)
    patch.setattr(module.embedded, "ROOT", root)
    patch.setattr(module, "MODELS", {"pico": "config.yaml"})
    patch.setattr(module, "TASKS", {"piqa": 12, "lambada_openai": 8})
    patch.setattr(module.text, "LENGTH", 24)
    patch.setattr(module, "VARIANTS", {
        name: variant._replace(options=QUICK.get(name, dict(METHODS[variant.method].example)))
        for name, variant in module.VARIANTS.items()})
    yield module, root
    patch.undo()


@pytest.fixture(scope="module")
def done(benchmark, tmp_path_factory):
    module, root = benchmark
    out = tmp_path_factory.mktemp("out")
    given = ["--data", str(root / "sets"), "--out", str(out), "--models", "pico", "--rows", "kdp_narrow_closed",
             "shortgpt", "shortgpt+lora", "remove", "remove@68", "--ratios", "0.2", "--sequences", "34", "--threads",
             "1", "--alone"]
    # every task counts, since no pico model is above chance
    patch = pytest.MonkeyPatch()
    patch.setattr(module.tables, "counted_tasks", lambda dense: list(dense["outcomes"]))
    yield module, module.main(given), out, given
    patch.undo()


def test_options_are_those_of_the_methods():
    for variant in load("retention").VARIANTS.values():
        check_options(variant.method, variant.options)


def test_the_table_has_the_promised_columns_and_a_row_for_each(done):
    _, frame, out, _ = done
    assert list(frame)[:len(COLUMNS)] == COLUMNS
    assert set(frame["method"]) == {"dense", "kdp_narrow_closed", "shortgpt", "shortgpt+lora", "remove", "remove@68"}
    assert frame.loc[frame["group"] == "finetuned", "method"].tolist() == ["shortgpt+lora"]
    pruned = frame[frame["ratio"] == 0.2]
    assert pruned["params_removed"].between(0.12, 0.28).all() and (pruned["fit_seconds"] >= 0).all()
    assert frame.loc[frame["method"] == "dense", "ppl_ratio_news"].item() == 1
    assert pd.read_csv(out / "retention.csv")["method"].tolist() == frame["method"].tolist()


def test_accuracies_and_their_share_above_chance_are_those_of_the_items(done):
    _, frame, out, _ = done
    dense = json.loads((out / "retention/pico/dense.json").read_text())
    row = json.loads((out / "retention/pico/rows/shortgpt-r0.2-seed0.json").read_text())
    assert {task: len(values) for task, values in row["outcomes"].items()} == {"piqa": 12, "lambada_openai": 8}
    acc, full = (np.mean([np.mean(values) for values in one["outcomes"].values()]) for one in (row, dense))
    found = frame[frame["method"] == "shortgpt"].iloc[0]
    assert found["acc"] == pytest.approx(100 * acc)
    assert found["acc_above_chance_retained"] == pytest.approx(100 * (acc - 0.25) / (full - 0.25))


def test_each_neighbour_is_compared_with_the_best_of_ours_item_by_item(done):
    _, frame, out, _ = done
    pairs = pd.read_csv(out / "retention_tests.csv").set_index("method")
    assert set(pairs.index) == {"shortgpt", "remove", "remove@68"} and set(pairs["ours"]) == {"kdp_narrow_closed"}
    acc = frame.set_index("method")["acc"]
    for name, pair in pairs.iterrows():
        assert pair["difference"] == pytest.approx(acc["kdp_narrow_closed"] - acc[name], abs=1e-4)
    assert (pairs["p_holm"] >= pairs["p"]).all()


def test_states_and_search_may_run_alone_and_an_unknown_peak_stays_unknown(done, tmp_path, monkeypatch):
    module, _, _, given = done
    monkeypatch.setattr(module.protocol, "peak_gib", lambda: float("nan"))
    words = [*given, "--out", str(tmp_path), "--rows", "kdp_narrow_closed", "--alone"]
    module.main([*words, "states"])
    at, rows = tmp_path / "retention/pico/seed0", tmp_path / "retention/pico/rows"
    assert (at / "similarity.safetensors").exists() and not list(at.glob("search-*.json"))
    module.main([*words, "search"])
    assert not list(rows.glob("*.json")) and len(list(at.glob("search-*.json"))) == 1
    module.main([*words, "row"])
    assert json.loads((rows / "kdp_narrow_closed-r0.2-seed0.json").read_text())["peak_gib"] is None


def test_no_row_is_measured_twice_and_the_plan_says_what_is_left(done, monkeypatch, capsys):
    module, frame, _, given = done
    monkeypatch.setattr(module, "measure", lambda *args: pytest.fail("measured again"))
    again = module.main(given)
    assert again["acc"].tolist() == pytest.approx(frame["acc"].tolist())
    assert "pico: 0 rows to measure" in capsys.readouterr().out
    module.main([*given, "--ratios", "0.2", "0.3", "--plan"])
    assert "pico: 5 rows to measure" in capsys.readouterr().out


def test_rows_of_earlier_runs_enter_the_tables_and_are_not_measured_again(done, tmp_path, monkeypatch):
    module, frame, out, given = done
    for name in ("measure", "score"):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("measured again"))
    rows = out / "retention_rows.jsonl"
    again = module.main([*given, "--out", str(tmp_path), "--earlier", str(rows)])
    assert (tmp_path / "retention_rows.jsonl").read_text() == rows.read_text()
    assert again.to_csv() == frame.to_csv()
    assert (tmp_path / "retention_tests.csv").read_text() == (out / "retention_tests.csv").read_text()


def test_models_that_only_an_earlier_run_measured_stay_in_the_tables(done, tmp_path):
    module, frame, out, given = done
    rows = tmp_path / "earlier.jsonl"
    own = (out / "retention_rows.jsonl").read_text()
    rows.write_text(own.replace('"model": "pico"', '"model": "other"') + own)
    again = module.main([*given, "--out", str(tmp_path), "--earlier", str(rows)])
    assert again["model"].tolist() == ["other"] * len(frame) + ["pico"] * len(frame)
    assert again["acc"].tolist() == 2 * frame["acc"].tolist()
    assert set(pd.read_csv(tmp_path / "retention_tests.csv")["model"]) == {"other", "pico"}
    assert (tmp_path / "retention_rows.jsonl").read_text() == rows.read_text()


def test_rows_of_a_model_whose_dense_row_is_missing_are_refused(done, tmp_path):
    module, _, out, given = done
    rows = tmp_path / "earlier.jsonl"
    own = (out / "retention_rows.jsonl").read_text().replace('"model": "pico"', '"model": "other"')
    rows.write_text("".join(line for line in own.splitlines(keepends=True) if '"method": "dense"' not in line))
    with pytest.raises(SystemExit, match="has no row of the dense model other, so its pruned"):
        module.main([*given, "--earlier", str(rows)])


def test_rows_of_other_items_are_refused(done):
    module, _, out, given = done
    rows = out / "retention_rows.jsonl"
    with pytest.raises(SystemExit, match="was measured on 8 lambada_openai items, and this run has 6; set --items"):
        module.main([*given, "--items", "6", "--earlier", str(rows)])


def test_a_row_may_have_its_own_number_of_calibration_sequences(done, tmp_path, capsys):
    module, frame, out, given = done
    assert frame.set_index("method")["sequences"].loc[["remove", "remove@68"]].tolist() == [34, 68]
    assert [len(store.read(out / f"retention/pico/{name}/tokens.safetensors").ids_ST)
            for name in ("seed0", "seed0-68")] == [34, 68]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((out / "retention_rows.jsonl").read_text().replace('"sequences": 68', '"sequences": 67'))
    with pytest.raises(SystemExit, match="remove@68 was measured on 67 calibration sequences, and this run has 68;"):
        module.main([*given, "--earlier", str(rows)])
    with pytest.raises(SystemExit):
        module.main([*given, "--rows", "remov@68"])
    assert "there is no row remov@68; take one of kdp_narrow, " in capsys.readouterr().err


def test_a_ratio_out_of_reach_is_a_row_with_its_reason(done):
    module, _, _, given = done
    frame = module.main([*given, "--ratios", "0.9", "--rows", "kdp_narrow_closed"])
    assert "too high" in frame.set_index("ratio").loc[0.9, "refused"]


def test_a_task_counts_if_the_dense_model_is_four_standard_errors_above_chance():
    module = load("rows/retention")
    outcomes = {task: [1.0] * right + [0.0] * (100 - right)
                for task, right in (("piqa", 70), ("arc_easy", 30), ("lambada_openai", 20))}
    assert module.counted_tasks({"outcomes": outcomes}) == ["piqa", "lambada_openai"]


def test_a_missing_folder_of_sets_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("retention").arguments(["--data", str(tmp_path / "none")])
    assert "it has no folders calib/ and eval/" in capsys.readouterr().err


@pytest.mark.parametrize("name", load("pages/retention").PLACES)
def test_the_pages_have_the_numbers_of_the_data(name):
    text = (FOLDER.parent / name).read_text(encoding="utf-8")
    page = load("pages/retention")
    assert page.written(text, page.tables(name)) == text, "run python benchmarks/pages/retention.py"


def test_the_data_have_the_columns_of_the_command_and_rows_of_ours():
    frame = pd.read_csv(FOLDER.parent / "docs/data/retention.csv")
    assert set(COLUMNS) <= set(frame) and frame["method"].str.startswith("kdp_").any()
    pruned = frame[frame["acc"].notna() & (frame["ratio"] > 0)]
    assert ((pruned["params_removed"] - pruned["ratio"]).abs() < 0.02).all(), "ratios are matched"


def test_the_data_are_the_tables_of_their_rows(tmp_path):
    module, data = load("rows/retention"), FOLDER.parent / "docs/data"
    rows = module.read_rows(data / "retention_rows.jsonl")
    pruned = {dense["model"]: [row for row in rows if row["model"] == dense["model"] and row["ratio"]]
              for dense in rows if not dense["ratio"]}
    module.write_tables({dense["model"]: (dense, pruned[dense["model"]]) for dense in rows if not dense["ratio"]},
                        tmp_path)
    for name in module.TABLES:
        assert (tmp_path / name).read_text() == (data / name).read_text(), "copy all files of one run"


def test_variants_of_ours_are_compared_with_each_other_and_with_the_best_other_on_each_task():
    module = load("rows/retention")
    dense = {"outcomes": {"piqa": [1.0] * 80 + [0.0] * 20, "lambada_openai": [1.0] * 40 + [0.0] * 60}}
    rows = [{"method": name, "ratio": 0.25, "seed": 0, "group": "structured",
             "outcomes": {"piqa": [1.0] * right + [0.0] * (100 - right), "lambada_openai": [0.0] * 100}}
            for name, right in (("shortgpt", 55), ("linear", 50), ("kdp_narrow", 70), ("kdp_narrow_head", 76))]
    pairs = module.variant_pairs("pico", rows, dense)
    best = {(one["method"], one["task"]): one["difference"] for one in pairs if one["other"] == "shortgpt"}
    assert best["kdp_narrow", "piqa"] == pytest.approx(15) and best["kdp_narrow_head", "all"] == pytest.approx(10.5)
    assert len(best) == 6 and len(pairs) == 9
    found = {one["task"]: one for one in pairs if one["other"] != "shortgpt"}
    assert set(found) == {"piqa", "lambada_openai", "all"}
    assert {(one["method"], one["other"]) for one in found.values()} == {("kdp_narrow", "kdp_narrow_head")}
    assert [found[task]["difference"] for task in ("piqa", "lambada_openai", "all")] == pytest.approx([-6, 0, -3])
    # six items of 100 differ, all in one direction: se = 100 sqrt(0.06 0.94 / 99), mid p = 2 / 2^7
    assert found["piqa"]["stderr"] == pytest.approx(100 * (0.06 * 0.94 / 99) ** 0.5)
    assert found["piqa"]["p"] == pytest.approx(2 / 2**7)
