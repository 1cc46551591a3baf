"""Costs of a pruned model beside those of the dense model: parameters, multiply-adds, latency, memory.

"FLOPs" are counted as in the KDP paper's Table 10: the multiply-adds of the linear layers for 128 tokens
(kdp_core.model.sizes.count_macs).
Latency is measured in one process, in pairs of turns: one turn of the dense and one turn of the pruned model. The order
of the two models changes with each pair. If the machine is slow for a while, both models are slow. Therefore the median
of the ratios of paired turns varies less than the ratio of two separate runs.
Memory is that of the pruned model alone, because it is loaded and run before the dense model is loaded. The kinds of
memory figures are:
    cuda_allocated       peak of torch's allocator over the runs, with the weights; the sum of the peaks if the model is
                         spread over several GPUs
    cpu_resident_growth  peak resident set over the runs, less the resident set before the model was loaded. Linux can
                         reset the peak, so the loading does not count. Freed memory is first returned to the system, so
                         memory that the process used earlier does not count. Libraries that the first model of a
                         process loads do count (tens of MiB)
    weights              bytes of parameters and buffers, a lower bound, if neither of the others can be measured
Axes: S sequences (one here), T tokens.
"""
import contextlib
import ctypes
import gc
import itertools
import logging
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdp_core.base import options
from kdp_core.base.measurements import Efficiency
from kdp_core.base.options import Count
from kdp_core.model import checkpoints
from kdp_core.model.sizes import count_macs, count_params

logger = logging.getLogger(__name__)

MIB = 2 ** 20
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""This text, written to clear_refs, sets the peak resident set to the current resident set (man 5 proc)."""


class EfficiencyError(ValueError):
    """The settings do not fit the models."""


class Latency(NamedTuple):
    """Latency of one turn of one model, in milliseconds."""
    prefill_ms: float
    decode_ms: float
    """Median time of decoding one token with the cache."""


def measure(dense_folder: str | Path, pruned_folder: str | Path, *, tokens: Count = 128,
            decode_steps: Count = 8, repeats: Count = 3, device: str = "cpu", dtype: str = "float32",
            threads: Count | None = None) -> Efficiency:
    """Costs of the checkpoint in `pruned_folder`, beside those of the checkpoint in `dense_folder`.

    tokens: number of tokens of the prompt, which is one sequence.
    decode_steps: number of tokens that are decoded after the prompt, one by one with the cache.
    repeats: number of measured turns of each model.
    threads: number of CPU threads; None keeps torch's setting.
    A turn is a forward pass over the prompt, followed by the decoding. The forward pass computes the logits of all
    tokens, because they are part of the counted multiply-adds. Before the measured turns, each model runs one turn that
    is not measured. Latencies are in milliseconds, memory in MiB. Raises OptionError for a number below 1, and
    EfficiencyError if prompt and decoded tokens need more positions than the models have.
    """
    options.check(measure, locals())
    with _threads(threads), torch.inference_mode():
        meter = Meter(checkpoints.resolve_device(device))
        pruned = checkpoints.load_model(pruned_folder, device=device, dtype=dtype)
        meter.start_runs(pruned)
        ids_ST = _ids(pruned, tokens, decode_steps)
        latency(pruned, ids_ST, decode_steps)
        peak_mib, kind = meter.peak_mib(pruned)
        dense = checkpoints.load_model(dense_folder, device=device, dtype=dtype)
        _ids(dense, tokens, decode_steps)
        latency(dense, ids_ST, decode_steps)
        times = paired(in_turns(dense, pruned, ids_ST, decode_steps=decode_steps, repeats=repeats))
        logger.info("prefill %.1f ms, dense %.1f ms; peak %.0f MiB (%s)", times["prefill_ms"],
                    times["prefill_dense_ms"], peak_mib, kind)
        return Efficiency(
            params=count_params(pruned), params_dense=count_params(dense),
            macs=count_macs(pruned) * tokens, macs_dense=count_macs(dense) * tokens, tokens=tokens,
            peak_memory_mib=peak_mib, peak_memory_kind=kind, device=_name(meter.device, pruned, dense),
            threads=torch.get_num_threads(), repeats=repeats, **times)


def latency(model: PreTrainedModel, ids_ST: Tensor, decode_steps: int) -> Latency:
    """One turn: a forward pass that fills the cache, and then the decoding of single tokens with this cache.

    Latency does not depend on the choice of tokens.
    """
    started = _now(ids_ST.device)
    cache = model(ids_ST, use_cache=True).past_key_values
    times = [_now(ids_ST.device)]
    for step in range(decode_steps):
        column = step % ids_ST.shape[1]
        cache = model(ids_ST[:, column:column + 1], past_key_values=cache, use_cache=True).past_key_values
        times.append(_now(ids_ST.device))
    steps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
    return Latency(1000 * (times[0] - started), statistics.median(steps))


def in_turns(dense: PreTrainedModel, pruned: PreTrainedModel, ids_ST: Tensor, *, decode_steps: int,
             repeats: int) -> list[tuple[Latency, Latency]]:
    """Pairs of turns (dense, pruned), `repeats` in number. In every second pair the pruned model runs first."""
    pairs = []
    for repeat in range(repeats):
        order = (dense, pruned) if repeat % 2 == 0 else (pruned, dense)
        first, second = (latency(model, ids_ST, decode_steps) for model in order)
        pairs.append((first, second) if repeat % 2 == 0 else (second, first))
    return pairs


def paired(turns: list[tuple[Latency, Latency]]) -> dict[str, float]:
    """Medians over the turns of each model in ms, and medians of the ratios dense / pruned. The keys are fields of
    Efficiency."""
    found = {}
    for name in ("prefill", "decode"):
        dense = [getattr(turn[0], f"{name}_ms") for turn in turns]
        pruned = [getattr(turn[1], f"{name}_ms") for turn in turns]
        found[f"{name}_ms"] = statistics.median(pruned)
        found[f"{name}_dense_ms"] = statistics.median(dense)
        found[f"speedup_{name}"] = statistics.median(d / p for d, p in zip(dense, pruned, strict=True))
    return found


class Meter:
    """Measures the peak memory of one model while it runs.

    Create the meter before the model is loaded. Call `peak_mib` before another model is loaded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpus: list[torch.device] = []
        self._before_mib: float | None = None
        if device.type == "cpu":
            _release_freed()
            self._before_mib = resident_mib("VmRSS")

    def start_runs(self, model: PreTrainedModel) -> None:
        """Begin to record the peak."""
        gc.collect()
        if self.device.type == "cuda":
            self._gpus = sorted({parameter.device for parameter in model.parameters() if parameter.is_cuda}, key=str)
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        elif self._before_mib is not None:
            try:
                CLEAR_REFS.write_text(RESET_PEAK)
            except OSError:  # the system is not Linux, or the container forbids the reset
                self._before_mib = None

    def peak_mib(self, model: PreTrainedModel) -> tuple[float, str]:
        """(peak in MiB, kind of the figure); the docstring of this module defines the kinds."""
        if self.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus) / MIB, "cuda_allocated"
        peak = resident_mib("VmHWM")
        if self._before_mib is not None and peak is not None:
            return peak - self._before_mib, "cpu_resident_growth"
        held = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / MIB, "weights"


def _ids(model: PreTrainedModel, tokens: int, decode_steps: int) -> Tensor:
    """One sequence of token ids, int64 (1, T). Raises EfficiencyError if the model has too few positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens + decode_steps > positions:
        raise EfficiencyError(f"tokens {tokens} and decode_steps {decode_steps} are more than the model's {positions} "
                              "positions; take fewer")
    vocabulary = model.get_input_embeddings().num_embeddings
    return (torch.arange(tokens, device=model.device) % vocabulary).view(1, tokens)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device, pruned: PreTrainedModel, dense: PreTrainedModel) -> str:
    """The name of the device. If a model is spread over several devices, the text names all of them, because the
    slowest one determines the latency."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    found = {which: checkpoints.places(model) for which, model in (("pruned", pruned), ("dense", dense))}
    return "; ".join([name, *(f"{which} on {', '.join(parts)}" for which, parts in found.items() if len(parts) > 1)])


def _release_freed() -> None:
    """Return freed memory to the system, because glibc does not return it. Freed memory that stays in the process would
    hide a later peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_mib(field: str) -> float | None:
    """VmRSS or VmHWM of this process in MiB; None on a system without /proc."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Set the number of torch's CPU threads while the body of the `with` statement runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
