"""What the tests of methods that remove heads and channels share: dense models, runs, and a literal look at writers."""
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Composed, Selection
from kdp_core.methods import METHODS
from kdp_core.model import checkpoints
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates
from tests import pico
from tests.kdp_core import stored

LAYERS, HEADS, CHANNELS, HEAD = 5, 4, 64, 8
TOKENS = stored.tokens(sequences=12)
IDS_ST = torch.arange(2, 42).view(2, 20)
"""Longer than the sliding windows."""
WRITERS = {"opt": {"attention": "self_attn.out_proj", "mlp": "fc2"}}
GATED = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
READERS = {"opt": {"attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "mlp": ["fc1"]}}
GATED_READERS = {"attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                 "mlp": ["mlp.gate_proj", "mlp.up_proj"]}


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Path
    model: Any
    hidden: HiddenStates
    groups: int
    """Key-value heads."""

    @property
    def family(self) -> str:
        return self.model.config.model_type

    def writer(self, model: nn.Module, layer: int, part: str) -> nn.Linear:
        """The map of a model of this family that writes what a part adds."""
        return layers_of(model)[layer].get_submodule(WRITERS.get(self.family, GATED)[part])

    def readers(self) -> dict[str, list[str]]:
        """Names below a layer, by part."""
        return READERS.get(self.family, GATED_READERS)

    def units(self, part: str) -> int:
        """Units of a part of each layer."""
        return self.groups if part == "attention" else CHANNELS


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def dense_of(root: Path, family: str) -> Dense:
    """A pico model whose weights and biases are all of some size."""
    model = pico.lively(pico.model(family, layers=LAYERS))
    model.save_pretrained(root / "model")
    hidden.extract(model, TOKENS, root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"), HEADS if family == "opt" else 2)


def composed(method: str, dense: Dense, ratio: float, **options: Any) -> Composed:
    selection = Selection([], [], "weights", ratio, ratio, 0.7, 3, [], 0)
    return METHODS[method].compose(dense.folder, dense.hidden, TOKENS, selection, **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS_ST, use_cache=False).logits


@torch.no_grad()
def inputs(model: nn.Module, writer: nn.Linear) -> Tensor:
    """What a writer reads in the model's own forward pass over the calibration set, x_NC, float64."""
    caught: list[Tensor] = []
    hook = writer.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, -2).double()))
    model(TOKENS.ids_ST, use_cache=False)
    hook.remove()
    return torch.cat(caught)


def replacing(writer: nn.Linear, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes what a writer reads."""
    return writer.register_forward_pre_hook(lambda _, args: (change(args[0]),))


def load(folder: Path) -> nn.Module:
    return checkpoints.load_model(folder)
