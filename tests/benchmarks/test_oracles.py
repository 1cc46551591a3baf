"""The comparison with published selections, on a pico model under the name of a published one."""
import pytest

from tests import pico
from tests.benchmarks.command import load, write_project


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    module = load("oracles")
    monkeypatch.setattr(module.embedded, "ROOT", write_project(tmp_path / "root"))
    return module


def test_every_published_selection_of_a_model_gets_a_row(benchmark, tmp_path):
    oracle = benchmark.ORACLES[0]
    benchmark.ORACLES = tuple(oracle._replace(method=method, layers=[4, 5, 6], options={})
                              for method in ("shortgpt", "angular", "attn_drop", "shortened_ppl"))
    pico.save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(pico.documents(20)), encoding="utf-8")
    frame = benchmark.main([oracle.model, "--model", str(tmp_path / "model"), "--sequences", "12", "--length", "24",
                            "--text", str(text), "--out", str(tmp_path / "oracles.csv")])
    assert frame["method"].tolist() == ["shortgpt", "angular", "attn_drop", "shortened_ppl"]
    assert all(len(ours) == 3 for ours in frame["ours"]) and frame["shared"].between(0, 1).all()
    assert (tmp_path / "oracles.csv").read_text(encoding="utf-8").startswith("method,source,published,ours,shared")


def test_a_model_without_published_selections_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["GPT-9", "--model", "x"])
    assert "LLaMA-2-7B" in capsys.readouterr().err
