"""The effect of pruning on the states and the outputs of a model, compared with the dense model on held-out windows.

States: the models are compared at all states of the pruned model: at the inputs of its layers, and at the state before
the final norm. A layer above a stand-in reads the stand-in's output, so the error at a kept layer comes from all
replaced blocks below this layer. States have the same numbers as in the dense model, so methods that remove different
layers can be drawn on one axis.
    error  = sum |h' - h|^2 / sum |h - mean h|^2    0 perfect, 1 as good as the constant mean
    cosine = mean of cos(h', h) over tokens
The error is kdp_core.states.block.relative_error, summed over batches, because the states of all windows do not fit
into memory. The states of a sliced model (kdp_core.states.bases) are first turned back to the basis of the dense model.
In the basis of the dense model the removed directions are zero. If the sliced model has layer norms, the mean of each
state is also subtracted in both models, because no layer reads this mean.
A token is massive in a state if its norm in the dense model exceeds `massive_factor` times the median norm of its
window in this state. Massive tokens are counted and left out of error and cosine, because a few of them would dominate
both sums. The module kdp_core.states.hidden computes the median norm over all windows. In this module each window has
its own median, so the states need not be stored or computed twice.

Outputs: KL(p || p'), agreement of the most likely token, and negative log-likelihood, with standard errors over
windows. The last token of a window is left out, because it has no next token. The KDP paper reports task scores and
none of these measures.
Axes: S windows, T tokens of a window, B windows of a batch, K states, N tokens, C tokens of a chunk, D width,
V vocabulary.
"""
import logging
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from kdp_core.base import options
from kdp_core.base.measurements import Diagnosis
from kdp_core.base.options import Count
from kdp_core.model import checkpoints
from kdp_core.model.distil import head_of, to_head
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.score import standard_errors
from kdp_core.states.bases import bases_of, mean_free
from kdp_core.states.hidden import boundary_states

logger = logging.getLogger(__name__)

MassiveFactor = Annotated[float, Gt(1)]
"""The multiple of a median norm above which a token is massive. The factor must exceed 1, because a factor of 1 would
mark half of all tokens as massive."""


class DiagnoseError(ValueError):
    """The models, windows or states do not fit together."""


class StateSums(NamedTuple):
    """Sums over the tokens that are not massive, one entry for each state, float64. The sums of several batches can be
    added."""
    error_K: Tensor
    """Sum of |h' - h|^2."""
    square_K: Tensor
    """Sum of |h|^2."""
    state_KD: Tensor
    """Sum of h."""
    cosine_K: Tensor
    """Sum of cos(h', h)."""
    counted_K: Tensor
    """Number of tokens that are not massive."""


def diagnose(dense_folder: str | Path, pruned_folder: str | Path, ids_ST: Tensor, *, dropped: list[int],
             windows: Count = 8, batch: Count = 4, massive_factor: MassiveFactor = 8.0, device: str = "cpu",
             dtype: str = "float32") -> Diagnosis:
    """Compare two checkpoints on the first `windows` sequences of `ids_ST` (int64, no padding).

    dropped: numbers of the removed layers of the dense model, as in Plan.drop.
    windows: number of windows on which the models are compared; the first windows are used.
    batch: number of windows of one batch. Memory use grows with the states of one batch in both models.
    massive_factor: a token is left out of a state if its norm in the dense model exceeds this factor times the median
        norm of its window.
    Log-likelihoods and KL are in nats. Standard errors are computed over windows. With one window the standard errors
    are None. Before a model is loaded, OptionError is raised for a value out of range. DiagnoseError is raised for
    layers, widths, vocabularies or windows that do not fit together.
    """
    options.check(diagnose, locals())
    dense_config, pruned_config = (AutoConfig.from_pretrained(folder) for folder in (dense_folder, pruned_folder))
    _check_configs(dense_config, pruned_config, dropped)
    _check_windows(ids_ST, windows, dense_config.vocab_size)
    dense, pruned = (checkpoints.load_model(folder, device=device, dtype=dtype)
                     for folder in (dense_folder, pruned_folder))
    return compare(dense, pruned, ids_ST[:windows], dropped=dropped, batch=batch, massive_factor=massive_factor)


@torch.inference_mode()
def compare(dense: nn.Module, pruned: nn.Module, ids_ST: Tensor, *, dropped: list[int], batch: Count = 4,
            massive_factor: MassiveFactor = 8.0) -> Diagnosis:
    """Compare two loaded models in eval mode on all windows of `ids_ST`, in the same way as `diagnose`.

    Raises the errors that `diagnose` raises, and DiagnoseError if states are not finite or are equal for all tokens.
    """
    options.check(compare, locals())
    _check_configs(dense.config, pruned.config, dropped)
    S, T = ids_ST.shape
    _check_windows(ids_ST, S, dense.config.vocab_size)
    states = kept_states(len(decoder_layers(dense)), dropped)
    own, sums, outputs = list(range(len(states))), None, []
    bases = bases_of(dense, pruned) if getattr(pruned.config, "sliced", None) else []
    for start in range(0, S, batch):
        ids_BT = ids_ST[start:start + batch]
        h_KBTD, other_KBTD = boundary_states(dense, ids_BT, states), boundary_states(pruned, ids_BT, own)
        _check_finite(h_KBTD, states, "dense")
        _check_finite(other_KBTD, states, "pruned")
        outputs.append(compare_outputs(dense, pruned, h_KBTD[-1], other_KBTD[-1], ids_BT))
        if bases:
            h_KBTD = [mean_free(h_BTD, family_of(dense)) for h_BTD in h_KBTD]
            other_KBTD = [other_BTE @ q_DE.T for other_BTE, q_DE in zip(other_KBTD, bases, strict=True)]
        more = state_sums(h_KBTD, other_KBTD, massive_factor)
        sums = more if sums is None else StateSums(*(a + b for a, b in zip(sums, more, strict=True)))
        logger.info("diagnose: %d of %d windows", min(start + batch, S), S)
    return _record(states, sorted(dropped), sums, torch.cat(outputs, dim=1), S, T, massive_factor)


def kept_states(layers: int, dropped: list[int]) -> list[int]:
    """The states that the pruned model also has, as numbers of the dense model's states, ascending. The list always
    contains the last state."""
    return [layer for layer in range(layers) if layer not in set(dropped)] + [layers]


def state_sums(h_KBTD: list[Tensor], other_KBTD: list[Tensor], massive_factor: float) -> StateSums:
    """Sums of one batch over the tokens that are not massive in the dense model. The states are float32 (B, T, D)."""
    found = []
    for h_BTD, other_BTD in zip(h_KBTD, other_KBTD, strict=True):
        norm_BT = h_BTD.norm(dim=-1)
        counted_BT = norm_BT <= massive_factor * norm_BT.median(dim=1, keepdim=True).values
        h_ND, other_ND = h_BTD[counted_BT].double(), other_BTD[counted_BT].double()
        found.append(((other_ND - h_ND).square().sum(), h_ND.square().sum(), h_ND.sum(dim=0),
                      functional.cosine_similarity(h_ND, other_ND).clamp(-1, 1).sum(), counted_BT.sum().double()))
    return StateSums(*(torch.stack(sums) for sums in zip(*found, strict=True)))


def compare_outputs(dense: nn.Module, pruned: nn.Module, h_BTD: Tensor, other_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """KL, agreement, and the negative log-likelihoods of the dense and the pruned model. Each of these figures is a
    mean over the T - 1 predictions of a window.

    The inputs are the states before the final norm. The result is float64 (4, B) on the CPU, in nats and shares. Both
    output heads read one chunk of tokens at a time, so the logits of a whole batch are never in memory (a vocabulary
    may have 128k tokens).
    """
    B, T = ids_BT.shape
    h_ND, other_ND, next_N = h_BTD[:, :-1].flatten(0, 1), other_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    size = head_of(dense).chunk()
    chunks = [_compare_chunk(log_probabilities(dense, h_CD), log_probabilities(pruned, other_CD), next_C)
              for h_CD, other_CD, next_C in zip(h_ND.split(size), other_ND.split(size), next_N.split(size),
                                                strict=True)]
    return torch.cat(chunks, dim=1).view(4, B, T - 1).mean(dim=2)


def _compare_chunk(logp_CV: Tensor, logq_CV: Tensor, next_C: Tensor) -> Tensor:
    """KL, agreement, and the negative log-likelihoods of the dense and the pruned model for each token, float64 (4,
    C)."""
    next_C1, logq_CV = next_C.to(logp_CV.device)[:, None], logq_CV.to(logp_CV.device)
    # KL(p || q) = sum_v p_v (log p_v - log q_v)
    kl_C = (logp_CV.exp() * (logp_CV - logq_CV)).sum(dim=1)
    same_C = logp_CV.argmax(dim=1) == logq_CV.argmax(dim=1)
    return torch.stack([value_C.double().cpu() for value_C in
                        (kl_C, same_C, -logp_CV.gather(1, next_C1)[:, 0], -logq_CV.gather(1, next_C1)[:, 0])])


def log_probabilities(model: nn.Module, h_CD: Tensor) -> Tensor:
    """Log-probabilities of the next token, float32 (C, V), on the model's device. The inputs are states before the
    final norm.

    The module kdp_core.model.distil defines, for each family, the computation between the last layer and the output
    head.
    """
    return head_of(model)(to_head(model, h_CD)).log_softmax(dim=-1)


def _record(states: list[int], dropped: list[int], sums: StateSums, outputs_4S: Tensor, S: int, T: int,
            massive_factor: float) -> Diagnosis:
    # sum |h - mean h|^2 = sum |h|^2 - |sum h|^2 / N
    spread_K = sums.square_K - sums.state_KD.square().sum(dim=1) / sums.counted_K
    # rounding turns a spread of zero into a small one
    flat = [state for state, bad in zip(states, (spread_K <= 1e-10 * sums.square_K).tolist(), strict=True) if bad]
    if flat:
        raise DiagnoseError(f"state {flat[0]} of the dense model is the same for all counted tokens, so no error is "
                            "relative to its spread; give windows of real text")
    kl_S, same_S, dense_S, pruned_S = outputs_4S
    (kl, kl_stderr), (agreement, agreement_stderr) = _mean(kl_S), _mean(same_S)
    (nll_dense, nll_dense_stderr), (nll_pruned, nll_pruned_stderr) = _mean(dense_S), _mean(pruned_S)
    nll_increase, nll_increase_stderr = _mean(pruned_S - dense_S)
    return Diagnosis(
        states=states, error=(sums.error_K / spread_K).tolist(), cosine=(sums.cosine_K / sums.counted_K).tolist(),
        masked=[S * T - round(count) for count in sums.counted_K.tolist()], tokens=S * T, windows=S, dropped=dropped,
        massive_factor=massive_factor, predictions=S * (T - 1), kl_nats=kl, kl_nats_stderr=kl_stderr,
        agreement=agreement, agreement_stderr=agreement_stderr, nll_dense_nats=nll_dense,
        nll_dense_nats_stderr=nll_dense_stderr, nll_pruned_nats=nll_pruned, nll_pruned_nats_stderr=nll_pruned_stderr,
        nll_increase_nats=nll_increase, nll_increase_nats_stderr=nll_increase_stderr)


def _mean(values_S: Tensor) -> tuple[float, float | None]:
    """Mean over windows, and the standard error of this mean."""
    return values_S.mean().item(), standard_errors.mean(values_S)


def _check_configs(dense: AutoConfig, pruned: AutoConfig, dropped: list[int]) -> None:
    layers, left = dense.num_hidden_layers, pruned.num_hidden_layers
    if len(set(dropped)) != len(dropped) or any(not 0 <= layer < layers for layer in dropped):
        raise DiagnoseError(f"dropped {dropped}: the dense model has layers 0 to {layers - 1}, each once; "
                            "give the layers of the plan's `drop`")
    if layers - len(dropped) != left:
        raise DiagnoseError(f"dropped names {len(dropped)} of {layers} layers and the pruned model has {left}, not "
                            f"{layers - len(dropped)}; give the layers of the very plan it was folded from")
    for name in ("hidden_size", "vocab_size"):
        if getattr(dense, name) != getattr(pruned, name):
            raise DiagnoseError(f"{name} is {getattr(dense, name)} in the dense model and {getattr(pruned, name)} in "
                                "the pruned one; only models of the same width and vocabulary can be compared")


def _check_windows(ids_ST: Tensor, windows: int, vocabulary: int) -> None:
    S, T = ids_ST.shape
    if windows > S:
        raise DiagnoseError(f"windows is {windows}, but there are {S} held-out windows; give at most {S}, or more text")
    if T < 2:
        raise DiagnoseError(f"windows of {T} token have no next token to predict; give windows of at least 2 tokens")
    if not 0 <= int(ids_ST.min()) <= int(ids_ST.max()) < vocabulary:
        raise DiagnoseError(f"token ids run from {int(ids_ST.min())} to {int(ids_ST.max())} and the vocabulary has "
                            f"{vocabulary}; tokenise the windows with this model's tokenizer")


def _check_finite(h_KBTD: list[Tensor], states: list[int], which: str) -> None:
    for state, h_BTD in zip(states, h_KBTD, strict=True):
        if not torch.isfinite(h_BTD).all():
            raise DiagnoseError(f"state {state} (dense number) of the {which} model is not finite; compare in dtype "
                                "float32, and fold the model again if it is not finite there either")
