"""The speed comparison: its errors are those of the fits themselves, and its ratios follow from its curves."""
import numpy as np
import pandas as pd
import pytest

from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp import inverse, kernel, linear
from kdp_core.states import block
from tests import pico
from tests.benchmarks.command import load
from tests.kdp_core import stored

SMALL = ["--block", "4-6", "--epochs", "3", "--features", "16", "--width", "8", "--repeats", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def fit_speed():
    return load("fit_speed")


@pytest.fixture(scope="module")
def pico_states(tmp_path_factory):
    return stored.of_pico(tmp_path_factory.mktemp("speed") / "h.zarr")


@pytest.fixture(scope="module")
def given(pico_states, tmp_path_factory):
    """Arguments of a small run."""
    dense = pico.save(tmp_path_factory.mktemp("dense"))
    return [*SMALL, "--hidden", str(pico_states.path), "--dense", str(dense)]


@pytest.fixture(scope="module")
def done(fit_speed, given, tmp_path_factory):
    """One run at pico size: the table, and the folder it wrote."""
    out = tmp_path_factory.mktemp("out")
    return fit_speed.main([*given, "--decode-every", "2", "--out", str(out)]), out


def test_errors_are_those_of_the_fits(done, pico_states):
    rows = pd.read_csv(done[1] / "fit_speed.csv").set_index(["fit", "step", "epoch"])["error"].sort_index()
    assert rows["linear", "closed form", 0] == linear.direct(pico_states, (4, 6)).stats["heldout_error"]
    for name, options, standardise in (("kdp as meant", {}, True),
                                       ("kdp to the letter", {"bandwidth": "unit", "bandwidth_scale": 1.0}, False)):
        first = kernel.fit(pico_states, (4, 6), features=16, epochs=3, collapse_variance=0.0, **options)
        second = inverse.fit(pico_states, first, width=8, epochs=3, standardise=standardise)
        assert [rows[name, "inverse", epoch] for epoch in (1, 2, 3)] == [row["heldout_error"] for row in second.curve]
        shorter = kernel.fit(pico_states, (4, 6), features=16, epochs=2, collapse_variance=0.0, final_ols=False,
                             **options)
        assert rows[name, "kernel"].to_dict() == {2: shorter.stats["decode_error"]}


def test_step_2_starts_when_step_1_is_over(done):
    rows = pd.read_csv(done[1] / "fit_speed.csv")
    for _, own in rows.groupby("fit"):
        assert own["seconds"].is_monotonic_increasing and (own["seconds"] > 0).all()


def test_files_and_table(done):
    table, out = done
    assert {path.name for path in out.iterdir()} == {f"fit_speed.{kind}" for kind in ("csv", "pdf", "png")} | {
        "fit_speed_table.csv"}
    written = pd.read_csv(out / "fit_speed_table.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert list(zip(table["recipe"], table["step"], table["fit"], strict=True)) == [
        (name, step, fit) for name in ("kdp to the letter", "kdp as meant") for step in ("kernel", "inverse")
        for fit in ("linear", "kdp_residual")]


def curve(fit, step, pairs):
    return [{"fit": fit, "step": step, "epoch": place, "seconds": seconds, "error": error}
            for place, (seconds, error) in enumerate(pairs, 1)]


def test_ratios_by_hand(fit_speed):
    rows = pd.DataFrame([*curve("quick", fit_speed.CLOSED, [(2.0, 0.3)]),
                         *curve("poor", fit_speed.CLOSED, [(1.0, 0.5)]),
                         *curve("recipe", "inverse", [(10, 0.9), (20, 0.41), (30, 0.4), (40, 0.45)])])
    table = fit_speed.compare(rows).set_index("fit")
    assert table.loc["quick", ["best_error", "best_epoch", "best_seconds"]].tolist() == [0.4, 3, 30]
    assert table.loc["quick", ["near_seconds", "last_seconds"]].tolist() == [20, 40]
    assert table.loc["quick", ["reached", "speedup", "speedup_near"]].tolist() == [True, 15, 10]
    assert not table.loc["poor", "reached"] and np.isnan(table.loc["poor", ["speedup", "speedup_near"]].tolist()).all()


def test_a_removed_block_is_the_identity(fit_speed, pico_states):
    assert fit_speed.nothing_done(pico_states, (4, 6), 0) == pytest.approx(
        linear.direct(pico_states, (4, 6)).stats["heldout_error_identity"], rel=1e-5)


def test_one_entry_of_the_table_adds_a_fit(fit_speed, pico_states, given, tmp_path, monkeypatch):
    def per_layer(states_of, block, seed, dense):
        stats = linear.sequential(states_of, block, seed=seed).stats
        return stats["heldout_error"], stats["seconds"]

    monkeypatch.setitem(fit_speed.FITS, "per layer", per_layer)
    monkeypatch.setattr(fit_speed, "RECIPES", {"kdp as meant": fit_speed.RECIPES["kdp as meant"]})
    table = fit_speed.main([*given, "--out", str(tmp_path)])
    assert list(table["fit"]) == ["linear", "kdp_residual", "per layer"]
    assert table["fit_error"].iloc[2] == linear.sequential(pico_states, (4, 6)).stats["heldout_error"]


def test_a_recipe_that_fails_ends_its_curve_and_not_the_run(fit_speed, given, tmp_path, monkeypatch, caplog):
    def diverge(*args, **options):
        raise TrainingFailed("step 2: not a number")

    monkeypatch.setattr(inverse, "fit", diverge)
    table = fit_speed.main([*given, "--decode-every", "1", "--out", str(tmp_path)])
    assert set(table["step"]) == {"kernel"} and "step 2: not a number" in caplog.text


def test_states_are_extracted_if_none_are_stored(fit_speed, tmp_path, monkeypatch):
    pico.save(tmp_path / "model")
    (tmp_path / "news.txt").write_text("\n".join(pico.documents(60)), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(f"""
models: {{pico: {{source: unused, sha256: unused}}}}
texts: {{news: {{source: "{tmp_path}/news.txt", sha256: null, format: lines, encoding: utf-8}}}}
calibrations: {{few: {{length: 24, seed: 0, mix: {{news: 12}}}}}}
cache: cache
""", encoding="utf-8")
    monkeypatch.setattr(fit_speed.embedded, "ROOT", tmp_path)
    made = fit_speed.make_states((4, 6), tmp_path / "model", tmp_path / "work")
    assert made.layers == [4, 5, 6] and (made.sequences, made.tokens, made.width) == (12, 24, 32)
    assert block.load(made, (4, 6), massive="bypass", heldout=0.1, seed=0).h_KSTD.isfinite().all()


@pytest.mark.parametrize("wrong", [["--block", "16-14"], ["--block", "14"], ["--epochs", "0"], ["--threads", "0"]])
def test_wrong_arguments_are_refused(fit_speed, wrong, capsys):
    with pytest.raises(SystemExit):
        fit_speed.main(wrong)
    assert wrong[0] in capsys.readouterr().err
