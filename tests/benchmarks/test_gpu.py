"""The GPU table, on the CPU with a tiny model: every section runs, and the rows say what they should."""
import csv
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.command import FOLDER, load

gpu = load("gpu")
import alone  # noqa: E402 (found once the command is loaded)
from stage import accelerator, made_up, timing  # noqa: E402

TINY = ["--device", "cpu", "--shape", "tiny"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.csv"
    return gpu.main([*TINY, "--out", str(out)]), out


def test_every_section_has_rows(rows):
    found, out = rows
    assert all(row.ours > 0 and row.other > 0 and row.ratio > 0 for row in found)
    for word in ("extraction of 13 states", "linear CKA, 13 states", "step 1", "step 2", "Gram products",
                 "joint training", "prefill, folded", "decoding of a token, removed"):
        assert any(word in row.measure for row in found), word
    with out.open(newline="", encoding="utf-8") as file:
        assert [row["measure"] for row in csv.DictReader(file)] == [row.measure for row in found]


def test_no_section_begins_after_the_limit_and_a_failing_one_ends_alone(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setitem(gpu.SECTIONS, "cka", lambda bench: 1 / 0)
    monkeypatch.setitem(gpu.SECTIONS, "kdp", lambda bench: (_ for _ in ()).throw(RuntimeError("out of memory")))
    monkeypatch.setitem(gpu.SECTIONS, "models", lambda bench: [timing.figure("made", 1.0, "", "up", 1.0)])
    found = gpu.main([*TINY, "kdp", "models", "--out", str(tmp_path / "a.csv")])
    assert [row.measure for row in found] == ["made"] and "out of memory" in caplog.text
    assert gpu.main([*TINY, "models", "--limit", "0", "--out", str(tmp_path / "b.csv")]) == []
    assert "models is not measured" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_is_told_what_to_do(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --shape tiny" in capsys.readouterr().err


def test_the_seven_billion_shape_has_its_parameters_and_the_folded_one_a_fifth_less():
    with torch.device("meta"):
        shape = gpu.SHAPES["llama2-7b"]
        config = accelerator.LlamaConfig(**shape.config)
        dense = accelerator.LlamaForCausalLM(config)
        folded = made_up.folded_like(config, accelerator.blocks_of(config), shape.hidden)
    params = gpu.count_params(dense)
    assert params == 6_738_415_616
    assert 1 - gpu.count_params(folded) / params == pytest.approx(0.228, abs=0.01)


def test_folded_models_have_their_stand_ins_before_the_layer_after_the_block():
    config = accelerator.LlamaConfig(**gpu.SHAPES["tiny"].config)
    made = made_up.folded_like(config, [(1, 3), (6, 8)], 8)
    assert [hasattr(layer, "stand_in") for layer in made.model.layers] == [False, True, False, False, True, False,
                                                                           False, False]
    removed = made_up.folded_like(config, [(1, 3)], None)
    assert len(removed.model.layers) == 10 and not any(hasattr(layer, "stand_in") for layer in removed.model.layers)


def test_the_bounds_of_options_need_no_package():
    bounds = alone.bounds()
    assert bounds.Ge(2).ge == 2 and bounds.MultipleOf(3).multiple_of == 3


def test_the_command_runs_without_annotated_types_and_without_an_installed_package(tmp_path):
    code = ("import sys; sys.modules['annotated_types'] = None; "
            f"sys.path.insert(0, {str(FOLDER)!r}); import gpu; gpu.main({[*TINY, 'extraction']!r} + "
            f"['--out', {str(tmp_path / 'gpu.csv')!r}])")
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "## extraction" in done.stdout, done.stderr
