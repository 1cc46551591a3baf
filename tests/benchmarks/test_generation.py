"""Statistics beside measured generation, on a pico model and made-up sets: plan, rows, tables, resumption."""
import json

import pandas as pd
import pytest

from kdp_core.methods import METHODS, check_options
from kdp_core.study import expect
from tests import pico
from tests.benchmarks.command import load, write_project
from tests.benchmarks.test_retention import write, write_sets

ROWS = ("shortgpt", "magnitude", "deepest")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    module, patch = load("generation"), pytest.MonkeyPatch()
    root = write_project(tmp_path_factory.mktemp("root"))
    write_sets(root / "sets", module.text.MIX)
    write(root / "sets/eval/xsum_dev.jsonl", [{"document": one, "summary": one[:40]} for one in pico.documents(8)])
    patch.setattr(module.embedded, "ROOT", root)
    patch.setattr(module.retention, "MODELS", {"pico": "config.yaml"})
    patch.setattr(module.text, "LENGTH", 24)
    patch.setattr(module, "SIZES", module.Sizes(3, 3, 12, 6, 4, 99, 2, 12, 6))
    patch.setattr(module, "VARIANTS", {name: variant._replace(options=dict(METHODS[variant.method].example))
                                       for name, variant in module.VARIANTS.items()})
    yield module, root
    patch.undo()


@pytest.fixture(scope="module")
def done(benchmark, tmp_path_factory):
    module, root = benchmark
    out = tmp_path_factory.mktemp("out")
    given = ["--data", str(root / "sets"), "--out", str(out), "--models", "pico", "--rows", *ROWS, "--ratios", "0.2",
             "--sequences", "34", "--choices", "3", "--tasks", "piqa", "--threads", "1"]
    return module, module.main(given), out, given


def test_options_are_those_of_the_methods():
    for variant in load("generation").VARIANTS.values():
        check_options(variant.method, variant.options)


def test_each_row_has_statistics_generation_and_losses(done):
    _, frame, out, _ = done
    assert set(frame["method"]) == {"dense", *ROWS}
    pruned, dense = frame[frame["ratio"] > 0], frame[frame["ratio"] == 0].iloc[0]
    assert (pruned["kl"] > 0).all() and pruned["loss_quality"].between(0, 1).all()
    assert (pruned["loss_agreement"] == 1 - pruned["agreement"]).all()
    assert dense["loss_quality"] == 0 and dense["agreement"] == 1
    again = pd.read_csv(out / "generation.csv")
    assert again["method"].tolist() == frame["method"].tolist()
    assert set(expect.FEATURES) <= set(again) and "text" not in again


def test_the_choices_have_a_row_for_each_model_and_task(done):
    _, _, out, _ = done
    table = pd.read_csv(out / "generation_choices.csv")
    assert set(table["method"]) == set(ROWS) and set(table["task"]) == {"piqa"} and set(table["items"]) == {3}
    assert (table["drop"] - (table["acc_dense"] - table["acc"])).abs().max() < 1e-9


def test_no_row_is_measured_twice_and_the_plan_says_what_is_left(done, monkeypatch, capsys):
    module, frame, out, given = done
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a row was measured again"))
    assert module.main(given)["kl"].tolist() == pytest.approx(frame["kl"].tolist(), nan_ok=True)
    module.main([*given, "--ratios", "0.2", "0.3", "--plan"])
    assert "pico: 3 rows to measure" in capsys.readouterr().out
    assert json.loads((out / "generation/pico/rows/shortgpt-r0.2.json").read_text())["method"] == "shortgpt"


def test_rows_of_earlier_tables_are_kept_and_not_measured_again(done, tmp_path, monkeypatch):
    module, frame, out, given = done
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("a row was measured again"))
    again = module.main([*given, "--out", str(tmp_path), "--earlier", str(out)])
    assert again["kl"].tolist() == pytest.approx(frame["kl"].tolist(), nan_ok=True)
    for name in ("generation", "generation_choices"):
        old, new = (pd.read_csv(folder / f"{name}.csv").drop(columns="measure_seconds", errors="ignore")
                    for folder in (out, tmp_path))
        pd.testing.assert_frame_equal(old, new[list(old)])


@pytest.mark.parametrize("given, message", [
    (["--data", "none"], "it has no folders calib/ and eval/"),
    (["--data", ".", "--ratios", "1.5"], "--ratios has 1.5"),
])
def test_wrong_words_are_refused_in_one_line(benchmark, given, message, capsys):
    module, root = benchmark
    with pytest.raises(SystemExit):
        module.arguments([str(root / "sets") if one == "." else one for one in given])
    assert message in capsys.readouterr().err.splitlines()[-1]


# What is committed ----------------------------------------------------------------------------------------------------

PAGE = load("pages/generation")


def test_the_page_has_the_numbers_of_the_data():
    text = PAGE.PAGE.read_text(encoding="utf-8")
    assert PAGE.written(text, PAGE.tables()) == text, "run python benchmarks/pages/generation.py"


def test_the_predictor_of_the_library_is_that_of_the_data():
    frame, kept = PAGE.rows(), expect.own_predictor()
    made = PAGE.predictor(frame)
    assert kept.provenance["sha256"] == made.provenance["sha256"], "run python benchmarks/pages/generation.py"
    for name, weights in made.coefficients.items():
        assert kept.coefficients[name] == pytest.approx(weights, rel=1e-3, abs=1e-3)
        assert kept.validation[name]["spearman"] == pytest.approx(made.validation[name]["spearman"], abs=1e-3)


def test_the_rows_cover_several_methods_at_two_ratios():
    frame = PAGE.rows()
    assert frame["method"].nunique() >= 3 and frame["ratio"].nunique() >= 2
    assert frame["loss_quality"].between(0, 1).all() and (frame["kl"] > 0).all()


def test_the_words_of_the_page_are_those_of_the_data():
    found, text = PAGE.numbers(PAGE.rows()), " ".join(PAGE.PAGE.read_text(encoding="utf-8").split())
    assert f"{found['rows']} pruned models by {found['groups']} methods" in text
    assert (f"with an error of {100 * found['chain_error']:.0f} points and a rank correlation of {found['chain']:.2f}"
            in text)
    assert "`{}` at ratio {:g}".format(*found["worst"]) in text


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="no lines '<!-- generation -->'"):
        PAGE.written("nothing", {"generation": ""})
