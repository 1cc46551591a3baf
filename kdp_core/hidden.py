"""Hidden states of a model over packed sequences, streamed to Zarr v3.

State k is the input of decoder layer k before its norm; state `layers` is what the last layer returns, before the
final norm (transformers' own `hidden_states[-1]` is taken after it, so hooks are used). One batch is in memory at a
time, the output head never runs, and the forward pass ends at the highest layer asked for.

Massive-activation tokens (Sun et al. 2024) are marked by norm, not by position: SmolLM2 carries them at the first
position, sometimes at the second, and in its layers 3 to 9 at later ones.

Layout of the group: `states` (layer, sequence, token, width), `norm` and `massive` (layer, sequence, token);
attributes: layers, massive_factor, provenance. Chunks hold one layer of one batch and are not compressed: lossless
codecs save less than a tenth of float16 states.
"""
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zarr
from torch import Tensor, nn

from kdp_core import store
from kdp_core.records import Tokens

logger = logging.getLogger(__name__)
DTYPES = ("auto", "float16", "float32")
HALF_MAX = 65504.0
"""Largest finite float16."""


class HiddenError(RuntimeError):
    """Hidden states that cannot be stored or read."""


class HalfOverflow(HiddenError):
    """A state that float16 cannot hold."""


class _Enough(Exception):
    """Ends a forward pass once the highest layer asked for has been seen."""


class HiddenStates(NamedTuple):
    """Stored states, opened for reading; one layer at a time comes into memory."""
    path: Path
    layers: list[int]
    """State numbers stored, ascending."""
    massive_LST: Tensor
    """bool: norm above massive_factor times the median norm of that layer."""
    massive_factor: float
    sequences: int
    tokens: int
    """Tokens of a sequence."""
    width: int
    provenance: dict[str, Any]

    def state(self, layer: int) -> Tensor:
        """State `layer` as h_STD, float32."""
        array = zarr.open_group(self.path, mode="r")["states"]
        return torch.from_numpy(array[self.index(layer)]).float()

    def massive(self, layers: list[int]) -> Tensor:
        """bool_ST: tokens that are massive in any of these states."""
        return self.massive_LST[[self.index(layer) for layer in layers]].any(dim=0)

    def index(self, layer: int) -> int:
        """Where state `layer` stands on the layer axis."""
        if layer not in self.layers:
            raise HiddenError(f"{self.path}: state {layer} is not stored (stored: {self.layers}); "
                              "add it to hidden.layers in the config")
        return self.layers.index(layer)


def read(path: str | Path) -> HiddenStates:
    """Open what `extract` wrote."""
    group = zarr.open_group(path, mode="r")
    _, sequences, tokens, width = group["states"].shape
    return HiddenStates(Path(path), list(group.attrs["layers"]), torch.from_numpy(group["massive"][:]),
                        group.attrs["massive_factor"], sequences, tokens, width, dict(group.attrs["provenance"]))


def extract(model: nn.Module, tokens: Tokens, path: str | Path, *, layers: list[int] | None = None,
            batch_sequences: int = 8, dtype: str = "auto", massive_factor: float = 8.0) -> None:
    """Run `model` over `tokens` and write the states of `layers` (all of them by default) to the Zarr group `path`.

    layers: states to store, 0 to the number of layers; null means all.
    batch_sequences: sequences of a forward pass.
    dtype: float16, float32, or auto, which means float16 unless a state exceeds what it holds (65,504), then float32.
    massive_factor: a token is massive in a layer where its norm exceeds this times the layer's median norm.
    Raises HiddenError for a layer the model lacks and for states that are not finite.
    """
    count = len(_decoder_layers(model))
    layers = sorted(set(range(count + 1) if layers is None else layers))
    if not layers or layers[0] < 0 or layers[-1] > count:
        raise HiddenError(f"hidden.layers {layers}: the model has states 0 to {count}")
    if dtype not in DTYPES:
        raise HiddenError(f"hidden.dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    for attempt in (["float16", "float32"] if dtype == "auto" else [dtype]):
        try:
            with store.atomic(path) as temporary:
                _stream(model, tokens, temporary, layers, batch_sequences, attempt, massive_factor)
            return
        except HalfOverflow as overflow:
            if dtype != "auto":
                raise
            logger.warning("%s: storing float32 instead", overflow)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    # imported here: most stages only read states, and transformers' models cost seconds
    from kdp_core.modeling import decoder_layers

    return decoder_layers(model)


def _stream(model: nn.Module, tokens: Tokens, path: Path, layers: list[int], batch: int, dtype: str,
            massive_factor: float) -> None:
    S, T = tokens.ids_ST.shape
    D = model.config.hidden_size
    group = zarr.create_group(path, zarr_format=3)
    names = ["layer", "sequence", "token"]
    states = group.create_array("states", shape=(len(layers), S, T, D), chunks=(1, min(batch, S), T, D), dtype=dtype,
                                compressors=None, dimension_names=[*names, "width"])
    norm_LST = torch.zeros(len(layers), S, T)
    for start in range(0, S, batch):
        for row, h_BTD in enumerate(boundary_states(model, tokens.ids_ST[start:start + batch], layers)):
            _check(h_BTD, layers[row], dtype)
            norm_LST[row, start:start + batch] = h_BTD.norm(dim=-1)
            states[row, start:start + batch] = h_BTD.to(getattr(torch, dtype)).numpy()
        logger.info("hidden states: %d of %d sequences", min(start + batch, S), S)
    median_L11 = norm_LST.flatten(1).median(dim=1).values[:, None, None]
    for name, values in (("norm", norm_LST), ("massive", norm_LST > massive_factor * median_L11)):
        array = group.create_array(name, shape=values.shape, chunks=(1, S, T), dtype=values.numpy().dtype,
                                   compressors=None, dimension_names=names)
        array[:] = values.numpy()
    group.attrs.update({"layers": layers, "massive_factor": massive_factor,
                        "provenance": {**tokens.provenance, "model_type": model.config.model_type, "dtype": dtype}})


def _check(h_BTD: Tensor, layer: int, dtype: str) -> None:
    largest = h_BTD.abs().max().item()
    if not largest < float("inf"):
        raise HiddenError(f"state {layer} is not finite ({largest}): the model's weights or precision are broken; "
                          "try dtype float32 for the model")
    if dtype == "float16" and largest > HALF_MAX:
        raise HalfOverflow(f"state {layer} reaches {largest:.0f}, above float16's {HALF_MAX:.0f}; "
                           "set hidden.dtype to float32 or auto")


@torch.inference_mode()
def boundary_states(model: nn.Module, ids_BT: Tensor, layers: list[int]) -> list[Tensor]:
    """The states of `layers` (ascending) for one batch of sequences without padding: h_BTD, float32, on the CPU."""
    decoder = _decoder_layers(model)
    found: dict[int, Tensor] = {}

    def before(index: int, args: tuple, kwargs: dict) -> None:
        found[index] = (args[0] if args else kwargs["hidden_states"]).float().cpu()
        if index == layers[-1]:
            raise _Enough

    def after(output: Tensor | tuple) -> None:
        found[len(decoder)] = (output[0] if isinstance(output, tuple) else output).float().cpu()
        raise _Enough

    hooks = [decoder[k].register_forward_pre_hook(lambda _, *inputs, k=k: before(k, *inputs), with_kwargs=True)
             for k in layers if k < len(decoder)]
    if layers[-1] == len(decoder):
        hooks.append(decoder[-1].register_forward_hook(lambda _, args, output: after(output)))
    try:
        model.model(ids_BT.to(model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[k] for k in layers]
