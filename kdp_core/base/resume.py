"""Save and restore the state of a training. From the saved state, an interrupted training continues and gives the same
bits as a training without interruption.

The result of a training depends only on its data, its options and its state. The state contains the learned weights,
the optimiser, the schedule, the generators, the order of the current epoch, and the running sums. The state is written
to one safetensors file after an update or an epoch. The interval between two writes is `every_s` seconds. The state is
also written when the process is asked to stop. Saving only reads values, so the times and the number of saves do not
change the result.

Each training has its own file. The file contains a key. Two keys differ if the data, the options, the code or the
machine differ. A file is ignored if its key differs from the key of the training, or if the file cannot be read.
"""
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kdp_core.base import store

logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """Raised after a training was asked to stop and has saved its state."""


class Resume:
    """The file in which one training stores its state, and whether the training was asked to stop. Without a path no
    state is stored."""

    def __init__(self, path: Path | None = None, key: str = "", every_s: float = 300.0) -> None:
        """key: identifies everything on which the result depends. every_s: seconds between two saves."""
        self.path, self.key, self.every_s = path, key, every_s
        self.asked, self.training, self.earlier_s = False, False, 0.0

    def stop(self) -> bool:
        """Ask the training to save its state and to stop after its next update. Returns False if no training is running
        or if no state is stored."""
        self.asked = self.training and self.path is not None
        return self.asked

    def load(self) -> dict[str, Any] | None:
        """The saved state of this training, or None if there is no saved state. If a file is ignored, the reason is
        logged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state = store.read_state(self.path)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s cannot be read and is ignored: %s", self.path, error)
            return None
        if state["key"] != self.key:
            logger.info("%s is ignored: the options, data, code or machine have changed", self.path)
            return None
        return state

    def save(self, state: dict[str, Any]) -> bool:
        """Write a state. If the state cannot be written, for example on a full disk, a warning is logged and the
        training continues."""
        try:
            store.write_state(self.path, {**state, "key": self.key})
        except (OSError, SafetensorError) as error:
            logger.warning("the state of the training could not be written: %s", error)
            return False
        return True

    def remove(self) -> None:
        """Delete the state file. Call this only after the result is written."""
        if self.path is not None:
            store.remove(self.path)


OFF = Resume()
"""No state is stored."""


class Progress:
    """The progress of a training. A `Progress` restores the saved state when it is created, and it saves the state
    between updates.

        progress = Progress(resume, weights, {"adam": adam, "order": generator}, curve=[], best=0)
        for epoch in progress.epochs(epochs):
            order = progress.order(lambda: torch.randperm(len(data), generator=generator))
            for which in progress.updates(order.split(batch)):
                ...

    `values` contains what the loop needs from one update to the next: numbers, texts, tensors, and lists and dicts of
    numbers, texts and tensors.
    """

    def __init__(self, resume: Resume, weights: Sequence[Tensor], states: dict[str, Any], **values: Any) -> None:
        """weights: the restored weights are copied into these tensors. states: optimisers, schedules and generators.
        values: the values at the start."""
        self.values, self.weights, self.states, self._resume = values, list(weights), states, resume
        self.epoch, self.update, self._order = 1, 0, None
        self._began = self._clock = self._saved = time.perf_counter()
        if state := resume.load():
            self._restore(state)
            logger.info("resumed at epoch %d, update %d", self.epoch, self.update + 1)

    def epochs(self, count: int) -> Iterator[int]:
        """The number of each remaining epoch, from the current epoch to `count`. An interrupted epoch continues at its
        next update."""
        self._resume.training = True
        for epoch in range(self.epoch, count + 1):
            yield epoch
            self.epoch, self.update, self._order = epoch + 1, 0, None
            self._pause()
        self._resume.training = False

    def order(self, draw: Callable[[], Tensor]) -> Tensor:
        """The order of this epoch, drawn at random when the epoch starts."""
        if self._order is None:
            self._order = draw()
        return self._order

    def updates(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The remaining batches of this epoch."""
        for batch in batches[self.update:]:
            yield batch
            self.update += 1
            self._pause()

    def seconds(self) -> float:
        """Seconds that this training has taken so far, with earlier runs and without the time inside `judging`."""
        return time.perf_counter() - self._clock

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Exclude the time of a `with` block from `seconds`, because a training recipe does not include the judging of
        an epoch."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _pause(self) -> None:
        """Save the state if `every_s` seconds have passed. If the training was asked to stop, save the state and raise
        Stopped."""
        asked, now = self._resume.asked, time.perf_counter()
        if self._resume.path is None or not (asked or now - self._saved >= self._resume.every_s):
            return
        saved, self._saved = self._resume.save(self._state()), now
        if asked:
            raise Stopped(f"stopped at epoch {self.epoch}, update {self.update + 1}; " + (
                "the next run continues there" if saved else "its state could not be written"))

    def _state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "update": self.update, "order": self._order, "values": self.values,
                "seconds": self.seconds(), "whole_s": self._resume.earlier_s + time.perf_counter() - self._began,
                "weights": self.weights, "states": {name: _taken(part) for name, part in self.states.items()}}

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.update, self._order = state["epoch"], state["update"], state["order"]
        self.values = state["values"]
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)
        for name, part in self.states.items():
            _put(part, state["states"][name])
        self._resume.earlier_s, self._clock = state["whole_s"], time.perf_counter() - state["seconds"]


def _taken(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _put(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, torch.optim.Optimizer):
        # JSON keys are strings, and an optimiser needs whole numbers
        part.load_state_dict({**state, "state": {int(key): value for key, value in state["state"].items()}})
    else:
        part.load_state_dict(state)
