"""SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024) reduces states to their principal components.

A state x between two parts of a model may be multiplied by an orthogonal matrix Q. If every matrix that reads x also
multiplies by the inverse of Q, the outputs do not change. The reason is that a root-mean-square norm without gain
commutes with Q (the paper's theorem 1). So
    readers      W <- W diag(gain) Q,  b <- b + W shift     of the norm that they read through (gain, shift)
    writers      W <- Q' W,  b <- Q' b                      Q of the state that they add to
    residual     x <- x Q_i' Q_{i+1}                        one matrix for each part, since each state has its own Q
    embedding    E <- E Q_0,    head  W <- W diag(gain) Q_last, shift into a bias
SliceGPT keeps only the first d' columns of Q, which are the eigenvectors of X'X with the largest eigenvalues. All these
matrices then become narrower. The bases are computed in order, from the first state to the last. Each basis is computed
from the states of a model whose earlier states are already sliced. A dense part with input x Q Q' gives the same states
as a sliced part. To compute the states, this module therefore runs dense parts. The norms still divide by the width
before slicing, and use the model's own eps. A layer norm, unlike a root-mean-square norm, also subtracts a mean. For a
model with layer norms, the mean is removed from the outputs of writers and embeddings, and the norm becomes a
root-mean-square norm. With this change, the readers still get the same inputs.

The share of removed parameters is below the share of removed columns, for three reasons. First, each matrix becomes
narrower on one side only. Second, each part gets a new d' x d' matrix. Third, a head that is tied to its embedding must
be stored as a separate matrix. The width d' is chosen so that the ratio of ALL parameters is removed. If `slicing` is
given, d' follows from this share of the width instead, as in the paper. A 7B LLaMA sliced by 25 % has 15.3 % fewer
parameters.

Where we differ from the released code (microsoft/TransformerCompression 6b12cde):
    The released code also makes embeddings and writers mean-free in models with root-mean-square norms. This changes
        the outputs of these models.
    The released code sets every eps to 1e-5.
    The released code multiplies each basis by an unseeded random rotation. Here nothing is random: rotations are
        float64, and the signs of eigenvectors are fixed.
The method cannot prune Gemma 3, because Gemma's norms after the parts cannot be moved. The method cannot prune an OPT
model whose norms follow the sum of state and output.

Letter of an axis besides those of kdp_core.base.records: E is the axis of the directions that are kept.
"""
import bisect
import itertools
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method, no_state_between
from kdp_core.methods._select import ROUNDING, BlockError, no_layer
from kdp_core.model import checkpoints
from kdp_core.model.families import (
    FAMILIES,
    Family,
    decoder_layers,
    family_of,
    final_norm,
    is_known,
    norm_of,
    output_head,
    trunk,
    type_of,
)
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.model.sliced import part_output
from kdp_core.states.bases import mean_free
from kdp_core.states.block import Counted, FitError
from kdp_core.states.hidden import HiddenStates

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

Slicing = Annotated[float, Ge(0), Lt(1)]
"""Share of the width that is removed."""
PARTS = ("attention", "mlp")
DAMP = 0.01
"""Multiple of the mean diagonal of X'X that is added to the diagonal, as in the released code. This changes no
eigenvector."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", slicing: Slicing | None = None, multiple: Count = 8, slice_head: bool = False,
            massive: Counted = "raw", sequences: Count | None = None, batch_sequences: Count = 8) -> Composed:
    """Slice the states of a model to the width that removes the ratio of all parameters.

    slicing: share of the width to remove. The new width is rounded so that at least this share is removed. If `slicing`
        is given, the ratio is not read.
    multiple: the new width is a multiple of this number.
    slice_head: whether the input state of the output head is sliced too. The released code does not slice the input
        state of the head.
    massive: `raw` gives massive tokens the same weight as other tokens, as the released code does; then the first
        directions are those of massive tokens. `mask` excludes massive tokens from X'X.
    sequences: number of calibration sequences; null means all.
    batch_sequences: number of sequences in one forward pass.
    Raises FitError for a model that cannot be sliced, and BlockError for a ratio that cannot be reached.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config = checkpoints.config_of(dense)
    _check(config, hidden, sequences, slicing, multiple)
    width = _nearest(config, selection.ratio_target, multiple, slice_head) if slicing is None else \
        cut(config.hidden_size, slicing, multiple)
    shape = _shape(config, width, slice_head)
    passes = Passes(checkpoints.load_model(dense, device=device, dtype=dtype), hidden.tokens)
    factor = hidden.massive_factor if massive == "mask" else None
    start_STD = hidden.state(0)[:sequences]
    bases, kept = _bases(passes, start_STD, [*[width] * 2 * len(passes.layers), shape["sliced"]["final"]], factor,
                         batch_sequences)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in _turned(passes.model, bases).items()}
    stats = {"tokens": start_STD[..., 0].numel(), "width": width, "width_removed": 1 - width / config.hidden_size,
             "share_of_all": _share(config, width, slice_head), "ratio_read": slicing is None, "states": kept,
             "seconds": time.perf_counter() - began}
    return Composed(Plan("slicegpt", [], [], tensors, shape=shape), [], [], stats)


def refuses(family: Family) -> str:
    """The reason why models of this family cannot be sliced; empty if they can be sliced."""
    if family.norms_after:
        return "the norms after its parts cannot be moved"
    if family.fixed_width:
        return "the code of its models requires that the last state is as wide as the first state"
    return no_state_between(family)


def _check(config: "PretrainedConfig", hidden: HiddenStates, sequences: int | None, slicing: float | None,
           multiple: int) -> None:
    why = refuses(family_of(config)) if is_known(config) else "it is of no known family"
    if why:
        fits = [name for name, family in FAMILIES.items() if not refuses(family)]
        raise FitError(f"slicegpt cannot slice a {type_of(config)} model: {why}; choose a model of {', '.join(fits)}")
    if not (family_of(config).norms_first(config) and family_of(config).one_width(config)):
        raise FitError(f"slicegpt cannot slice this {type_of(config)} model: its norms follow the sum, its embedding "
                       "is projected or its final norm is missing, as in OPT-350M; choose another size")
    if sequences is not None and sequences > hidden.sequences:
        raise FitError(f"compose.sequences {sequences}: there are {hidden.sequences} sequences; give at most this "
                       "number, or null for all")
    if multiple > config.hidden_size:
        raise FitError(f"compose.multiple {multiple}: give at most the width of the model, {config.hidden_size}")
    if slicing is not None and slicing > 1 - multiple / config.hidden_size:
        raise FitError(f"compose.slicing {slicing}: give a share of at most {1 - multiple / config.hidden_size:.4f}, "
                       f"which leaves {multiple} of {config.hidden_size}")


# The width -----------------------------------------------------------------------------------------------------------

def cut(width: int, slicing: float, multiple: int) -> int:
    """The new width: (1 - s) d, rounded down to a multiple."""
    return int((1 - slicing) * width + 1e-9) // multiple * multiple


def _nearest(config: "PretrainedConfig", ratio: float, multiple: int, slice_head: bool) -> int:
    """The width for which the removed share of all parameters is nearest to the ratio. If two widths are equally near,
    the larger width is chosen."""
    def share(width: int) -> float:
        return _share(config, width, slice_head)

    widths = range(multiple, config.hidden_size + 1, multiple)
    if ratio > share(multiple) + ROUNDING:
        raise BlockError(f"ratio {ratio} is too high: all that slicegpt can remove, at width {multiple}, is "
                         f"{share(multiple):.4f} of all parameters; ask for less")
    # the share falls with the width; the first width whose share is at most the ratio is compared with the width before
    first = bisect.bisect_left(widths, -ratio, key=lambda width: -share(width))
    return min(widths[max(0, first - 1):first + 1], key=lambda width: (abs(share(width) - ratio), -width))


def _shape(config: "PretrainedConfig", width: int, slice_head: bool) -> dict[str, Any]:
    """The entries that the configuration of a folded model has for this width."""
    each = [width] * config.num_hidden_layers
    return {"sliced": {"attention": each, "mlp": each, "final": width if slice_head else config.hidden_size},
            "tie_word_embeddings": False}


def sliced_config(config: "PretrainedConfig", width: int, slice_head: bool) -> "PretrainedConfig":
    """The configuration of a model whose states have the width `width`. With `slice_head` the input states of the
    output head have this width too."""
    # the folded classes come with transformers' models, whose import takes seconds
    from kdp_core.model.folded import FOLDED

    config_class, _ = FOLDED[type_of(config)]
    return config_class.from_dict({**config.to_dict(), "model_type": config_class.model_type,
                                   **_shape(config, width, slice_head)})


def _share(config: "PretrainedConfig", width: int, slice_head: bool) -> float:
    """Share of all parameters that slicing removes. Tied parameters count once. A negative share means that slicing
    adds parameters."""
    sliced = sliced_config(config, width, slice_head)
    return 1 - count_params(checkpoints.on_meta(sliced)) / count_params(checkpoints.on_meta(config))


# The bases -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _bases(passes: Passes, x_STD: Tensor, widths: list[int], massive_factor: float | None,
           batch: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The bases q_DE in float64: one for every state that a part reads, and one for the last state. The second list has
    an entry for each basis: the share of the sum of squares of the states that the basis keeps."""
    family, read = family_of(passes.model), itertools.product(range(len(passes.layers)), PARTS)
    x_STD = mean_free(x_STD, family)
    bases, entries = [], []
    for (number, part), width in zip([*read, (len(passes.layers), "final")], widths, strict=True):
        if not torch.isfinite(x_STD).all():
            raise FitError(f"{part} state of layer {number} of the sliced model is not finite; try dtype float32 for "
                           "the model")
        q_DE, entry = _basis(x_STD, width, massive_factor, batch, passes.device)
        bases.append(q_DE)
        entries.append({"layer": number, "part": part, **entry})
        if part == "final":
            return bases, entries
        x_STD = torch.cat([_after(passes, family, number, part, x_BTD, q_DE) for x_BTD in x_STD.split(batch)])
        logger.info("layer %d, %s: %.4f of the squares kept", number, part, entry["kept"])
    raise AssertionError("the last of `widths` is the final state's")


def _basis(x_STD: Tensor, width: int, massive_factor: float | None, batch: int,
           device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The first principal directions of states, q_DE. The largest entry of each direction is positive."""
    norm_ST = x_STD.norm(dim=-1)
    counted_ST = torch.ones_like(norm_ST, dtype=torch.bool) if massive_factor is None else \
        norm_ST <= massive_factor * norm_ST.median()
    gram_DD = torch.zeros(x_STD.shape[-1], x_STD.shape[-1], dtype=torch.float64, device=device)
    for x_BTD, counted_BT in zip(x_STD.split(batch), counted_ST.split(batch), strict=True):
        x_ND = x_BTD[counted_BT].to(device, torch.float64)
        gram_DD += x_ND.T @ x_ND
    # H = X'X + level I,    level = 0.01 mean diag(X'X)
    squares = gram_DD.trace()
    level = DAMP * squares / len(gram_DD)
    gram_DD.diagonal().add_(level)
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    q_DE = vectors_DD.flip(1)[:, :width]
    q_DE = q_DE * q_DE.gather(0, q_DE.abs().argmax(dim=0, keepdim=True)).sign()
    kept = ((values_D.flip(0)[:width] - level).sum() / squares).item()
    return q_DE, {"kept": kept, "masked": int((~counted_ST).sum())}


def _after(passes: Passes, family: Family, number: int, part: str, x_BTD: Tensor, q_DE: Tensor) -> Tensor:
    """The state after a part, if x is the state before the part: the sum of the state x Q Q' and the part's output for
    the input x Q Q'."""
    x_BTD, q_DE = x_BTD.to(passes.device, passes.model.dtype), q_DE.to(passes.device, passes.model.dtype)
    x_BTD = x_BTD @ q_DE @ q_DE.T
    added_BTD = part_output(passes.layers[number], family, part, x_BTD, **passes.context[number][1])
    return mean_free((x_BTD + added_BTD).float().cpu(), family)


# The tensors ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _turned(model: nn.Module, bases: list[Tensor]) -> dict[str, Tensor]:
    """All tensors in which the sliced model differs from the dense model, in float64, by their names in the state
    dict."""
    family, base = family_of(model), trunk(model)
    prefix, made = family.prefix, {}
    for number, layer in enumerate(decoder_layers(model)):
        for index, part in enumerate(PARTS):
            q_DE, next_DE = bases[2 * number + index:2 * number + index + 2]
            writer = family.parts[part].writer
            for name in family.parts[part].readers:
                made |= _reader(f"{prefix}{number}.{name}", layer.get_submodule(name), norm_of(layer, family, part),
                                q_DE)
            made |= _writer(f"{prefix}{number}.{writer}", layer.get_submodule(writer), family, next_DE)
            # x' = x Q  ->  x' (Q' Q_next)
            made[f"{prefix}{number}.{part}_shortcut.weight"] = next_DE.T @ q_DE
    for name in family.embeddings:
        # E <- E Q_0
        weight_VD = mean_free(getattr(base, name).weight.double(), family)
        made[f"{family.trunk}.{name}.weight"] = weight_VD @ bases[0]
    return made | _reader(family.head, output_head(model), final_norm(model), bases[-1])


def _reader(path: str, linear: nn.Linear, norm: nn.Module, q_DE: Tensor) -> dict[str, Tensor]:
    weight_RD, bias_R = linear.weight.double(), linear.bias
    gain_D, shift_D = (getattr(norm, name, None) for name in ("weight", "bias"))
    # W <- W diag(gain) Q,    b <- b + W shift
    scaled_RD = weight_RD if gain_D is None else weight_RD * gain_D.double()
    made = {f"{path}.weight": scaled_RD @ q_DE}
    if bias_R is not None or shift_D is not None:
        made[f"{path}.bias"] = (0 if bias_R is None else bias_R.double()) + \
            (0 if shift_D is None else weight_RD @ shift_D.double())
    return made


def _writer(path: str, linear: nn.Linear, family: Family, q_DE: Tensor) -> dict[str, Tensor]:
    # W <- Q' W,    b <- Q' b
    made = {f"{path}.weight": q_DE.T @ mean_free(linear.weight.double().T, family).T}
    if linear.bias is not None:
        made[f"{path}.bias"] = q_DE.T @ mean_free(linear.bias.double(), family)
    return made


METHODS = (
    Method("slicegpt", "Ashkboos et al. 2024, SliceGPT: the width of the states cut to their principal components",
           "states narrowed", no_layer, compose=compose, refuses=refuses,
           example={"compose": {"multiple": 1}}),
)
