"""Functions that the trainings of the methods share: the learning rate, one update, the kept weights, and the error.

kdp_core.base.resume.Progress implements the loop over epochs and minibatches and stores its state on disk.
"""
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class TrainingFailed(RuntimeError):
    """The loss of a training is not a finite number."""


def cosine(update: int, total: int, *, warmup: int = 0, at_once: bool = False) -> float:
    """The learning rate of an update as a share of its peak: a linear rise, then half a cosine down to zero.

    update: number of the update, from 0.
    total: number of the update at which the rate reaches zero. If `total` is the number of updates, the rate is above
        zero in all updates.
    warmup: number of updates in which the rate rises. The first update has 1 / warmup of the full rate.
    at_once: if true, the cosine begins at update 0 and multiplies the rise. If false, the cosine follows the rise.
    """
    rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
    if at_once:
        # min(1, (t + 1) / W) * (1 + cos(pi t / T)) / 2
        return rise * _half_cosine(update, total)
    # (t + 1) / W for t < W, else (1 + cos(pi (t - W) / (T - W))) / 2
    return rise if update < warmup else _half_cosine(update - warmup, total - warmup)


def _half_cosine(update: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * update / max(1, total)))


def descend(loss: Tensor, optimiser: torch.optim.Optimizer, *, training: str, remedy: str,
            clip: float | None = None) -> None:
    """One update of an optimiser with the gradient of a loss.

    training: name of the training, for the message.
    remedy: advice for the message if the loss is not a finite number.
    clip: largest norm of the gradient; None means no limit.
    Raises TrainingFailed for a loss that is not finite.
    """
    if not torch.isfinite(loss):
        raise TrainingFailed(f"{training}: the loss is {loss.item()}; {remedy}")
    optimiser.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([weight for group in optimiser.param_groups for weight in group["params"]], clip)
    optimiser.step()


def copies(weights: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the current weights."""
    return [weight.detach().clone() for weight in weights]


@torch.no_grad()
def restore(weights: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Set the weights to the values that `copies` returned."""
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)
