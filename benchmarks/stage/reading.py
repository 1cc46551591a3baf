"""Compares reading one layer from the store of hidden states with reading a memory-mapped file of the same bytes.

Both reads return float32 in memory. Before a `cold` read, the operating system is asked to drop the files from its
cache. The rate is the number of stored bytes per second. A further row of the table tests, without timing, that values
too large for float16 are stored correctly.
"""
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import nn

from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates
from stage.setup import Setup, first
from stage.timing import Row, figure, in_turns

GOAL_GB_S = 1.5
"""Smallest allowed rate of a warm read, in 10^9 bytes a second."""


def measure(setup: Setup) -> list[Row]:
    """Measure cold and warm reads of one layer, and test values that are too large for float16."""
    states, layer = setup.hidden, setup.block[0]
    place = states.index(layer)
    with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
        raw = Path(folder) / "layer.raw"
        stored = states.state(layer).to(getattr(torch, str(zarr.open_group(states.path, mode="r")["states"].dtype)))
        raw.write_bytes(stored.numpy().tobytes())
        runs = {"ours": lambda: states.state(layer), "mapped": lambda: mapped(raw, stored)}
        warm = in_turns(runs, 4 * setup.repeats)
        cold = in_turns(runs, setup.repeats, before=lambda: forget([*states.path.glob(f"states/c/{place}/**/*"), raw]))
        gigabytes = raw.stat().st_size / 1e9
    return [cold.row("one layer, cold", "ours", "mapped", target=1.0, against="memory-mapped file"),
            warm.row("one layer, warm", "ours", "mapped", against="memory-mapped file"),
            figure("one layer, warm", gigabytes / warm.seconds("ours"), "GB/s", "goal", GOAL_GB_S, target=1.0,
                   cpu=gigabytes / warm.seconds("ours", "cpu")),
            guard(setup)]


def mapped(path: Path, like: torch.Tensor) -> torch.Tensor:
    """Read a layer from one raw file into float32."""
    array = np.memmap(path, dtype=like.numpy().dtype, mode="c", shape=tuple(like.shape))
    return torch.from_numpy(array).float()


def forget(files: Iterable[Path]) -> None:
    """Ask the operating system to drop these files from its cache."""
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def guard(setup: Setup) -> Row:
    """Test that states too large for float16 are stored as float32.

    The largest stored value must exceed the largest value of float16.
    """
    model = checkpoints.load_model(setup.dense)
    grown = decoder_layers(model)[0].register_forward_hook(_grow)
    path = setup.scratch("overflow.zarr")
    hidden.extract(model, first(setup.tokens, 2), path, layers=[0, 1])
    grown.remove()
    return figure("largest state of a model that overflows", largest(hidden.read(path)), "", "float16's largest",
                  hidden.HALF_MAX, target=1.0)


def _grow(_: nn.Module, args: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    """A hook that scales a layer's output so that its largest value is 100,000."""
    h_BTD = output[0] if isinstance(output, tuple) else output
    h_BTD = h_BTD * (1e5 / h_BTD.abs().max())
    return (h_BTD, *output[1:]) if isinstance(output, tuple) else h_BTD


def largest(states: HiddenStates) -> float:
    """The largest absolute value of the stored state 1, which is the output of layer 0. An infinite value gives
    infinity."""
    return states.state(1).abs().max().item()
