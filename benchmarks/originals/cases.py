"""The data of a comparison with the authors' code, a pair of runs, and the rows that compare their results.

Both runs of a pair start with the loaded model and with token ids in memory, and end with the result in memory: chosen
layers, or new weights. Every run gets a model that was loaded before; the loading is not timed. If our fit reads stored
states, the run of our fit includes their extraction, although the workflow extracts states only once for all methods.
The states are stored in float32, because no original rounds them. Nothing else is written to disk.
"""
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stage.setup import first
from stage.timing import Row, figure
from torch import Tensor
from transformers import PreTrainedModel

from kdp_core.base.records import Block, ModelFacts, Selection, Tokens
from kdp_core.model import checkpoints
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates

LOAD = checkpoints.load_model
"""Loads a model. During a run of our fit, `checkpoints.load_model` returns the model that was loaded before."""


class Case(NamedTuple):
    """The data of a comparison."""
    clone: Path
    """The clone of the authors' repository."""
    dense: Path
    facts: ModelFacts
    tokens: Tokens
    folder: Path
    """Folder for states and other temporary files."""
    loaded: list[PreTrainedModel]
    """The model of the next run, once `load` was called."""

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.tokens.ids_ST)

    @property
    def length(self) -> int:
        """Number of tokens of a sequence."""
        return self.tokens.ids_ST.shape[1]

    @property
    def work(self) -> str:
        """The number of tokens in words."""
        return f"{self.count} sequences of {self.length} tokens"

    def some(self, sequences: int, length: int | None = None) -> "Case":
        """The same case with at most this number of sequences, and with shorter sequences if `length` is given."""
        tokens = first(self.tokens, sequences)
        return self._replace(tokens=tokens._replace(ids_ST=tokens.ids_ST[:, :length].contiguous()))

    def load(self) -> None:
        """Load the model for the next run, which may change it."""
        self.loaded[:] = [LOAD(self.dense)]

    def model(self) -> PreTrainedModel:
        """The loaded model."""
        return self.loaded[0]

    def states(self, layers: list[int] | None = None) -> HiddenStates:
        """Extract the states of these layers; None means all."""
        path = self.folder / "hidden.zarr"
        shutil.rmtree(path, ignore_errors=True)
        hidden.extract(self.model(), self.tokens, path, layers=layers, dtype="float32")
        return hidden.read(path)

    def batches(self, size: int) -> Sequence[Tensor]:
        """The token ids in batches of `size` sequences."""
        return self.tokens.ids_ST.split(size)

    def block(self, layers: int) -> Block:
        """A block of this number of layers in the middle of the model."""
        start = (self.facts.layers - layers) // 2
        return start, start + layers


class Pair(NamedTuple):
    """Two runs that do the same work."""
    case: Case
    work: str
    """The work of each run, in words."""
    ours: Callable[[], Any]
    original: Callable[[], Any]
    compare: Callable[[Any, Any], list[Row]]
    """(our result, result of the original) -> rows that compare them."""


class Original(NamedTuple):
    """The authors' code of a method."""
    repository: str
    """owner/name on GitHub. The clone is the folder `name`."""
    commit: str
    """The commit for which the comparison was written."""
    pair: Callable[[Case], Pair]

    @property
    def folder(self) -> str:
        """The name of the clone's folder."""
        return self.repository.split("/")[1]


Tensors = dict[str, Tensor]
"""Name of a weight in the state dict -> its value."""


def selection(blocks: Sequence[Block] = (), *, ratio: float = 0.0, layers: int = 0) -> Selection:
    """A selection with these blocks, for a fit that reads only the given fields."""
    return Selection(list(blocks), [0.0] * len(blocks), "given", ratio, 0.0, 0.0, 3, [], layers)


def same_order(ours: Sequence[Any], theirs: Sequence[Any]) -> list[Row]:
    """How many of the chosen layers or parts are the same and at the same place of the order."""
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return [figure("the same choice at the same place", equal, "", "of", len(theirs), target=1.0)]


def same_zeros(where: str, ours: Tensors, theirs: Tensors, least: float | None) -> Row:
    """The share of our weights that are zero on both sides or on neither side."""
    equal = sum(int(((ours[name] == 0) == (theirs[name] == 0)).sum()) for name in ours)
    total = sum(weight.numel() for weight in ours.values())
    return figure(f"share of the weights {where} that both or neither set to zero", equal / total, "", "of", 1.0,
                  target=least)


def difference(ours: Tensors, theirs: Tensors, most: float | None, what: str = "weights") -> Row:
    """The largest relative difference of a matrix, |ours - theirs| / |theirs|."""
    worst = max((relative(ours[name], theirs[name]) for name in ours), default=0.0)
    if most is None:
        return figure(f"largest relative difference of {what}", worst, "", "none would be", 1.0)
    return figure(f"largest relative difference of {what}", worst, "", "limit", most, target=1.0, at_most=True)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| with Frobenius norms."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def linear_weights(model: PreTrainedModel) -> Tensors:
    """The weights of the linear maps in the decoder layers."""
    return {f"{name}.weight": module.weight.detach() for name, module in model.named_modules()
            if ".layers." in f".{name}" and isinstance(module, torch.nn.Linear)}
