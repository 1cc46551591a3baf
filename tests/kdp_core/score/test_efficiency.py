"""Efficiency: counts by hand, and how turns become medians. Latencies themselves are not asserted."""
import statistics

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.model import checkpoints
from kdp_core.score import efficiency
from kdp_core.score.efficiency import Latency
from tests import pico


def macs_per_token(family, layers, width=32, inner=64, vocabulary=384):
    """Multiply-adds of one token, written out: llama and qwen3 have 2 key/value heads of width 8, opt has 4."""
    key_value = width if family == "opt" else 16
    attention = 2 * width * width + 2 * width * key_value
    mlp = (2 if family == "opt" else 3) * width * inner
    return layers * (attention + mlp) + width * vocabulary


@pytest.fixture(scope="module", params=pico.FAMILIES)
def pair(request, tmp_path_factory):
    """(family, folder of a model of 10 layers, folder of one of 7)."""
    folder = tmp_path_factory.mktemp(request.param)
    family = request.param
    return family, pico.save(folder / "dense", family), pico.save(folder / "pruned", family, layers=7)


def test_counts_are_those_by_hand(pair):
    family, dense, pruned = pair
    found = efficiency.measure(dense, pruned, tokens=16, decode_steps=2, repeats=2, threads=1)
    assert (found.macs_dense, found.macs) == (16 * macs_per_token(family, 10), 16 * macs_per_token(family, 7))
    layer = (found.params_dense - found.params) / 3
    assert layer * 10 < found.params_dense and layer == int(layer)
    assert found.params == sum(p.numel() for p in checkpoints.load_model(pruned).parameters())
    assert (found.tokens, found.repeats, found.threads, found.device) == (16, 2, 1, "cpu")
    assert min(found.prefill_ms, found.decode_ms, found.prefill_dense_ms, found.decode_dense_ms) > 0


def test_dense_beside_itself_costs_the_same(llama_folder):
    found = efficiency.measure(llama_folder, llama_folder, tokens=8, decode_steps=1, repeats=1)
    assert found.params == found.params_dense and found.macs == found.macs_dense
    # one turn: the paired ratio is the ratio of the medians
    assert found.speedup_prefill == pytest.approx(found.prefill_dense_ms / found.prefill_ms)
    assert found.speedup_decode == pytest.approx(found.decode_dense_ms / found.decode_ms)


def test_speedups_are_medians_of_paired_ratios():
    dense, pruned = [Latency(2, 30), Latency(4, 10), Latency(6, 20)], [Latency(1, 10), Latency(1, 5), Latency(3, 20)]
    found = efficiency.paired(list(zip(dense, pruned, strict=True)))
    assert found == {"prefill_ms": 1, "prefill_dense_ms": 4, "speedup_prefill": 2,
                     "decode_ms": 10, "decode_dense_ms": 20, "speedup_decode": 2}


def test_turns_alternate_and_keep_their_models(monkeypatch):
    """Models that tell when they are called, on a clock that a pruned call moves by 1 s and a dense one by 3 s."""
    calls, now = [], [0.0]

    class Told:
        def __init__(self, name):
            self.name = name

        def __call__(self, ids_ST, use_cache, past_key_values=None):
            calls.append((self.name, tuple(ids_ST.shape), past_key_values))
            now[0] += 3.0 if self.name == "dense" else 1.0
            return type("Output", (), {"past_key_values": f"cache of {self.name}"})

    monkeypatch.setattr(efficiency, "_now", lambda device: now[0])
    ids_ST = torch.arange(6).view(2, 3)
    found = efficiency.in_turns(Told("dense"), Told("pruned"), ids_ST, decode_steps=4, repeats=3)
    assert found == [(Latency(3000, 3000), Latency(1000, 1000))] * 3
    order = [name for name, shape, cache in calls if shape == (2, 3) and cache is None]
    assert order == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    steps = [(name, cache) for name, shape, cache in calls if shape == (2, 1)]
    assert len(steps) == 24 and all(cache == f"cache of {name}" for name, cache in steps)


def test_latency_is_the_median_of_the_steps(monkeypatch):
    clock = iter([0.0, 0.5, 0.6, 0.9, 1.0])
    monkeypatch.setattr(efficiency, "_now", lambda device: next(clock))
    found = efficiency.latency(pico.model("llama", layers=1), torch.zeros(1, 4, dtype=torch.int64), 3)
    assert found.prefill_ms == pytest.approx(500)
    assert found.decode_ms == pytest.approx(1000 * statistics.median([0.1, 0.3, 0.1]))


def test_peak_memory_holds_the_weights(tmp_path):
    wide = pico.save(tmp_path / "wide", "llama", layers=4, width=1024)
    found = efficiency.measure(wide, wide, tokens=8, decode_steps=1, repeats=1)
    weights_mib = found.params * 4 / 2 ** 20
    assert weights_mib > 40
    assert found.peak_memory_kind in ("cpu_resident_growth", "weights")
    assert 0.99 * weights_mib < found.peak_memory_mib < 3 * weights_mib


def test_memory_falls_back_to_the_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(efficiency, "CLEAR_REFS", tmp_path / "no such folder" / "clear_refs")
    meter, model = efficiency.Meter(torch.device("cpu")), pico.model("llama")
    meter.start_runs(model)
    peak_mib, kind = meter.peak_mib(model)
    held = [*model.parameters(), *model.buffers()]
    assert kind == "weights" and peak_mib == pytest.approx(4 * sum(t.numel() for t in held) / 2 ** 20)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"decode_steps": 0}, {"repeats": 0}, {"threads": 0}])
def test_numbers_below_one_are_refused_before_loading(wrong, tmp_path):
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} is 0; give a number at least 1"):
        efficiency.measure(tmp_path / "none", tmp_path / "none", **wrong)


def test_too_long_a_sequence_is_refused(llama_folder):
    with pytest.raises(efficiency.EfficiencyError, match="256 positions"):
        efficiency.measure(llama_folder, llama_folder, tokens=250, decode_steps=8)


def test_threads_are_put_back(llama_folder):
    before = torch.get_num_threads()
    found = efficiency.measure(llama_folder, llama_folder, tokens=4, decode_steps=1, repeats=1, threads=before + 1)
    assert found.threads == before + 1 and torch.get_num_threads() == before
