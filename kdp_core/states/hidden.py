"""Hidden states of a model over packed sequences, streamed to Zarr v3.

State k is the input of decoder layer k before its norm. The last state is the output of the last layer before the final
norm. The last entry of transformers' own `hidden_states` is taken after the final norm, so kdp reads the states with
hooks. Only one batch is in memory at a time. The output head never runs, and the forward pass ends at the highest
requested layer.

Massive tokens (Sun et al. 2024) are recognised by their norm, not by their position. In SmolLM2 massive tokens occur at
the first position, sometimes at the second, and in layers 3 to 9 also at later positions.

The same forward pass computes the cosine between the states before and after every attention and every MLP that ran
(kdp_core.states.sublayers).

Layout of the group: `states` (layer, sequence, token, width), and `norm` and `massive` (layer, sequence, token). If the
first layer ran, there is also `sublayers` (layer, attention or MLP, sequence). The attributes are layers,
massive_factor and provenance. A chunk of `states` contains one layer of one batch. Chunks are not compressed, because
lossless codecs would save less than a tenth of the size of float16 states.

Several processes may extract the states together. Each process writes a shard, which is a separate group with the same
chunks. A shard has whole batches of the sequences. `join` makes one group from the shards, by hard links to the chunk
files, so each file is written by one process. No group is visible before it is complete, and no state is read or stored
twice. The joined group has the same bytes as a group of one process. `join` finds the massive tokens of all shards.
Axes: K states, L layers that are stored, S sequences, B sequences of a batch, T tokens, D width, P parts of a layer.
"""
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from kdp_core.base import options, store
from kdp_core.base.options import Count, Positive
from kdp_core.base.records import Tokens
from kdp_core.model.families import base_of, decoder_layers
from kdp_core.states import chunks, sublayers

logger = logging.getLogger(__name__)
HALF_MAX = 65504.0
"""Largest finite float16."""
BESIDE = ["layer", "sequence", "token"]
"""Axes of the arrays `norm` and `massive`, which have one value for each token of each stored state."""


class HiddenError(RuntimeError):
    """The requested hidden states cannot be stored or read."""


class HalfOverflow(HiddenError):
    """A state is too large for float16."""


class _Enough(Exception):
    """Raised to end a forward pass after the highest requested layer."""


class HiddenStates(NamedTuple):
    """Stored states, opened for reading. Only one state of the model at a time is read into memory."""
    path: Path
    layers: list[int]
    """Numbers of the stored states, ascending."""
    massive_LST: Tensor
    """bool: whether the norm of a token exceeds massive_factor times the median norm of the state."""
    massive_factor: float
    sequences: int
    tokens: int
    """Tokens of a sequence."""
    width: int
    provenance: dict[str, Any]

    def state(self, layer: int, which: Tensor | None = None) -> Tensor:
        """State `layer`, float32 (S, T, D). With `which`, only these sequences are read from the disk.

        Raises HiddenError if the state is not stored, and LostChunk if a chunk is missing.
        """
        if which is not None:
            return self.reader(layer)(which)
        return chunks.floats(zarr.open_group(self.path, mode="r")["states"], self.index(layer))

    def reader(self, layer: int) -> Callable[[Tensor], Tensor]:
        """A function that reads state `layer` of the given sequences, float32 (S, T, D). A training calls it for each
        minibatch, so that its memory does not depend on the number of sequences."""
        states, index = zarr.open_group(self.path, mode="r")["states"], self.index(layer)
        return lambda which: chunks.rows(states, index, which)

    def batches(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """State `layer` chunk by chunk: pairs of the numbers of sequences and their states, float32 (B, T, D)."""
        return chunks.pieces(zarr.open_group(self.path, mode="r")["states"], self.index(layer))

    def massive(self, layers: list[int]) -> Tensor:
        """Which tokens are massive in at least one of the states of `layers`, bool (S, T)."""
        return self.massive_LST[[self.index(layer) for layer in layers]].any(dim=0)

    def sublayers(self) -> Tensor:
        """Cosine between the states before and after each attention and MLP, as a mean over tokens, float32 (L, P,
        S)."""
        group = zarr.open_group(self.path, mode="r")
        if "sublayers" not in group:
            return torch.zeros(0, 2, self.sequences)
        return torch.from_numpy(chunks.whole(group["sublayers"]))

    def index(self, layer: int) -> int:
        """The index of state `layer` on the first axis of the arrays."""
        if layer not in self.layers:
            raise HiddenError(f"{self.path}: state {layer} is not stored (stored: {self.layers}); "
                              "add it to hidden.layers in the config")
        return self.layers.index(layer)


def numbers(layers: list[int] | None, count: int) -> list[int]:
    """The numbers of the states to store in a model of `count` layers. Raises HiddenError for a state that the model
    lacks."""
    chosen = sorted(set(range(count + 1) if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] > count:
        raise HiddenError(f"hidden.layers is {layers}, but the model has states 0 to {count}; name some of these")
    return chosen


def read(path: str | Path) -> HiddenStates:
    """Open the group that `extract` or `join` wrote. LostChunk is raised if a chunk is missing, here or when a state is
    read."""
    group = zarr.open_group(path, mode="r")
    _, sequences, tokens, width = group["states"].shape
    return HiddenStates(Path(path), list(group.attrs["layers"]), torch.from_numpy(chunks.whole(group["massive"])),
                        group.attrs["massive_factor"], sequences, tokens, width, dict(group.attrs["provenance"]))


def extract(model: nn.Module, tokens: Tokens, path: str | Path, sequences: tuple[int, int] | None = None, *,
            layers: list[int] | None = None, batch_sequences: Count = 8,
            dtype: Literal["auto", "float16", "float32"] = "auto", massive_factor: Positive = 8.0) -> None:
    """Run `model` over `tokens` and write its states to the Zarr group `path`: the states of `layers`, or all states by
    default.

    `sequences` is None or a pair (first sequence, one past the last sequence). With `sequences`, the group is a shard
    of these sequences, which `join` reads.

    layers: numbers of the states to store, 0 to the number of layers; null means all states.
    batch_sequences: number of sequences in a forward pass.
    dtype: float16, float32 or auto. auto means float16, or float32 if a number in a state exceeds 65,504, the largest
        float16.
    massive_factor: a token is massive in a layer if its norm exceeds this factor times the layer's median norm.
    Raises OptionError for a value that is not allowed. Raises HiddenError for a layer that the model lacks, a shard
    that does not consist of whole batches, or states that are not finite.
    """
    options.check(extract, locals())
    layers = numbers(layers, len(decoder_layers(model)))
    _check_shard(sequences, len(tokens.ids_ST), batch_sequences)
    for attempt in (["float16", "float32"] if dtype == "auto" else [dtype]):
        try:
            with store.atomic(path) as temporary:
                _stream(model, tokens, temporary, sequences, layers, batch_sequences, attempt, massive_factor)
            return
        except HalfOverflow as overflow:
            if dtype != "auto":
                raise
            logger.warning("%s: storing float32 instead", overflow)


def join(shards: Sequence[str | Path], path: str | Path, *, massive_factor: Positive = 8.0) -> None:
    """Write the group `path` from the shards of one extraction, in any order.

    massive_factor: as for `extract`.
    Raises HiddenError if shards lack sequences, overlap, or differ in options or precision. Raises LostChunk if a chunk
    is missing.
    """
    options.check(join, locals())
    groups = sorted((zarr.open_group(shard, mode="r") for shard in shards), key=lambda group: group.attrs["sequences"])
    _check_shards(groups)
    first = groups[0]["states"]
    with store.atomic(path) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        states = _create_states(group, (first.shape[0], groups[-1].attrs["sequences"][1], *first.shape[2:]),
                                first.chunks[1], str(first.dtype))
        for shard in groups:
            chunks.link(shard["states"], states, shard.attrs["sequences"][0] // first.chunks[1])
        norm_LST = torch.from_numpy(np.concatenate([chunks.whole(shard["norm"]) for shard in groups], axis=1))
        _mark(group, norm_LST, massive_factor)
        if "sublayers" in groups[0]:
            cosines = [torch.from_numpy(chunks.whole(shard["sublayers"])) for shard in groups]
            _keep_sublayers(group, torch.cat(cosines, dim=2))
        group.attrs.update({"layers": groups[0].attrs["layers"], "massive_factor": massive_factor,
                            "provenance": groups[0].attrs["provenance"]})
    logger.info("hidden states: %d shards joined", len(groups))


def _check_shard(sequences: tuple[int, int] | None, S: int, batch: int) -> None:
    start, stop = sequences or (0, S)
    if not 0 <= start < stop <= S or start % batch or (stop % batch and stop != S):
        raise HiddenError(f"shard {start} to {stop} of {S} sequences is not of whole batches of {batch}; let it begin "
                          "and end at multiples of hidden.batch_sequences")


def _check_shards(groups: list[zarr.Group]) -> None:
    """Raise HiddenError if the shards do not form one extraction. `groups` must be in the order of the sequences."""
    places = [tuple(group.attrs["sequences"]) for group in groups]
    if [start for start, _ in places] != [0, *(stop for _, stop in places[:-1])] or \
            places[-1][1] != groups[0].attrs["of"]:
        raise HiddenError(f"shards {_named(places)} are not sequences 0 to {groups[0].attrs['of']}, each once; delete "
                          "hidden-shards and extract again")
    half = [place for place, group in zip(places, groups, strict=True) if group["states"].dtype == "float16"]
    if 0 < len(half) < len(groups):
        raise HiddenError(f"sequences {_named(place for place in places if place not in half)} hold states above "
                          f"float16's {HALF_MAX:.0f} and were stored as float32, but {_named(half)} as float16; set "
                          "hidden.dtype to float32, which extracts all of them again")
    for place, (one, other) in zip(places[1:], pairwise(groups), strict=True):
        if any(one.attrs[name] != other.attrs[name] for name in ("of", "layers", "provenance")) or \
                one["states"].chunks != other["states"].chunks:
            raise HiddenError(f"shard {_named([place])} was extracted with other options or tokens than the one before "
                              "it; delete hidden-shards and extract again")


def _named(places: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{start}-{stop}" for start, stop in places)


def _stream(model: nn.Module, tokens: Tokens, path: Path, sequences: tuple[int, int] | None, layers: list[int],
            batch: int, dtype: str, massive_factor: float) -> None:
    """Write the states of all sequences, or of a shard, batch by batch."""
    S, T = tokens.ids_ST.shape
    start, stop = sequences or (0, S)
    group = zarr.create_group(path, zarr_format=3)
    states = _create_states(group, (len(layers), stop - start, T, model.config.hidden_size), min(batch, S), dtype)
    norm_LST, cosines = torch.zeros(len(layers), stop - start, T), []
    # a thread writes the files while the next batch runs
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for first in range(start, stop, batch):
            here = slice(first - start, min(first + batch, stop) - start)
            with sublayers.watched(model) as ran:
                found = _states(model, tokens.ids_ST[start:stop][here], layers,
                                lambda h_BTD: _kept(h_BTD, getattr(torch, dtype)))
            _check(found, layers, dtype)
            norm_LST[:, here] = torch.stack([one.norm_BT.cpu() for one in found])
            values = [one.stored_BTD.cpu().numpy() for one in found]
            if written:
                written.result()
            written = writer.submit(_write, states, here.start // states.chunks[1], values)
            # the layers of a spread model are on several devices
            cosines += [torch.stack([cos_PB.cpu() for cos_PB in ran])] if ran else []
            logger.info("hidden states: %d of %d sequences", here.stop, stop - start)
        written.result()
    if cosines:
        _keep_sublayers(group, torch.cat(cosines, dim=2))
    provenance = {**tokens.provenance, "model_type": model.config.model_type, "dtype": dtype}
    if sequences is None:
        _mark(group, norm_LST, massive_factor)
        group.attrs.update({"layers": layers, "massive_factor": massive_factor, "provenance": provenance})
    else:
        _beside(group, "norm", norm_LST)
        group.attrs.update({"layers": layers, "sequences": [start, stop], "of": S, "provenance": provenance})


def _write(states: zarr.Array, place: int, values_LBTD: Sequence[np.ndarray]) -> None:
    """Write one batch, as one chunk for each layer."""
    for layer, values_BTD in enumerate(values_LBTD):
        chunks.write(states, (layer, place, 0, 0), values_BTD[None])


def _create_states(group: zarr.Group, shape: tuple[int, ...], batch: int, dtype: str) -> zarr.Array:
    return group.create_array("states", shape=shape, chunks=(1, batch, *shape[2:]), dtype=dtype,
                              dimension_names=[*BESIDE, "width"], **chunks.PLAIN)


def _mark(group: zarr.Group, norm_LST: Tensor, massive_factor: float) -> None:
    """Store the norms, and for each token whether it is massive."""
    median_L11 = norm_LST.flatten(1).median(dim=1).values[:, None, None]
    _beside(group, "norm", norm_LST)
    _beside(group, "massive", norm_LST > massive_factor * median_L11)


def _beside(group: zarr.Group, name: str, values_LST: Tensor) -> None:
    values = values_LST.numpy()
    array = group.create_array(name, shape=values.shape, chunks=(1, *values.shape[1:]), dtype=values.dtype,
                               dimension_names=BESIDE, **chunks.PLAIN)
    array[:] = values


def _keep_sublayers(group: zarr.Group, cos_LPS: Tensor) -> None:
    array = group.create_array("sublayers", shape=cos_LPS.shape, chunks=cos_LPS.shape, dtype="float32",
                               dimension_names=["layer", "part", "sequence"], **chunks.PLAIN)
    array[:] = cos_LPS.numpy()


class _Kept(NamedTuple):
    """The data of one state of a batch that kdp keeps, on the device of the model."""
    stored_BTD: Tensor
    norm_BT: Tensor
    ends_2: Tensor
    """The smallest and the largest number of the state; both are NaN if a number is NaN."""


def _kept(h_BTD: Tensor, dtype: torch.dtype) -> _Kept:
    """Reduce a state to the data that are kept. The function runs during the forward pass, so the state can be freed as
    soon as the model no longer needs it."""
    h_BTD = h_BTD.float()
    return _Kept(h_BTD.to(dtype), h_BTD.norm(dim=-1), torch.stack(torch.aminmax(h_BTD)))


def _check(found: Sequence[_Kept], layers: list[int], dtype: str) -> None:
    """Raise HiddenError if a state of the batch is not finite, or is too large for the precision."""
    ends_L2 = torch.stack([one.ends_2.cpu() for one in found])
    for layer, largest in zip(layers, ends_L2.abs().amax(dim=1).tolist(), strict=True):
        if not largest < float("inf"):
            raise HiddenError(f"state {layer} is not finite ({largest}): the model's weights or precision are broken; "
                              "try dtype float32 for the model")
        if dtype == "float16" and largest > HALF_MAX:
            raise HalfOverflow(f"state {layer} reaches {largest:.0f}, above float16's {HALF_MAX:.0f}; "
                               "set hidden.dtype to float32 or auto")


def boundary_states(model: nn.Module, ids_BT: Tensor, layers: list[int]) -> list[Tensor]:
    """The states of `layers` (ascending) for one batch of sequences without padding, each float32 (B, T, D) on the
    CPU."""
    return _states(model, ids_BT, layers, lambda h_BTD: h_BTD.float().cpu())


@torch.inference_mode()
def _states(model: nn.Module, ids_BT: Tensor, layers: list[int], keep: Callable[[Tensor], Any]) -> list[Any]:
    """The results of `keep` for the states of `layers`. `keep` is called with a state (B, T, D) as soon as this state
    is computed."""
    decoder = decoder_layers(model)
    found: dict[int, Any] = {}

    def before(index: int, args: tuple, kwargs: dict) -> None:
        found[index] = keep(args[0] if args else kwargs["hidden_states"])
        if index == layers[-1]:
            raise _Enough

    def after(output: Tensor | tuple) -> None:
        found[len(decoder)] = keep(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    hooks = [decoder[k].register_forward_pre_hook(lambda _, *inputs, k=k: before(k, *inputs), with_kwargs=True)
             for k in layers if k < len(decoder)]
    if layers[-1] == len(decoder):
        hooks.append(decoder[-1].register_forward_hook(lambda _, args, output: after(output)))
    try:
        base_of(model)(ids_BT.to(model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[k] for k in layers]
