"""Records on disk: nothing is lost, no file is half written, and no other file is taken for a record."""
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdp_core.base import measurements, records, store
from kdp_core.base.measurements import (
    Agreement,
    Answers,
    Candidates,
    Diagnosis,
    Efficiency,
    Expectation,
    KernelView,
    Predictor,
    Probes,
    Score,
    Scores,
    SingleStep,
    Spaces,
    Survival,
    Theory,
    Trajectories,
)
from kdp_core.base.records import (
    Composed,
    Finetuned,
    Inverse,
    KernelMap,
    LinearMap,
    ModelFacts,
    Module,
    Plan,
    PrunedFacts,
    Search,
    Selection,
    Similarity,
    Tokens,
)
from kdp_core.base.store import StoreError

CURVE = [{"epoch": 0, "loss": 1.5, "operator_norm": [1.0, 0.9]}, {"epoch": 1, "loss": 0.5, "operator_norm": [1.0, 0.8]}]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def examples():
    """One of every record, each with its awkward fields filled."""
    affine = Module((2, 4), "affine", {"width": 3, "bypass_above": None}, {"map.weight": numbers(3, 3)})
    lift = Module((5, 6), "rff_mlp", {"width": 3, "activation": "silu"},
                  {"w1.weight": numbers(4, 2), "phase": numbers(2)})
    score = Score("lastword", "acc", 0.25, None, 64, True, "share")
    selection = Selection([(1, 3), (5, 7)], [0.9, 0.8], "cosine", 0.2, 0.19, 0.4, 3,
                          [{"block": (1, 3), "context": (0, 3), "score": 0.9}], 4)
    inverse = Inverse((1, 3), numbers(5, 8), numbers(5), numbers(3, 5), numbers(3), 0.7, "gelu", CURVE,
                      {"seconds": 2.5})
    tensors = {"model.norm.weight": numbers(3), "model.layers.0.mlp.up_proj.weight": numbers(2, 3).bfloat16()}
    return [
        ModelFacts("llama", 4, 3, 384, 1000, [10, 20, 30, 40], 900, "hub:a/b", "ab" * 32),
        Tokens(torch.arange(6).reshape(2, 3), ["news", "notes"], {"seed": 1, "parts": [{"name": "news", "n": 1}]}),
        Similarity([0, 2], *(numbers(2, 2, seed=k).double() for k in range(6)), "mask", 100, 3),
        selection, Selection([], [], "cka_rbf", 0.1, 0.0, 0.0, 3, [], 0),
        KernelMap((1, 3), numbers(3, 4), numbers(4), numbers(2, 8, 8), numbers(2), "rms", 12.5, CURVE, {"ridge": 1e-3}),
        inverse, LinearMap((1, 3), numbers(3, 3), numbers(3), None, {}), affine,
        Plan("kdp", [(2, "whole"), (3, "mlp")], [affine, lift], tensors), Plan("shortgpt", [], [], {}),
        PrunedFacts("kdp", 10, 3, 1000, 800, 40, 0.2, [(2, 4), (5, 6)], [(7, "mlp")], 3), score,
        Finetuned("adapter", 8, 96, 1, "loss", CURVE, 90, 10, 1143, {"lr": 1e-4}, 12.5),
        Scores([score, score._replace(stderr=0.1)], 3.5, {"torch": "2"}),
        Efficiency(1, 2, 3, 4, 128, 1.5, 2.5, 3.5, 4.5, 1.1, 1.2, 500.0, "rss", "cpu", 1, 5),
        Theory((1, 3), 8, "raw", 0.05, 100, 10, 20, 0.1, [0.1, 0.05], 1.2, [1.2, 0.9], 1.0, 3.0, 9.0,
               [{"start": 1, "horizon": 1, "samples_needed": None, "vacuous": True}], [{"ridge": 1e-3}],
               [{"gap": 1, "space": "random", "bandwidth_scale": 3.0}], [{"gap": 1, "holds": True}], {"ridge": 1e-6}),
        Diagnosis([0, 3], [0.1, 0.2], [0.9, 0.8], [0, 2], 64, 1, [1, 2], 8.0, 63, 0.5, None, 0.7, None, 3.0, None, 3.5,
                  None, 0.5, None),
        Search([3, 2, 7], [0.1, 0.15, 0.4], "divergence", 3, {"2": 0.2, "3": 0.1, "7": 0.3}, 12,
               {"fit_tokens": 96, "seconds": 1.5}),
        Composed(Plan("kdp_residual", [(2, "whole")], [affine], tensors),
                 [{"epoch": 0, "seconds": 0.0, "kl": None, "heldout_kl": 0.5}],
                 [{"block": (2, 4), "heldout_error": 0.1, "params": 9}], {"tokens": 96}),
        Composed(Plan("linear_prefix", [], [affine], {}), [], [], {}),
        Probes(1.0, True, 3, [7, 23], [{"layer": 2, "part": "mlp", "kl": 0.1, "kl_stderr": None}],
               [{"layer": 2, "part": "mlp", "window": 0, "kl": 0.1}], {"seconds": 1.5}),
        Spaces(1.0, True, 2, 16, 4, [{"history": "own", "step": 1, "same_text": 0.5}], [{"state": 3, "kl": 0.1}],
               [{"kl": 0.1, "rank": 2}], {"seconds": 1.5}),
        KernelView((2, 4), 7, [3, 9], numbers(2, 8), numbers(2, 8), numbers(8), [0.1, 0.2], [0.01, 0.02], 0.15,
                   0.6, 0.8),
        Answers(["The weather"], 8, [{"name": "dense", "texts": ["was fine"]}]),
        SingleStep(2, 63, {"kl": 0.5, "last_kl": 0.25}, {"kl": 0.1, "last_kl": None}),
        Predictor(["kl"], [0.5], {"quality": [1.2]}, {"quality": 0.1}, {"quality": 0.11},
                  {"quality": {"rank": 0.9, "low": 0.6, "high": 1.0}}, [{"method": "flap", "ratio": 0.1}], {"seed": 0}),
        Expectation({"quality": 0.4}, {"quality": 0.3}, {"quality": 0.5}, {"method": "flap", "distance": 0.1}, False,
                    {"kl": 0.5}, "expect this model to write"),
        Candidates(numbers(2, 5), [[-1.5, -2.25], [-0.5]], [[True, False], [False]], [[1, 4], [2]]),
        Survival([{"task": "piqa", "kl": 0.5}], [{"task": "piqa", "drop_stderr": None}]),
        Agreement([{"variant": "by_kl", "removed": [3, 4], "single": {"1": 0.5}}], [{"varies": "draw", "jaccard": 0.5}],
                  [{"claim": "searches agree", "low": None, "told": "cannot be told here"}], {"windows": 8}),
        Trajectories([0, 1, 2], [4, 5], [11, 11], numbers(2, 3, 2), [{"space": "states", "mean": 0.4}], 0.9),
    ]


def same(a, b) -> bool:
    """Equal in value and in kind, tensors in every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def has_tensors(record) -> bool:
    return bool(store._split(record._asdict())[0])


def temporaries(folder):
    return sorted(path.name for path in folder.rglob("*.tmp"))


def test_examples_hold_every_record():
    every = {kind for module in (records, measurements) for kind in vars(module).values()
             if isinstance(kind, type) and hasattr(kind, "_fields")}
    assert every == {type(record) for record in examples()}


@pytest.mark.parametrize("record", examples(), ids=lambda record: type(record).__name__)
def test_round_trip(tmp_path, record):
    for suffix in [".safetensors"] if has_tensors(record) else [".json", ".safetensors"]:
        store.write(tmp_path / f"a/b/record{suffix}", record)
        assert same(store.read(tmp_path / f"a/b/record{suffix}"), record)
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("record", [record for record in examples() if has_tensors(record)],
                         ids=lambda record: type(record).__name__)
def test_same_record_same_bytes(tmp_path, record):
    for name in "abcd":
        store.write(tmp_path / f"{name}.safetensors", record)
    assert len({(tmp_path / f"{name}.safetensors").read_bytes() for name in "abcd"}) == 1


def test_fields_may_share_a_tensor_or_a_storage(tmp_path):
    base_LL = numbers(4, 4)
    for fields in ((base_LL,) * 6, (base_LL[:2], base_LL[2:], base_LL, base_LL.mT, base_LL, base_LL),
                   (base_LL.mT, base_LL.mT, base_LL, base_LL[:, :2], base_LL[:, 1:], base_LL)):
        record = Similarity([0, 1], *fields, "raw", 1, 0)
        store.write(tmp_path / "s.safetensors", record)
        assert same(store.read(tmp_path / "s.safetensors"), record)


def test_nothing_in_a_dict_is_mistaken_for_structure(tmp_path):
    provenance = {"head": {"tensor": "none"}, "row": {"record": "gramophone"}, "context": ["a", "b"], "cut": [1, 2]}
    record = Tokens(torch.zeros(1, 2, dtype=torch.long), ["x"], provenance)
    store.write(tmp_path / "t.safetensors", record)
    assert same(store.read(tmp_path / "t.safetensors"), record)


def test_not_a_number_becomes_null(tmp_path):
    values = {"a": math.nan, "b": [1.0, math.inf], "c": np.float64("nan"), "d": np.arange(2),
              "e": torch.tensor(-math.inf), "f": np.int64(3), "g": True, "h": "café"}
    store.write_json(tmp_path / "v.json", values)
    assert store.read_json(tmp_path / "v.json") == {"a": None, "b": [1.0, None], "c": None, "d": [0, 1], "e": None,
                                                    "f": 3, "g": True, "h": "café"}
    assert "NaN" not in (tmp_path / "v.json").read_text()
    store.write(tmp_path / "m.safetensors", LinearMap((0, 1), numbers(2, 2), numbers(2), None, {"error": math.nan}))
    assert store.read(tmp_path / "m.safetensors").stats == {"error": None}


def test_failed_body_leaves_the_old_file(tmp_path):
    store.write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError), store.atomic(tmp_path / "file") as temporary:
        temporary.write_text("half of the n")
        raise KeyError("broken")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_body_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with pytest.raises(KeyError), store.atomic(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("half")
        raise KeyError("broken")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert temporaries(tmp_path) == []


def test_folder_is_replaced_whole(tmp_path):
    for name in ("old", "new"):
        with store.atomic(tmp_path / "out") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert temporaries(tmp_path) == []


def folder_of(path, name):
    with store.atomic(path) as temporary:
        temporary.mkdir()
        (temporary / name).write_text(name)


def test_a_folder_that_cannot_be_deleted_is_replaced_all_the_same(tmp_path, monkeypatch):
    """NFS keeps files that a process has open, under other names, and then deletes no folder (nextstrain/augur#32).

    What is left is swept when its process is gone and the folder is written again.
    """
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    folder_of(tmp_path / "out", "old")
    monkeypatch.setattr(shutil, "rmtree", busy)
    folder_of(tmp_path / "out", "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for left in temporaries(tmp_path) for path in (tmp_path / left).iterdir()] == ["old"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    inner = os.replace

    def replace(source, target):
        # a mount point, or a quota that is full
        if str(target).endswith("out") and (source / "new").exists():
            raise OSError(18, "Invalid cross-device link", str(source))
        inner(source, target)

    folder_of(tmp_path / "out", "old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="cross-device"):
        folder_of(tmp_path / "out", "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"] and temporaries(tmp_path) == []


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_replaced(tmp_path):
    """Results that lie on another disk."""
    (tmp_path / "scratch/real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "scratch/real")
    folder_of(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "scratch/real/new").read_text() == "new"
    assert temporaries(tmp_path) == temporaries(tmp_path / "scratch") == []


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from kdp_core.base import store
from kdp_core.base.records import LinearMap
from kdp_core.states import hidden
from tests import pico
from tests.kdp_core import stored
folder = Path({folder!r})
record = LinearMap((0, 1), torch.ones(90, 90), torch.ones(90), None, {{}})
model, tokens = pico.model("llama", layers=2), stored.tokens()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
for name, write in (("h.zarr", lambda path: hidden.extract(model, tokens, path)),
                    ("x.json", lambda path: store.write_json(path, ["x" * 9000])),
                    ("x.safetensors", lambda path: store.write(path, record))):
    try:
        write(folder / name)
    except Exception as error:
        print(name, type(error).__name__, error)
"""


def test_a_disk_that_is_full_leaves_nothing_and_is_named(tmp_path):
    """A limit on the size of files, as a quota is: every form of record fails and no part of it is left."""
    code = FULL.format(root=str(Path(__file__).parents[3]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["h.zarr", "x.json", "x.safetensors"], done.stdout + done.stderr
    assert all("too large" in line for line in lines) and list(tmp_path.iterdir()) == []


def test_nothing_at_the_final_path_while_writing(tmp_path):
    with store.atomic(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "file").exists()
        assert temporary.parent == tmp_path, "a rename across file systems would not be atomic"
    assert (tmp_path / "file").read_text() == "new"


def test_refuses_tensors_in_json_and_unknown_suffixes(tmp_path):
    record = LinearMap((0, 1), numbers(2, 2), numbers(2), None, {})
    with pytest.raises(StoreError, match=r"LinearMap holds tensors \(bias_D, weight_DD\); use \.safetensors"):
        store.write(tmp_path / "map.json", record)
    with pytest.raises(StoreError, match="change the suffix"):
        store.write(tmp_path / "map.pt", record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head, message", [
    ({"record": "Gramophone", "fields": {}}, "unknown record 'Gramophone'"),
    ({"record": "Block", "fields": {}}, "unknown record 'Block'"),
    ({"record": "Scores", "fields": {"scores": [], "seconds": 1.0}}, "fields of Scores differ"),
    ({"record": "Scores", "fields": {"scores": [], "seconds": 1.0, "versions": {}, "x": 1}}, "fields of Scores differ"),
    ({"record": "Scores", "fields": {"scores": [{"record": "Score", "task": "a"}], "seconds": 1.0, "versions": {}}},
     "fields of Score differ"),
    ({"ppl": 12.5}, "no record of kdp"), ([1, 2], "no record of kdp"),
])
def test_refuses_other_json(tmp_path, head, message):
    (tmp_path / "x.json").write_text(json.dumps(head))
    with pytest.raises(StoreError, match=message) as error:
        store.read(tmp_path / "x.json")
    assert "x.json" in str(error.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_refuses_foreign_safetensors(tmp_path, metadata):
    save_file({"weight": numbers(2)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(StoreError, match=r"x\.safetensors is no record of kdp"):
        store.read(tmp_path / "x.safetensors")


def test_leftovers_of_killed_writers_are_swept_and_those_of_living_ones_kept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive, other = (tmp_path / f".x.json.{host}-{pid}-abc.tmp" for host, pid in (
        (socket.gethostname(), gone.pid), (socket.gethostname(), os.getpid()), ("elsewhere", gone.pid)))
    dead.mkdir()
    (dead / "half").write_text("")
    alive.write_text("")
    other.write_text("")
    store.write_json(tmp_path / "x.json", {})
    assert not dead.exists() and alive.exists() and other.exists()
