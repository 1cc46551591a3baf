"""The benchmark of a sweep on a cluster: its sweep, the results that it calls different, its table."""
import os

import pytest
import torch

from kdp_core.base import store
from kdp_core.base.measurements import Score, Scores
from kdp_core.base.records import LinearMap
from tests.benchmarks.command import load
from tests.cluster.sweep import Sweep

cluster_sweep = load("cluster_sweep")
AT = "results/pico/few/linear/r0.1-k3"


def test_the_sweep_is_four_methods_at_two_ratios_and_two_k_max():
    config = cluster_sweep.sweep_config()
    points = cluster_sweep.grid.points(config)
    assert len(points) == 16 and {point["method"] for point in points} == {"remove", "linear", "kdp", "shortgpt"}
    assert cluster_sweep._given(config) == [
        "results/smollm2-135m/dense", "results/smollm2-135m/news/tokens.safetensors", "results/tasks"]


def results(folder, *, seconds=1.0, value=0.5, weight=1.0, answer="b"):
    """The results of a run: a fit, scores, a record of the evaluation, a checkpoint."""
    sweep = Sweep(folder, None)
    fit = LinearMap((1, 2), torch.tensor([[weight]]), torch.zeros(1), None, {"tokens": 3, "seconds": seconds})
    store.write(folder / AT / "fit.safetensors", fit)
    store.write(folder / AT / "scores.json", Scores([Score("a", "acc", value, None, 4, True, "share")], seconds, {}))
    store.write_text(folder / AT / "scored/a-1.jsonl", f'{{"task": "a", "seconds": {seconds}}}\n"{answer}"\n')
    store.write_text(folder / AT / "checkpoint/config.json", "{}\n")
    return sweep.bits()


def test_seconds_make_no_difference_and_all_else_does(tmp_path):
    first = results(tmp_path / "first")
    assert len(first) == 4 and cluster_sweep.different(first, results(tmp_path / "again", seconds=2.0)) == []
    for number, (change, name) in enumerate([({"weight": 1.0 + 2**-23}, "fit.safetensors"),
                                             ({"value": 0.25}, "scores.json"), ({"answer": "c"}, "scored/a-1.jsonl")]):
        found = cluster_sweep.different(first, results(tmp_path / str(number), **change))
        assert found == [f"{AT}/{name}"]
    missing = {name: value for name, value in first.items() if "checkpoint" not in name}
    assert cluster_sweep.different(first, missing) == cluster_sweep.different(missing, first) == [
        f"{AT}/checkpoint/config.json"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has this, and Slurm runs there")
def test_both_runs_are_held_to_the_same_cores():
    before = os.sched_getaffinity(0)
    with cluster_sweep.held_to(1):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(SystemExit, match="at most"), cluster_sweep.held_to(len(before) + 1):
        pass


def test_the_table_has_sizes_times_and_their_ratio():
    found = cluster_sweep.Compared(16, 2, 70, 58, 3, 500.0, 600.4, 400, ["results/a"])
    assert cluster_sweep.table(found).splitlines()[0].startswith("| grid points | jobs | Slurm jobs | nodes |")
    assert cluster_sweep.table(found).splitlines()[2] == "| 16 | 70 | 58 | 3 | 2 | 500 | 600 | 1.20 | 400 | 1 |"
