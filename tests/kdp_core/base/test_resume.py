"""Trainings cut short: every trainer, cut again and again, ends in the bits of an undisturbed one; what is ignored."""
import itertools
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base import store
from kdp_core.base.records import Plan, Selection
from kdp_core.base.resume import OFF, Progress, Resume, Stopped
from kdp_core.methods import METHODS, replaceme
from kdp_core.methods.kdp import inverse, kernel
from kdp_core.methods.kdp_residual.compose import compose as compose_residual
from kdp_core.model import checkpoints
from kdp_core.prune import finetune
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates
from tests import pico
from tests.kdp_core import stored

BLOCK = (1, 4)
KERNEL = dict(features=16, rank=2, epochs=3, batch_sequences=5, heldout=0.2)


class Killed(Exception):
    """Ends a training from outside, as a signal would."""


class Cut(Resume):
    """Saves after every update, and is killed after some of them."""

    def __init__(self, path, after, key="key"):
        super().__init__(path, key, every_s=0)
        self.left = after

    def save(self, state):
        done = super().save(state)
        self.left -= 1
        if not self.left:
            raise Killed
        return done


class Made(NamedTuple):
    """A pico model with its states over a few sequences."""
    root: Path
    hidden: HiddenStates
    tokens: Any
    selection: Selection
    facts: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root, tokens = tmp_path_factory.mktemp("resume"), stored.tokens()
    pico.save(root / "dense", layers=6)
    hidden.extract(checkpoints.load_model(root / "dense"), tokens, root / "h.zarr", dtype="float32")
    facts = fold(Plan("made_up", [(2, "whole")], [], {}), root / "dense", root / "pruned")
    selection = Selection([BLOCK], [1.0], "made up", 0.2, 0.2, 0.9, 3, [], 3)
    return Made(root, hidden.read(root / "h.zarr"), tokens, selection, facts)


def fit_finetune(made, resume, **options):
    shutil.rmtree(made.root / "tuned", ignore_errors=True)
    return finetune.finetune(made.root / "dense", made.root / "pruned", made.root / "tuned", made.tokens, made.facts,
                             resume=resume, rank=2, lr=0.01, dropout=0.3, epochs=3, batch_sequences=6, **options)


def compose(function, **options):
    return lambda made, resume: function(made.root / "dense", made.hidden, made.tokens, made.selection, resume=resume,
                                         **options)


TRAINERS = {
    **{f"kernel, {every}": lambda made, resume, every=every: kernel.fit(
        made.hidden, BLOCK, **KERNEL, ols_every=every, decode_every=2, resume=resume)
       for every in ("iteration", "epoch", "start")},
    **{f"inverse, {keep}": lambda made, resume, keep=keep: inverse.fit(
        made.hidden, kernel.fit(made.hidden, BLOCK, **KERNEL), width=8, epochs=3, lr=0.05, keep=keep, heldout=0.2,
        resume=resume) for keep in ("best", "last")},
    "joint": compose(compose_residual, entries=4, epochs=3, lr=0.01, batch_sequences=5, positions=8),
    "streamline": compose(METHODS["streamline"].compose, epochs=3, lr=0.01, batch_sequences=5),
    "replaceme": compose(replaceme.compose_cosine, epochs=3, lr=0.01, batch_tokens=100),
    "finetune": fit_finetune,
    "finetune, linear": partial(fit_finetune, targets="linear"),
}


def faults(one, other, place=""):
    """Where two records differ in a bit, times aside."""
    if hasattr(one, "_asdict"):
        one, other = one._asdict(), other._asdict()
    if isinstance(one, dict):
        assert list(one) == list(other)
        return [fault for key in one if not key.startswith("seconds")
                for fault in faults(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        return [fault for number, pair in enumerate(zip(one, other, strict=True))
                for fault in faults(*pair, f"{place}.{number}")]
    return [] if (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other) else [place]


def cut_to_the_end(fit, made, path, after):
    """The record of a training that is killed after every few updates; and how often it was."""
    for kills in itertools.count():
        try:
            return fit(made, Cut(path, after)), kills
        except Killed:
            assert path.exists()


@pytest.mark.parametrize("name, after", [*((name, 3) for name in TRAINERS), ("kernel, epoch", 1), ("inverse, best", 1),
                                         ("finetune", 1)])
def test_a_training_cut_short_again_and_again_ends_in_the_same_bits(made, name, after, tmp_path, caplog):
    caplog.set_level(logging.INFO, "kdp_core")
    whole = TRAINERS[name](made, OFF)
    assert "resumed" not in caplog.text
    record, kills = cut_to_the_end(TRAINERS[name], made, tmp_path / "state.safetensors", after)
    assert kills >= 3 and caplog.text.count("resumed at epoch") == kills
    assert faults(whole, record) == []


def test_the_folder_of_a_resumed_finetuning_is_the_same(made, tmp_path):
    folders = []
    for resume in (OFF, Cut(tmp_path / "s", 2), Resume(tmp_path / "s", "key")):
        try:
            fit_finetune(made, resume)
            folders.append({path.name: path.read_bytes() for path in (made.root / "tuned").iterdir()})
        except Killed:
            assert not (made.root / "tuned").exists()
    assert len(folders) == 2 and folders[0] == folders[1]


def test_differences_are_seen():
    one = {"a": [torch.zeros(2), 1.0], "seconds": 1.0, "b": {"c": math.inf}}
    assert faults(one, {**one, "seconds": 2.0}) == []
    assert faults(one, {**one, "a": [torch.tensor([0.0, 1e-40]), 1.0]}) == [".a.0"]
    assert faults(one, {**one, "b": {"c": 1.0}}) == [".b.c"]


def progress_of(resume):
    """Five updates an epoch of plain SGD with momentum on one weight, and a generator that every update draws from."""
    weight, generator = torch.nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(0)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    return weight, generator, sgd, Progress(resume, [weight], {"sgd": sgd, "noise": generator}, sums=0.0, curve=[])


def train(resume, seen=None):
    weight, generator, sgd, progress = progress_of(resume)
    for epoch in progress.epochs(4):
        order = progress.order(lambda: torch.randperm(10, generator=generator))
        for rows in progress.updates(order.split(2)):
            sgd.zero_grad()
            ((weight - rows.float().mean()) * torch.randn(3, generator=generator)).sum().backward()
            sgd.step()
            progress.values["sums"] += rows.float().mean().item()
            if seen:
                seen(epoch, progress.update)
        progress.values["curve"].append(progress.values["sums"])
    return weight.detach(), progress.values["curve"]


@pytest.mark.parametrize("at", [(1, 0), (2, 3), (3, 4), (4, 4)])
def test_a_training_that_is_asked_to_stop_saves_after_the_update_in_hand_and_goes_on_there(at, tmp_path, caplog):
    caplog.set_level(logging.INFO, "kdp_core")
    resume = Resume(tmp_path / "s", "key", every_s=1e9)
    with pytest.raises(Stopped, match=f"stopped at epoch {at[0]}, update {at[1] + 2}; the next run continues there"):
        train(resume, lambda *now: now == at and resume.stop())
    updates = []
    again = Resume(tmp_path / "s", "key")
    weight, curve = train(again, lambda *now: updates.append(now))
    assert f"resumed at epoch {at[0]}, update {at[1] + 2}" in caplog.text
    assert updates == [(epoch, update) for epoch in range(1, 5) for update in range(5) if (epoch, update) > at]
    whole, whole_curve = train(OFF)
    assert torch.equal(weight, whole) and curve == whole_curve and again.earlier_s > 0


def test_nothing_is_stopped_where_no_training_is_under_way(tmp_path):
    resume = Resume(tmp_path / "s", "key")
    assert not resume.stop() and not resume.asked
    train(resume)
    assert not resume.stop() and not (tmp_path / "s").exists(), "300 seconds are not over"
    assert not OFF.stop()


def test_states_are_saved_when_due_only(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr("kdp_core.base.resume.time.perf_counter", lambda: now[0])
    resume = Resume(tmp_path / "s", "key", every_s=10)
    monkeypatch.setattr(resume, "save", lambda state: saved.append((state["epoch"], state["update"], state["seconds"])))

    def passes(epoch, update):
        now[0] += 4

    train(resume, passes)
    assert saved == [(1, 3, 12.0), (2, 1, 24.0), (2, 4, 36.0), (3, 2, 48.0), (3, 5, 60.0), (4, 3, 72.0)]


def test_judging_does_not_count(monkeypatch):
    now = [5.0]
    monkeypatch.setattr("kdp_core.base.resume.time.perf_counter", lambda: now[0])
    *_, progress = progress_of(OFF)
    now[0] += 2
    with progress.judging():
        now[0] += 100
    assert progress.seconds() == 2


def cut_at(path, saves, key="key"):
    with pytest.raises(Killed):
        train(Cut(path, saves, key))


def test_a_state_of_another_key_is_ignored_and_said_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "kdp_core")
    cut_at(tmp_path / "s", 7, key="other")
    weight, curve = train(Resume(tmp_path / "s", "key"))
    assert "is ignored: the options, data, code or machine have changed" in caplog.text and "resumed" not in caplog.text
    assert torch.equal(weight, train(OFF)[0]) and curve == train(OFF)[1]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-20]),
                                   lambda path: path.write_bytes(b""),
                                   lambda path: path.write_text("no state")])
def test_a_broken_state_is_ignored_and_said_so(spoil, tmp_path, caplog):
    cut_at(tmp_path / "s", 7)
    spoil(tmp_path / "s")
    weight, _ = train(Resume(tmp_path / "s", "key"))
    assert "cannot be read and is ignored" in caplog.text and torch.equal(weight, train(OFF)[0])


def test_a_kill_while_writing_leaves_the_state_before_and_nothing_in_the_end(tmp_path, monkeypatch):
    cut_at(tmp_path / "s", 7)
    before = (tmp_path / "s").read_bytes()
    # what a killed process leaves: the file half written under its temporary name
    half = tmp_path / ".s.elsewhere-1-0123abcd.tmp"
    half.write_bytes(before[:100])
    resume = Resume(tmp_path / "s", "key")
    weight, _ = train(resume)
    assert torch.equal(weight, train(OFF)[0]) and (tmp_path / "s").read_bytes() == before
    resume.remove()
    assert list(tmp_path.iterdir()) == []
    resume.remove()
    OFF.remove()


def test_a_disk_that_takes_no_state_costs_a_warning(tmp_path, caplog):
    (tmp_path / "full").write_text("a file where the folder should be")
    resume = Resume(tmp_path / "full" / "s", "key", every_s=0)
    weight, _ = train(resume)
    assert "could not be written" in caplog.text and torch.equal(weight, train(OFF)[0])
    with pytest.raises(Stopped, match="its state could not be written"):
        train(resume, lambda *now: resume.stop())


def test_states_keep_every_bit(tmp_path):
    state = {"a": {"b": [torch.tensor([1e-40, -0.0]), 0.1 + 0.2, math.inf, None]}, "t": torch.ones(2, 2).bfloat16().T,
             "n": "words", "same": torch.arange(3)}
    state["again"] = state["same"]
    store.write_state(tmp_path / "s", state)
    assert faults(state, store.read_state(tmp_path / "s")) == []
