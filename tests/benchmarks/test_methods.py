"""The comparison of all methods on a pico model: a row for each, refusals with their reason, none measured twice."""
import subprocess
import time

import pytest

from kdp_core.methods import METHODS, MethodError, check_options
from tests.benchmarks.command import PROMISED, load, write_project

SOME = ["remove", "shortgpt", "attn_drop", "laco", "streamline", "wanda"]
"""One of each kind: the battery runs them all."""


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    module = load("methods")
    patch = pytest.MonkeyPatch()
    patch.setattr(module.embedded, "ROOT", write_project(tmp_path_factory.mktemp("root")))
    patch.setattr(module, "VARIANTS", {name: variant._replace(options=dict(METHODS[name].example))
                                       for name, variant in module.VARIANTS.items()})
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def done(benchmark, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    given = ["--out", str(out), "--ratios", "0.2", "0.5", "--sequences", "24", "--items", "16", "--tune-on", "12",
             "--threads", "1", "--data", str(out / "none"), "--alone", "--tuned", "wanda", "--methods", *SOME]
    return benchmark.main(given), out, given


def test_every_method_is_measured_unless_some_are_named(benchmark):
    assert benchmark.arguments([]).methods == list(METHODS)
    assert benchmark.arguments(["--methods", "laco"]).methods == ["laco"]


def test_options_are_those_of_the_methods(benchmark):
    for name, options in benchmark.OPTIONS.items():
        check_options(name, options)
    with pytest.raises(MethodError, match="no part 'fit'"):
        check_options("kdp", benchmark.OPTIONS["kdp"] | {"fit": {}})


def test_the_table_has_what_was_promised(done):
    frame = done[0]
    assert PROMISED | {"fit_peak_mib", "group", "refused"} <= set(frame)
    found = frame[frame["ratio"] == 0.2].set_index("method")
    assert set(found.index) == {*SOME, "wanda+ft"} and found["refused"].isna().all()
    assert found["params_removed"].between(0.1, 0.3).all() and (found["fit_peak_mib"] > 100).all()
    assert found["group"].to_dict() == {name: "zeros" if name.startswith("wanda") else "params" for name in found.index}
    assert found.index[-2:].tolist() == ["wanda", "wanda+ft"], "methods that set weights to zero stand last"


def test_a_refusal_is_a_row_with_its_reason(done):
    found = done[0][done[0]["ratio"] == 0.5].set_index("method")
    assert "all that attn_drop can remove" in found.loc["attn_drop", "refused"]
    assert found.loc["attn_drop"].isna()["ppl"] and found.loc["shortgpt"].notna()["ppl"]


def test_a_fault_is_no_refusal(benchmark, done, monkeypatch):
    """A fault ends the run, and leaves no row, so that the variant is measured once the fault is mended."""
    _, out, given = done
    monkeypatch.setattr(benchmark.fold, "fold", lambda *args: (_ for _ in ()).throw(ValueError("a fault")))
    with pytest.raises(ValueError, match="a fault"):
        benchmark.main([*given, "--ratios", "0.3", "--methods", "remove"])
    assert not list((out / "methods" / "rows").glob("*remove-r0.3*"))


@pytest.fixture
def begun(benchmark, done, monkeypatch):
    """What the processes that would measure variants were asked for. They measure nothing."""
    asked = []

    def run(command, **options):
        given = benchmark.arguments(command[2:])
        asked.append((*given.methods, *given.ratios, given.threads, given.alone))
        if given.methods == ["laco"]:
            raise subprocess.CalledProcessError(1, command)
        time.sleep(1)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    return asked


def test_each_variant_has_a_process_and_ratios_of_a_method_follow_one_another(benchmark, done, begun):
    given = [word for word in done[2] if word != "--alone"] + ["--jobs", "2", "--ratios", "0.2", "0.3", "0.4"]
    benchmark.main([*given, "--methods", "remove", "shortgpt"])
    assert [asked[1:] for asked in begun if asked[0] == "remove"] == [(0.3, 1, True), (0.4, 1, True)], "0.2 is on disk"
    assert sorted(asked[:2] for asked in begun) == [(name, ratio) for name in ("remove", "shortgpt")
                                                    for ratio in (0.3, 0.4)]


def test_after_a_fault_the_other_methods_are_not_begun(benchmark, done, begun):
    given = [word for word in done[2] if word != "--alone"] + ["--jobs", "1", "--ratios", "0.3"]
    with pytest.raises(subprocess.CalledProcessError):
        benchmark.main([*given, "--methods", "remove", "laco", "shortgpt", "streamline"])
    assert "laco" in [asked[0] for asked in begun] and "streamline" not in [asked[0] for asked in begun]
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--jobs", "0"])


def test_nothing_is_measured_twice(benchmark, done, monkeypatch):
    frame, out, given = done
    monkeypatch.setattr(benchmark, "measure", lambda *args: pytest.fail("measured again"))
    assert benchmark.main(given).astype(str).equals(frame.astype(str))
    assert not list((out / "methods" / "rows").glob("*/checkpoint")), "checkpoints are not kept"
