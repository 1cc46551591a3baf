"""Checkpoints share the files of equal layers, and each is a whole checkpoint for all that."""
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints, shards
from kdp_core.prune import finetune
from kdp_core.prune.fold import fold
from tests import pico

IDS_ST = torch.arange(2, 26).view(2, 12)
STAND_IN = Module((6, 8), "affine", {"width": 32, "bypass_above": None},
                  {"map.weight": torch.eye(32), "map.bias": torch.ones(32)})
PLANS = {"low": Plan("m", [(6, "whole"), (7, "whole")], [], {}),
         "folded": Plan("m", [(6, "whole"), (7, "whole")], [STAND_IN], {}),
         "changed": Plan("m", [(8, "whole")], [], {"model.layers.1.mlp.down_proj.weight": torch.zeros(32, 64)})}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the dense checkpoint and three pruned ones that share files, and the same without."""
    root = tmp_path_factory.mktemp("shards")
    source = pico.save(root / "source", "llama")
    for name, pool in (("links", root / "links" / shards.POOL), ("copies", None)):
        checkpoints.convert(source, root / name / "dense", dtype="float32", source="made", shared=pool)
        for plan, own in PLANS.items():
            fold(own, root / name / "dense", root / name / plan, shared=pool)
    return root


def disk(folder):
    """Bytes of all files of a folder, each file on disk once."""
    return sum({(found := path.stat()).st_ino: found.st_size for path in folder.rglob("*.safetensors")}.values())


def logits(folder):
    with torch.no_grad():
        return checkpoints.load_model(folder)(IDS_ST).logits


def inodes(folder):
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", ["dense", *PLANS])
def test_a_shared_checkpoint_is_the_same_model(made, tmp_path, name):
    assert torch.equal(logits(made / "links" / name), logits(made / "copies" / name))
    # a copy is whole
    away = shutil.copytree(made / "links" / name, tmp_path / "away")
    assert torch.equal(logits(away), logits(made / "copies" / name))


def test_equal_layers_are_one_file_on_disk(made):
    dense, low, folded, changed = (inodes(made / "links" / name) for name in ("dense", *PLANS))
    # six layers before the cut and the rest: embedding and final norm; then the two layers after it
    assert len(dense & low) == 7 and len(low) == 9
    assert len(low & folded) == 9 and len(folded) == 10
    # of ten layers one is changed, one gone, and one has another number
    assert len(dense & changed) == 8
    assert disk(made / "links") < 0.55 * disk(made / "copies")


def test_shared_files_cannot_be_written_by_accident(made):
    assert all(path.stat().st_mode & 0o222 == 0 for path in (made / "links").rglob("*.safetensors"))


def test_a_file_of_no_checkpoint_is_deleted_and_the_others_stay(made, tmp_path):
    work = tmp_path / "work"
    pool = work / shards.POOL
    checkpoints.convert(made / "source", work / "dense", dtype="float32", source="made", shared=pool)
    fold(PLANS["low"], work / "dense", work / "low", shared=pool)
    before = len(list(pool.iterdir()))
    shutil.rmtree(work / "low")
    fold(PLANS["changed"], work / "dense", work / "changed", shared=pool)
    assert before == 13 and len(list(pool.iterdir())) == 11 + 2
    assert torch.equal(logits(work / "dense"), logits(made / "copies/dense"))


def test_without_links_the_files_are_written(made, tmp_path, monkeypatch):
    def refuse(*places):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    fold(PLANS["low"], made / "copies/dense", tmp_path / "low", shared=tmp_path / shards.POOL)
    assert torch.equal(logits(tmp_path / "low"), logits(made / "copies/low"))
    assert list((tmp_path / shards.POOL).iterdir()) == []


def test_a_changed_copy_leaves_the_shared_files_as_they_are(made, tmp_path):
    """Fine-tuning writes into a copy of a checkpoint that shares its files."""
    before = logits(made / "links/low")
    folder = shutil.copytree(made / "links/low", made / "links/tuned", copy_function=shards.link_or_copy)
    assert inodes(folder) == inodes(made / "links/low")
    name = "model.layers.0.mlp.down_proj.weight"
    finetune.put(folder, {name: torch.zeros(32, 64)})
    assert torch.equal(logits(made / "links/low"), before) and not torch.equal(logits(folder), before)
    assert len(inodes(folder) & inodes(made / "links/low")) == 8
    changed, = (path for path in folder.glob("*.safetensors") if name in load_file(path))
    assert not load_file(changed)[name].any()
    shutil.rmtree(folder)


def test_two_jobs_that_place_the_same_file_at_once_share_it(tmp_path, monkeypatch):
    pool, link, calls = tmp_path / shards.POOL, os.link, []
    pool.mkdir()

    def late(source, target):
        """The other job places the file after this job has found none in the pool."""
        calls.append(target)
        if len(calls) == 1:
            shards._place(b"content", tmp_path / "other", pool)
            raise FileNotFoundError
        link(source, target)

    monkeypatch.setattr(shards.os, "link", late)
    shards._place(b"content", tmp_path / "one", pool)
    assert len(calls) == 5 and (tmp_path / "one").samefile(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [shards.POOL, "one", "other"]
