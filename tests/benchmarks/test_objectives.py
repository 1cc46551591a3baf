"""The comparison of objectives and searches on a pico model: rows, tables, resuming, real items, speed."""
import json

import pytest

from tests.benchmarks.command import load, write_project

SMALL = ["--objectives", "loss", "last_state", "--strategies", "one_shot", "random", "--draws", "0", "1", "--layers",
         "2", "--sequences", "3", "--length", "24", "--budget", "70", "--heldout", "5", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    module = load("objectives")
    module.embedded.ROOT = write_project(tmp_path_factory.mktemp("root"))
    return module


@pytest.fixture(scope="module")
def done(benchmark, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return benchmark.main([*SMALL, "--out", str(out)]), out


def test_every_search_gets_a_row_under_the_same_budget(done):
    frame, out = done
    assert len(frame) == 8 and (frame["passes"] <= 70).all() and (frame["heldout_ppl_ratio"] > 0).all()
    assert all(len(removed.split()) == 2 for removed in frame["removed"])
    assert frame["heldout_accuracy"].between(0, 1).all()
    for name in ("objectives", "objectives_pairs", "objectives_claims"):
        assert (out / f"{name}.csv").stat().st_size > 100


def test_no_row_is_measured_twice(benchmark, done, monkeypatch, capsys):
    frame, out = done
    monkeypatch.setattr(benchmark, "measure", lambda *args: pytest.fail("measured again"))
    again = benchmark.main([*SMALL, "--out", str(out)])
    assert again["removed"].tolist() == frame["removed"].tolist()
    assert "0 of 8 searches are left" in capsys.readouterr().out


def test_a_plan_measures_nothing(benchmark, tmp_path, capsys):
    assert benchmark.main([*SMALL, "--plan", "--out", str(tmp_path)]) is None
    assert "8 of 8 searches are left: at most 70 layer passes each" in capsys.readouterr().out
    assert not (tmp_path / "objectives" / "rows").exists()


def test_real_items_are_those_of_both_sets_in_turn(benchmark, tmp_path):
    arc = {"question": "What falls?", "choices": {"text": ["rain", "the sun"], "label": ["A", "B"]}, "answerKey": "A"}
    book = {"question_stem": "Farmers need", "choices": {"text": ["night", "water"], "label": ["A", "B"]},
            "answerKey": "B"}
    for folder in ("calib", "eval"):
        (tmp_path / folder).mkdir()
    for files, one in zip(benchmark.SETS.values(), (arc, book), strict=True):
        for file in files:
            (tmp_path / file).write_text("".join(json.dumps(one) + "\n" for _ in range(4)), encoding="utf-8")
    items = benchmark.real_items(tmp_path, 0)
    assert items[0] == {"context": "Question: What falls?\nAnswer:", "choices": ["rain", "the sun"], "answer": 0}
    assert [item["answer"] for item in items] == [0, 1] * 4
    frame = benchmark.main([*SMALL[:1], "margin", "--strategies", "one_shot", *SMALL[6:7], "0", *SMALL[9:], "--data",
                            str(tmp_path), "--heldout-items", "6", "--out", str(tmp_path / "out")])
    assert len(frame) == 1 and frame["objective"].tolist() == ["margin"]


def test_speed_compares_the_same_sets(benchmark, tmp_path, capsys):
    benchmark.main([*SMALL, "--speed", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    full, few = int(said.split()[2]), int(said.split(" s by full passes, ")[1].split()[0])
    sets = benchmark.greedy_sets(10, 2)
    assert full == sum(10 - len(removed) for removed in sets) and few < full and "times faster" in said


def test_a_folder_without_the_sets_is_refused(benchmark, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--data", str(tmp_path / "nowhere")])
    assert "it has no folder calib/" in capsys.readouterr().err
