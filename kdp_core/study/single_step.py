"""What single-step predictions say about a pruned model: statistics on a few windows of text, without generating text.

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026). The paper argues that a pruned
model can still generate if the probabilities change little in one step. Here both models read the same text. Every
statistic is a mean over all positions of all windows. Position 0 is left out, because its token is massive in most
models. The statistics are:
    kl                KL(p || p'), nats
    estimate_kl       Var_p(Dz) / 2, its estimate to second order (kdp_core.study.distances)
    disagreement      1 - share of positions at which both models have the same most likely token
    entropy_change    |H(p') - H(p)|, nats
    margin_lost       how much of its lead over the strongest rival the dense model's choice loses, nats; a gain is 0
    angle_h, angle_z, angle_p    1 - cosine of the last states, of the logits and of the probabilities
A statistic with the prefix `last_` is the mean over only the last tokens of the windows, where decoding would begin.
All these statistics are 0 if the pruned model equals the dense model, and grow with the damage. Three further figures,
entropy, entropy_other and margin, describe the two models.
Axes: S windows, T tokens of a window, N tokens, D width, V vocabulary.
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.measurements import SingleStep
from kdp_core.base.options import Count
from kdp_core.model import checkpoints
from kdp_core.model.distil import head_of
from kdp_core.model.families import decoder_layers
from kdp_core.score import standard_errors
from kdp_core.states.bases import bases_of
from kdp_core.states.hidden import boundary_states
from kdp_core.study import distances

CHANGES = ("kl", "estimate_kl", "disagreement", "entropy_change", "margin_lost", "angle_h", "angle_z", "angle_p")
"""The statistics that are 0 for a pruned model that equals the dense model."""
LEVELS = ("entropy", "entropy_other", "margin")
LAST = "last_"


class SingleStepError(ValueError):
    """The models or the windows do not fit together."""


def measure(dense_folder: str | Path, pruned_folder: str | Path, ids_ST: Tensor, *, windows: Count = 8,
            device: str = "cpu", dtype: str = "float32") -> SingleStep:
    """The statistics of the checkpoint in `pruned_folder` against the dense checkpoint, on the first `windows` windows
    of `ids_ST`.

    windows: number of windows of held-out text; the first windows are taken.
    Raises OptionError for a value out of range, and SingleStepError for windows or models that do not fit together.
    """
    options.check(measure, locals())
    _check(ids_ST, windows)
    dense, pruned = (checkpoints.load_model(folder, device=device, dtype=dtype)
                     for folder in (dense_folder, pruned_folder))
    return compare(dense, pruned, ids_ST[:windows])


@torch.inference_mode()
def compare(dense: nn.Module, pruned: nn.Module, ids_ST: Tensor, h_STD: Tensor | None = None) -> SingleStep:
    """Compare two loaded models on all windows, in the same way as `measure`.

    `h_STD` has the dense model's last states, or is None if they are not known.
    """
    S, T = ids_ST.shape
    _check(ids_ST, S)
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise SingleStepError(f"the dense model has {dense.config.vocab_size} tokens and the pruned one "
                              f"{pruned.config.vocab_size}; compare a pruned model with the model it was made of")
    h_STD = last_states(dense, ids_ST) if h_STD is None else h_STD
    other_STE = last_states(pruned, ids_ST)
    if not torch.isfinite(other_STE).all():
        raise SingleStepError("the last state of the pruned model is not finite; compare in dtype float32")
    basis = bases_of(dense, pruned)[-1] if getattr(pruned.config, "sliced", None) else None
    if basis is None and h_STD.shape[-1] != other_STE.shape[-1]:
        raise SingleStepError(f"states have {h_STD.shape[-1]} numbers in the dense model and {other_STE.shape[-1]} in "
                              "the pruned one; compare a pruned model with the model it was made of")
    h_ND, other_NE = (states[:, 1:].flatten(0, 1) for states in (h_STD, other_STE))
    size = max(1, head_of(dense).chunk() // 8)
    chunks = [_of_tokens(dense, pruned, h_CD, other_CE, basis)
              for h_CD, other_CE in zip(h_ND.split(size), other_NE.split(size), strict=True)]
    return _record({name: torch.cat([chunk[name] for chunk in chunks]).view(S, T - 1) for name in chunks[0]})


def last_states(model: nn.Module, ids_ST: Tensor) -> Tensor:
    """The states before the final norm, float32 (S, T, D). The model reads one window at a time."""
    layers = len(decoder_layers(model))
    return torch.cat([boundary_states(model, ids_1T, [layers])[0] for ids_1T in ids_ST.split(1)])


def of_logits(z_NV: Tensor, other_NV: Tensor) -> dict[str, Tensor]:
    """The statistics of each token that are computed from the logits alone, float64 (N,)."""
    found = distances.outputs(z_NV, other_NV, 1.0)
    logp_NV, logq_NV = (z.double().log_softmax(dim=-1) for z in (z_NV, other_NV))
    # H(p) = -sum_v p_v log p_v
    entropy_N, entropy_other_N = (-(logs.exp() * logs).sum(dim=-1) for logs in (logp_NV, logq_NV))
    margin_N, left_N = margin(logp_NV, logp_NV), margin(logp_NV, logq_NV)
    return {"kl": found["kl"], "estimate_kl": found["estimate_kl"], "disagreement": 1 - found["agreement"],
            "entropy_change": (entropy_other_N - entropy_N).abs(), "margin_lost": (margin_N - left_N).clamp_min(0),
            "angle_z": distances.angle(z_NV, other_NV), "angle_p": found["angle_p"],
            "entropy": entropy_N, "entropy_other": entropy_other_N, "margin": margin_N}


def margin(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """Lead of p's most likely token under q, (N,): the log probability of this token under q, minus the largest log
    probability of the other tokens under q. The lead is negative if q gives another token a higher probability."""
    first_N1 = logp_NV.argmax(dim=-1, keepdim=True)
    rival_N = logq_NV.scatter(-1, first_N1, -torch.inf).max(dim=-1).values
    return logq_NV.gather(-1, first_N1)[:, 0] - rival_N


def _of_tokens(dense: nn.Module, pruned: nn.Module, h_CD: Tensor, other_CE: Tensor,
               basis_DE: Tensor | None) -> dict[str, Tensor]:
    z_CV, other_CV = (distances.logits(model, states).float().cpu()
                      for model, states in ((dense, h_CD), (pruned, other_CE)))
    return {**of_logits(z_CV, other_CV), "angle_h": distances.angle(*distances.turned(dense, h_CD, other_CE, basis_DE))}


def _record(found: dict[str, Tensor]) -> SingleStep:
    """Means over all positions and means over last tokens, each with its standard error over windows."""
    values, errors = {}, {}
    for name in (*CHANGES, *LEVELS):
        by_window_S, last_S = found[name].mean(dim=1), found[name][:, -1]
        for prefix, values_S in (("", by_window_S), (LAST, last_S)):
            if name in CHANGES or not prefix:
                values[prefix + name] = values_S.mean().item()
                errors[prefix + name] = standard_errors.mean(values_S)
    windows, positions = found["kl"].shape
    return SingleStep(windows, positions, values, errors)


def _check(ids_ST: Tensor, windows: int) -> None:
    if windows > len(ids_ST):
        raise SingleStepError(f"windows is {windows}, but the text has {len(ids_ST)}; ask for fewer, or give more text")
    if ids_ST.shape[1] < 2:
        raise SingleStepError(f"windows of {ids_ST.shape[1]} token have none after position 0; give at least 2 tokens")
