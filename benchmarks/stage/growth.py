"""Measures how time and memory grow with tokens and layers, as exponents that are fitted on logarithms.

An exponent of 1 means that twice as many tokens or layers need twice the time. The models have random weights and a
small width. In the measurements over tokens, the models also have few layers. Memory is the growth of the resident set
during the call. `python benchmarks/grid_scale.py` measures how planning grows with the points of a grid
(docs/scale.md).
"""
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdp_core.base.records import Tokens
from kdp_core.methods.kdp import linear
from kdp_core.score import efficiency
from kdp_core.states import hidden, similarity
from stage.setup import Setup
from stage.timing import Row, figure, timed

LENGTH, WIDTH = 128, 64
MOST = 1.05
"""Largest allowed exponent."""


def measure(setup: Setup) -> list[Row]:
    """Measure extraction, CKA and a closed form against tokens, and extraction against layers."""
    tokens = [2_048, 8_192, 32_768] if setup.quick else [2_048, 8_192, 32_768, 131_072, 524_288]
    layers = [6, 12] if setup.quick else [6, 12, 24, 48, 80]
    found = [at_tokens(setup, count) for count in tokens]
    rows = [grown(f"{name} against {tokens[0]:,} to {tokens[-1]:,} tokens", tokens, [one[name] for one in found])
            for name in found[0]]
    depth = [repeated(lambda count=count: extract(setup, made(count), 2_048), setup.repeats) for count in layers]
    return [*rows, grown(f"extraction, seconds against {layers[0]} to {layers[-1]} layers", layers, depth)]


def grown(measure: str, sizes: Sequence[int], values: Sequence[float]) -> Row:
    """A row with the exponent of the values and the largest allowed exponent."""
    return figure(measure, max(exponent(sizes, values), 1e-6), "exponent", "limit", MOST, target=1.0, at_most=True)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of the line that is fitted to log(value) against log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def made(layers: int) -> LlamaForCausalLM:
    """A model of small width with this number of layers."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                                        num_hidden_layers=layers, num_attention_heads=4)).eval()


def extract(setup: Setup, model: LlamaForCausalLM, count: int) -> None:
    """Run the extraction over `count` made-up tokens."""
    ids_ST = torch.randint(256, (count // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden.extract(model, Tokens(ids_ST, ["made up"] * len(ids_ST), {}), setup.scratch("grown.zarr"))


def at_tokens(setup: Setup, count: int) -> dict[str, float]:
    """Seconds and MiB of each stage, measured with `count` tokens."""
    model = made(4)
    seconds, memory = measured(lambda: extract(setup, model, count), model, setup.repeats)
    states = hidden.read(setup.folder / "grown.zarr")
    cka, cka_mib = measured(lambda: similarity.similarity(states, tokens=count), model, setup.repeats)
    fit, _ = measured(lambda: linear.direct(states, (1, 3)), model, setup.repeats)
    return {"extraction, seconds": seconds, "extraction, peak MiB": memory, "similarity, seconds": cka,
            "similarity, peak MiB": cka_mib, "linear fit, seconds": fit}


def measured(run: Callable[[], Any], model: LlamaForCausalLM, repeats: int) -> tuple[float, float]:
    """The median processor time of several runs in seconds, and the peak memory of one further run (at least 1 MiB)."""
    seconds = repeated(run, repeats)
    meter = efficiency.Meter(torch.device("cpu"))
    meter.start_runs(model)
    run()
    return seconds, max(1.0, meter.peak_mib(model)[0])


def repeated(run: Callable[[], Any], repeats: int) -> float:
    """The median processor time of several runs in seconds. A first run is not timed."""
    run()
    return statistics.median(timed(run).cpu for _ in range(max(1, repeats // 2)))
