"""Hidden states for the tests of fits: a pico model's, or made-up ones in the layout that `extract` writes."""
from pathlib import Path

import torch
import zarr
from torch import Tensor

from kdp_core.base import texts
from kdp_core.base.records import Tokens
from kdp_core.states import chunks, hidden
from kdp_core.states.hidden import HiddenStates
from tests import pico


def tokens(sequences: int = 16, length: int = 24) -> Tokens:
    """Packed pico documents."""
    return texts.pack(pico.tokenizer(), [texts.Part("news", pico.documents(40), sequences)], length=length, seed=0)


def of_pico(path: Path, family: str = "llama") -> HiddenStates:
    """All states of a pico model."""
    hidden.extract(pico.model(family), tokens(), path)
    return hidden.read(path)


def write(path: Path, h_LSTD: Tensor, massive_factor: float = 8.0, batch: int | None = None) -> HiddenStates:
    """These states, float32, numbered from 0, in chunks of `batch` sequences (None: all)."""
    group = zarr.create_group(path, zarr_format=3)
    norm_LST = h_LSTD.norm(dim=-1)
    massive_LST = norm_LST > massive_factor * norm_LST.flatten(1).median(dim=1).values[:, None, None]
    for name, values in (("states", h_LSTD), ("norm", norm_LST), ("massive", massive_LST)):
        size = batch if batch and name == "states" else values.shape[1]
        group.create_array(name, data=values.numpy(), chunks=(1, size, *values.shape[2:]), **chunks.PLAIN)
    group.attrs.update({"layers": list(range(len(h_LSTD))), "massive_factor": massive_factor, "provenance": {}})
    return hidden.read(path)


def drift(states: int = 4, sequences: int = 12, length: int = 24, width: int = 6, seed: int = 0) -> Tensor:
    """h_LSTD of a smooth nonlinear recursion, each step a small tanh network: the residual stream in small."""
    generator = torch.Generator().manual_seed(seed)
    h_STD = torch.randn(sequences, length, width, generator=generator)
    made = [h_STD]
    for _ in range(states - 1):
        w_DD = torch.randn(width, width, generator=generator) / width ** 0.5
        made.append(made[-1] + 0.3 * torch.tanh(made[-1] @ w_DD))
    return torch.stack(made)
