"""What pruning did to the states and to the outputs of a model, beside the dense model on held-out windows.

States: the pruned model is compared at every boundary it has, that is, at what each of its layers reads and at the
state before the final norm, with the dense model's state of the same number. A layer that follows a stand-in reads
the stand-in's output, so a kept layer's error is what it inherits from all replaced blocks below it. Numbers are the
dense model's, so that methods which drop different layers share one axis.
    error  = sum |h' - h|^2 / sum |h - mean h|^2    0 perfect, 1 as good as the constant mean
    cosine = mean of cos(h', h) over tokens
States of a sliced model (kdp_core.methods.slicegpt) are turned back to the dense model's basis first, where the directions cut
are zero; where the norms are layer norms both models' states are compared without their mean, which nothing reads.
Tokens whose dense state is massive (norm above a factor times the median norm of its window in that state) are left
out of both and counted: a few of them would be nearly all of either sum. kdp_core.states.hidden takes the median over all
windows; here it is each window's, so that states need not be kept or computed twice.

Outputs: KL(p || p'), agreement of the most likely token and negative log-likelihood, over all tokens that have a next
one in their window, with standard errors over windows. Not in the KDP paper, which reports task scores alone.
"""
import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from kdp_core.base.records import Diagnosis
from kdp_core.model import checkpoints
from kdp_core.model.distil import head_of, to_head
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.states.bases import bases_of, mean_free
from kdp_core.states.hidden import boundary_states

logger = logging.getLogger(__name__)


class DiagnoseError(ValueError):
    """Models, windows or options that cannot be compared."""


class StateSums(NamedTuple):
    """Sums over counted tokens, one entry a state, float64; batches add up."""
    error_K: Tensor
    """Of |h' - h|^2."""
    square_K: Tensor
    """Of |h|^2."""
    state_KD: Tensor
    """Of h."""
    cosine_K: Tensor
    counted_K: Tensor
    """Tokens."""


def diagnose(dense_folder: str | Path, pruned_folder: str | Path, ids_ST: Tensor, *, dropped: list[int],
             windows: int = 8, batch: int = 4, massive_factor: float = 8.0, device: str = "cpu",
             dtype: str = "float32", trust_remote_code: bool = False) -> Diagnosis:
    """Compare two checkpoints on the first `windows` sequences of `ids_ST` (int64, no padding).

    dropped: layers of the dense model that the pruned one lacks, as in Plan.drop.
    batch: windows at a time; in memory are the states of one batch in both models and a chunk of their logits.
    massive_factor: a token is left out of a state where its dense norm exceeds this times its window's median norm.
    Raises DiagnoseError before loading where layers, widths, vocabularies or windows do not fit.
    """
    dense_config, pruned_config = (AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
                                   for folder in (dense_folder, pruned_folder))
    _check_configs(dense_config, pruned_config, dropped)
    _check_windows(ids_ST, windows, batch, massive_factor, dense_config.vocab_size)
    dense, pruned = (checkpoints.load_model(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
                     for folder in (dense_folder, pruned_folder))
    return compare(dense, pruned, ids_ST[:windows], dropped=dropped, batch=batch, massive_factor=massive_factor)


@torch.inference_mode()
def compare(dense: nn.Module, pruned: nn.Module, ids_ST: Tensor, *, dropped: list[int], batch: int = 4,
            massive_factor: float = 8.0) -> Diagnosis:
    """As `diagnose`, for two loaded models in eval mode and all windows of `ids_ST`. Raises DiagnoseError."""
    _check_configs(dense.config, pruned.config, dropped)
    S, T = ids_ST.shape
    _check_windows(ids_ST, S, batch, massive_factor, dense.config.vocab_size)
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
    """Dense numbers of the pruned model's states, ascending: its layers' and the last. A stand-in's output counts."""
    return [layer for layer in range(layers) if layer not in set(dropped)] + [layers]


def state_sums(h_KBTD: list[Tensor], other_KBTD: list[Tensor], massive_factor: float) -> StateSums:
    """Sums of one batch over the tokens whose dense state h is not massive; float32 states, float64 sums."""
    rows = []
    for h_BTD, other_BTD in zip(h_KBTD, other_KBTD, strict=True):
        norm_BT = h_BTD.norm(dim=-1)
        counted_BT = norm_BT <= massive_factor * norm_BT.median(dim=1, keepdim=True).values
        h_ND, other_ND = h_BTD[counted_BT].double(), other_BTD[counted_BT].double()
        rows.append(((other_ND - h_ND).square().sum(), h_ND.square().sum(), h_ND.sum(dim=0),
                     functional.cosine_similarity(h_ND, other_ND).clamp(-1, 1).sum(), counted_BT.sum().double()))
    return StateSums(*(torch.stack(column) for column in zip(*rows, strict=True)))


def compare_outputs(dense: nn.Module, pruned: nn.Module, h_BTD: Tensor, other_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """KL, agreement, dense and pruned negative log-likelihood, each window's mean over its T - 1 predictions.

    Takes the states before the final norm; returns float64 (4, B), on the CPU. A chunk of tokens goes through both
    heads at a time, so that a vocabulary of 128k never stands in memory for a whole batch.
    """
    B, T = ids_BT.shape
    h_ND, other_ND, next_N = h_BTD[:, :-1].flatten(0, 1), other_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    size = head_of(dense).chunk()
    chunks = [_compare_chunk(log_probabilities(dense, h_CD), log_probabilities(pruned, other_CD), next_C)
              for h_CD, other_CD, next_C in zip(h_ND.split(size), other_ND.split(size), next_N.split(size),
                                                strict=True)]
    return torch.cat(chunks, dim=1).view(4, B, T - 1).mean(dim=2)


def _compare_chunk(logp_CV: Tensor, logq_CV: Tensor, next_C: Tensor) -> Tensor:
    """KL, agreement, dense and pruned negative log-likelihood of each token, float64 (4, C)."""
    next_C1, logq_CV = next_C.to(logp_CV.device)[:, None], logq_CV.to(logp_CV.device)
    # KL(p || q) = sum_v p_v (log p_v - log q_v)
    kl_C = (logp_CV.exp() * (logp_CV - logq_CV)).sum(dim=1)
    same_C = logp_CV.argmax(dim=1) == logq_CV.argmax(dim=1)
    return torch.stack([row_C.double().cpu() for row_C in
                        (kl_C, same_C, -logp_CV.gather(1, next_C1)[:, 0], -logq_CV.gather(1, next_C1)[:, 0])])


def log_probabilities(model: nn.Module, h_CD: Tensor) -> Tensor:
    """From states before the final norm to log-probabilities of the next token, float32 (C, V), on the model's device.

    What the families do after their last layer stands in kdp_core.model.distil.
    """
    return head_of(model)(to_head(model, h_CD)).log_softmax(dim=-1)


def _record(states: list[int], dropped: list[int], sums: StateSums, outputs_4S: Tensor, S: int, T: int,
            massive_factor: float) -> Diagnosis:
    # sum |h - mean h|^2 = sum |h|^2 - |sum h|^2 / N
    spread_K = sums.square_K - sums.state_KD.square().sum(dim=1) / sums.counted_K
    # what rounding leaves of a spread of zero
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
    """Mean over windows and its standard error, which one window does not give."""
    error = values_S.std().item() / math.sqrt(len(values_S)) if len(values_S) > 1 else None
    return values_S.mean().item(), error


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


def _check_windows(ids_ST: Tensor, windows: int, batch: int, massive_factor: float, vocabulary: int) -> None:
    S, T = ids_ST.shape
    if not 1 <= windows <= S:
        raise DiagnoseError(f"windows {windows}: there are {S} held-out windows; give a number from 1 to {S}, or more "
                            "text")
    if T < 2:
        raise DiagnoseError(f"windows of {T} token have no next token to predict; give at least 2 tokens a window")
    if batch < 1:
        raise DiagnoseError(f"batch {batch}: give at least 1 window at a time")
    if not massive_factor > 1:
        raise DiagnoseError(f"massive_factor {massive_factor}: half of all tokens would be left out; give more than 1, "
                            "such as 8")
    if not 0 <= int(ids_ST.min()) <= int(ids_ST.max()) < vocabulary:
        raise DiagnoseError(f"token ids run from {int(ids_ST.min())} to {int(ids_ST.max())} and the vocabulary has "
                            f"{vocabulary}; tokenise the windows with this model's tokenizer")


def _check_finite(h_KBTD: list[Tensor], states: list[int], which: str) -> None:
    for state, h_BTD in zip(states, h_KBTD, strict=True):
        if not torch.isfinite(h_BTD).all():
            raise DiagnoseError(f"state {state} (dense number) of the {which} model is not finite; compare in dtype "
                                "float32, and if it stays so the model is broken: fold it again")
