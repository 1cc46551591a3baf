"""The data of the measurements: a model, its calibration tokens and its states.

The data are made once and stored in a folder.
"""
import argparse
import shutil
from functools import cached_property
from pathlib import Path

import embedded
import torch
from transformers import PreTrainedModel

from kdp_core.base.records import Block, ModelFacts, Tokens
from kdp_core.model import checkpoints
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates

LONGER = 256
"""Number of sequences of a set with twice the tokens of the default calibration set."""


class Setup:
    """The embedded model, and the options of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.repeats, self.quick = options, options.repeats, options.quick
        self.folder: Path = options.out / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)

    def size(self, full: int, quick: int) -> int:
        """The size of a measurement: `full`, or `quick` with --quick."""
        return quick if self.quick else full

    @cached_property
    def _converted(self) -> tuple[Path, ModelFacts]:
        return embedded.dense_model(self.folder, embedded.default_config())

    @property
    def dense(self) -> Path:
        """The folder of the dense checkpoint."""
        return self._converted[0]

    @property
    def facts(self) -> ModelFacts:
        """The facts of the dense model."""
        return self._converted[1]

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model, float32, on the CPU."""
        return checkpoints.load_model(self.dense)

    @cached_property
    def tokens(self) -> Tokens:
        """The default calibration set, or its first sequences with --quick."""
        found = embedded.calibration_tokens(self.dense, embedded.default_config())
        return first(found, self.size(len(found.ids_ST), 16))

    @cached_property
    def hidden(self) -> HiddenStates:
        """All states of the model over `tokens`, extracted unless they are on disk."""
        return self._states(self.tokens)

    @cached_property
    def longer(self) -> HiddenStates:
        """All states of the model over LONGER sequences of the same text; with --quick those of `hidden`."""
        config = embedded.default_config()
        return self.hidden if self.quick else self._states(
            embedded.calibration_tokens(self.dense, config, sequences=LONGER))

    def _states(self, tokens: Tokens) -> HiddenStates:
        path = self.folder / f"hidden-{len(tokens.ids_ST)}.zarr"
        if not path.exists():
            hidden.extract(self.model, tokens, path)
        return hidden.read(path)

    @property
    def block(self) -> Block:
        """The block for which stand-ins are fitted: two layers in the middle of the model.

        In the embedded model this block is 14-16.
        """
        start = self.facts.layers // 2 - 1
        return start, start + 2

    def scratch(self, name: str) -> Path:
        """The path `name` in the folder of the measurement. Files that an earlier run left at this path are deleted
        first."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def first(tokens: Tokens, sequences: int) -> Tokens:
    """Only the first sequences."""
    return tokens._replace(ids_ST=tokens.ids_ST[:sequences].clone(), sources=tokens.sources[:sequences])


def made_up(tokens: Tokens, sequences: int, vocabulary: int) -> Tokens:
    """`sequences` sequences of random token ids, each as long as the sequences in `tokens`."""
    generator = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(vocabulary, (sequences, tokens.ids_ST.shape[1]), generator=generator)
    return tokens._replace(ids_ST=ids_ST, sources=["made up"] * sequences)
