"""FLAP (An et al., AAAI 2024, arXiv 2312.11983): heads and channels whose inputs fluctuate least are replaced by a
bias.

Column j of a writer (o, down) multiplies the input feature x_j, which is observed on N tokens. The metric of the column
is WIFV, the weighted input feature variance,
    m_j = 1/(N - 1) sum_n (x_nj - mean_j)^2 |W_:j|^2.
In attentions, the metric is squared once more, as in the released code. Metrics are standardised over the columns of
one writer, (m - mean) / std, so that all layers and both parts can be compared. The metric of a head is the mean of the
metrics of its columns. All heads and channels of all layers form one list (the paper's AL-AM). The units with the
lowest metric are removed until the ratio is met. Here each unit counts with its own number of parameters; the released
code counts a head as 170 channels, 4 * 128 / 3. The mean contribution of the removed columns becomes a bias of the
writer,
    b = sum_{j removed} mean_j W_:j.
All means are computed on the dense model, and no weight changes.

The writers of LLaMA have no bias. The configuration of LLaMA can add biases to the writers only if the readers get
biases as well. The widths of a folded layer therefore contain `writer_bias: 1`, which gives the writers of the layer a
bias. The writers of OPT already have a bias, and b is added to this bias. Every writer of every layer gets the bias b.
The parameters of the new biases are subtracted from the number of removed parameters.

Where we differ from the released code (CASIA-IVA-Lab/FLAP 9bbad71):
    The ratio counts all parameters, and the nearest number of units is removed.
    At least one unit of each part of a layer is kept. The released code can remove all units of a part, and then it
        fails.
    A unit of grouped heads is a key-value head with its query heads. The released code does not support grouped heads.
    Sums are computed in float64.
    The released code reads 2,048 sequences of 128 tokens of WikiText-2 (the paper: 1,024). By default we read the whole
        calibration set.
"""
import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import ROUNDING, BlockError, no_layer
from kdp_core.methods.heads_channels.units import (
    PARTS,
    Sizes,
    coupled_of,
    first_states,
    layout,
    narrow_tensors,
    no_single_heads,
    run_layer,
    width_of,
)
from kdp_core.model import checkpoints
from kdp_core.model.families import WRITER_BIAS, decoder_layers, family_of, matrix
from kdp_core.model.passes import Passes
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


class Unit(NamedTuple):
    """A unit that can be removed: a head group or a channel. The metric is the first field, so that units are sorted by
    the metric."""
    metric: float
    part: str
    layer: int
    number: int


class _Sums(NamedTuple):
    """Sums over the tokens of a writer's inputs, float64."""
    count: int
    x_C: Tensor
    square_C: Tensor

    def add(self, x_NC: Tensor) -> "_Sums":
        x_NC = x_NC.double()
        total_C = x_NC.sum(0)
        # `double` has made a copy, which may be overwritten
        return _Sums(self.count + len(x_NC), self.x_C + total_C, self.square_C + x_NC.square_().sum(0))

    @property
    def mean_C(self) -> Tensor:
        return self.x_C / self.count

    @property
    def variance_C(self) -> Tensor:
        # 1/(N - 1) sum_n (x_n - mean)^2
        return (self.square_C - self.count * self.mean_C.square()).clamp_min(0) / (self.count - 1)


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", sequences: Count | None = None, batch_sequences: Count = 8,
            seed: int = 0) -> Composed:
    """Remove the heads and MLP channels whose outputs fluctuate least, and add the mean of the removed outputs as a
    bias.

    sequences: number of calibration sequences, drawn by `seed`; null means all.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises BlockError for a ratio that cannot be reached, and FitError for models that apply the norm after the residual
    addition.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config, _, sizes, total, blank = layout("flap", dense)
    added = _bias_params(blank)
    _check_reach(selection.ratio_target, total, added, sizes)
    h_STD = first_states(hidden, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    sums = _sums(Passes(model, hidden.tokens), h_STD, batch_sequences)
    removed = chosen(_units(model, sums, sizes), selection.ratio_target * total + added, sizes)
    tensors, widths, entries = {}, [], []
    for number in range(sizes.layers):
        lost = {part: sorted(unit.number for unit in removed if (unit.layer, unit.part) == (number, part))
                for part in PARTS}
        tensors |= _tensors(model, number, lost, sums[number], sizes)
        widths.append(width_of(config, sizes, len(lost["attention"]), len(lost["mlp"])) | {WRITER_BIAS: 1})
        entries.append({"layer": number, "groups": lost["attention"], "channels": len(lost["mlp"])})
    share = (sum(sizes.unit_params[unit.part] for unit in removed) - added) / total
    return Composed(Plan("flap", [], [], tensors, shape={"widths": widths}), [], [],
                    {"tokens": h_STD[..., 0].numel(), "layers": entries, "share": share, "bias_params": added,
                     "seconds": time.perf_counter() - began})


def _bias_params(model: nn.Module) -> int:
    """Number of parameters of the biases that are added to writers without a bias."""
    writers = (layer.get_submodule(part.writer) for layer in decoder_layers(model)
               for part in family_of(model).parts.values())
    return sum(len(matrix(writer)) for writer in writers if writer.bias is None)


def _check_reach(ratio: float, total: int, added: int, sizes: Sizes) -> None:
    most = sum(sizes.layers * (sizes.units[part] - 1) * sizes.unit_params[part] for part in PARTS) - added
    if ratio * total > most * (1 + ROUNDING):
        raise BlockError(f"ratio {ratio} is too high: all that flap can remove is {most / total:.4f} of all "
                         "parameters, as one head group and one channel of each layer are kept; ask for less")


def _sums(passes: Passes, h_STD: Tensor, batch: int) -> list[dict[str, _Sums]]:
    """For each layer and part of the dense model: sums over tokens of the inputs of the part's writer, and of the
    squared inputs."""
    found: list[dict[str, _Sums]] = []
    for number in range(len(passes.layers)):
        own: dict[str, _Sums] = {}

        def seen(part: str, x_NC: Tensor, own: dict[str, _Sums] = own) -> None:
            zeros_C = torch.zeros(x_NC.shape[1], dtype=torch.float64, device=x_NC.device)
            own[part] = own.get(part, _Sums(0, zeros_C, zeros_C)).add(x_NC)

        h_STD = run_layer(passes, number, h_STD, batch, seen)
        found.append(own)
        logger.info("read layer %d of %d", number + 1, len(passes.layers))
    return found


def metric(w_DC: Tensor, variance_C: Tensor, part: str, units: int) -> Tensor:
    """Standardised metric of the units of one writer, m_U."""
    # m_j = var_j |W_:j|^2
    m_C = variance_C * w_DC.double().square().sum(0)
    m_C = m_C.square() if part == "attention" else m_C
    # (m - mean) / std, then the mean over the columns of a unit
    spread = m_C.std()
    return ((m_C - m_C.mean()) / (spread if spread > 0 else 1.0)).unflatten(0, (units, -1)).mean(1)


def _units(model: nn.Module, sums: list[dict[str, _Sums]], sizes: Sizes) -> list[Unit]:
    """All units of all layers."""
    family, found = family_of(model), []
    for number, layer in enumerate(decoder_layers(model)):
        for part in PARTS:
            w_DC = matrix(layer.get_submodule(family.parts[part].writer)).detach()
            m_U = metric(w_DC, sums[number][part].variance_C, part, sizes.units[part])
            if not torch.isfinite(m_U).all():
                raise FitError(f"metrics of layer {number} are not finite; try dtype float32 for the model")
            found += [Unit(value, part, number, unit) for unit, value in enumerate(m_U.tolist())]
    return found


def chosen(units: list[Unit], goal: float, sizes: Sizes) -> list[Unit]:
    """Select units in ascending order of their metric, until the number of their parameters is nearest to `goal`. In
    each part of each layer at least one unit is kept."""
    left = {(number, part): sizes.units[part] for number in range(sizes.layers) for part in PARTS}
    removed: list[Unit] = []
    count = 0
    for unit in sorted(units):
        params = sizes.unit_params[unit.part]
        if left[unit.layer, unit.part] == 1:
            continue
        # of the two numbers around the goal, the nearer number is used; if both are equally near, the smaller number
        if count + params / 2 >= goal:
            break
        count += params
        left[unit.layer, unit.part] -= 1
        removed.append(unit)
    return removed


def _tensors(model: nn.Module, number: int, lost: dict[str, list[int]], sums: dict[str, _Sums],
             sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a layer without its removed units, and its writers' biases."""
    layer, family = decoder_layers(model)[number], family_of(model)
    kept = {part: torch.tensor(sorted(set(range(sizes.units[part])) - set(lost[part]))) for part in PARTS}
    made = narrow_tensors(model, number, coupled_of(layer, model.config), kept, sizes)
    for part in PARTS:
        writer = layer.get_submodule(family.parts[part].writer)
        gone_C = torch.ones(sizes.units[part], dtype=torch.float64, device=writer.weight.device)
        gone_C[kept[part]] = 0
        gone_C = gone_C.repeat_interleave(matrix(writer).shape[1] // sizes.units[part])
        # b = sum_{j removed} mean_j W_:j
        bias_D = matrix(writer).detach().double() @ (gone_C * sums[part].mean_C)
        bias_D = bias_D if writer.bias is None else bias_D + writer.bias.detach().double()
        made[f"{family.prefix}{number}.{family.parts[part].writer}.bias"] = bias_D.float().cpu()
    return made


METHODS = (
    Method("flap", "An et al. 2024, FLAP: heads and channels whose inputs fluctuate least give way to a bias",
           "heads and channels removed", no_layer, compose=compose,
           refuses=no_single_heads, example={"compose": {"sequences": 8}}),
)
