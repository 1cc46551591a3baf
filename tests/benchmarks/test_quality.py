"""The quality comparison on a pico model: the table that it promises, and no variant is measured twice."""
import pandas as pd
import pytest

from kdp_core.base.measurements import Score, Scores
from tests.benchmarks.command import PROMISED, load, write_project


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    module = load("quality")
    patch = pytest.MonkeyPatch()
    patch.setattr(module.embedded, "ROOT", write_project(tmp_path_factory.mktemp("root")))
    module.VARIANTS = {name: variant._replace(options=small(variant.options))
                       for name, variant in module.VARIANTS.items()}
    yield module
    patch.undo()


def small(options):
    """The same options at pico size."""
    made = {step: dict(given) for step, given in options.items()}
    if "search" in made:
        made["search"] |= {"entries": 8, "judge_sequences": 4}
        made["compose"] |= {"entries": 8}
    if "kernel" in made:
        made["kernel"] |= {"features": 32, "epochs": 1}
        made["inverse"] |= {"width": 16, "epochs": 1}
    return made


def names(quality):
    """All variants but the one that names a layer which pico models lack."""
    return [name for name in quality.VARIANTS if name != "replaceme_after_sink"]


@pytest.fixture(scope="module")
def done(quality, tmp_path_factory):
    """Every variant once, one of them fine-tuned too."""
    out = tmp_path_factory.mktemp("out")
    given = ["--out", str(out), "--ratios", "0.2", "--seeds", "0", "--sequences", "24", "--items", "16", "--tune-on",
             "12", "--tuned", "kdp_residual", "--tune-targets", "linear", "--threads", "1", "--data",
             str(out / "none"), "--methods", *names(quality)]
    return quality.main(given), out, given


def test_the_table_has_a_row_for_each_variant_and_the_dense_model(quality, done):
    frame, out, _ = done
    assert set(frame["method"]) == {"dense", "kdp_residual+lora", *names(quality)} and PROMISED <= set(frame)
    pd.testing.assert_frame_equal(pd.read_csv(out / "quality.csv"), frame.reset_index(drop=True), check_dtype=False)
    dense = frame[frame["method"] == "dense"].iloc[0]
    assert (dense["ppl_ratio"], dense["rp"], dense["params_removed"]) == (1, 100, 0)
    assert ((frame["ppl_ratio"] - frame["ppl"] / dense["ppl"]).abs() < 1e-12).all()
    pruned = frame[frame["method"] != "dense"]
    assert pruned["params_removed"].between(0.1, 0.35).all()


def test_parts_of_our_method_share_its_layers(done):
    frame = done[0].set_index("method")
    for name in ("closed_form", "dense_states", "unweighted", "outputs_alone"):
        assert frame.loc[name, "blocks"] == frame.loc["kdp_residual", "blocks"]
    assert frame.loc["kdp_residual", "search_seconds"] > 0 == frame.loc["cka_layers", "search_seconds"]


def test_nothing_is_measured_twice(quality, done, monkeypatch):
    frame, out, given = done
    monkeypatch.setattr(quality.fold, "fold", lambda *args: pytest.fail("folded again"))
    pd.testing.assert_frame_equal(quality.main(given), frame)
    assert not list((out / "quality" / "rows").glob("*/checkpoint")), "checkpoints are not kept"


def test_the_mean_accuracy_weighs_tasks_alike_and_is_in_percent(quality):
    scores = Scores([Score("a", "acc", 0.5, 0.03, 10, True, "share"), Score("b", "acc", 0.3, 0.04, 10, True, "share"),
                     Score("heldout_ppl", "ppl", 40.0, 2.0, 10, False, "ppl")], 1.0, {})
    found = quality.protocol.flat(scores, "")
    assert found["acc"] == pytest.approx(40) and found["acc_stderr"] == pytest.approx(2.5)
    assert (found["a"], found["ppl"], found["ppl_stderr"]) == (50, 40, 2)


def test_real_sets_stand_apart_from_the_held_out_tasks(quality, tmp_path, monkeypatch):
    asked = {}

    def evaluated(*_, chosen, tasks, **__):
        asked.update(tasks=tasks, chosen=chosen)
        names = [*tasks, *(chosen.tasks if chosen else ())]
        return Scores([Score(name, "acc", 0.5, 0.1, 4, True, "share") for name in names], 1.0, {})

    monkeypatch.setattr(quality.protocol.evaluate, "evaluate", evaluated)
    judge = quality.protocol.Judge(tmp_path, tmp_path / "data", 7)
    found = judge.score(tmp_path, True)
    assert (asked["chosen"].data, asked["chosen"].limit) == (str(tmp_path / "data"), 7)
    assert set(found) == {"acc", "acc_stderr", "real_acc", "real_acc_stderr", *asked["tasks"],
                          *(f"real_{name}" for name in quality.protocol.REAL)}
    assert not any(key.startswith("real_") for key in judge.score(tmp_path, False))
