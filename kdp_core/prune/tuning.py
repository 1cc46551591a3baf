"""The training loop of fine-tuning: low-rank changes are trained to match the dense model's outputs.

The loss is that of KDP (Ma et al., ICLR 2026), appendix B (`kdp_core.model.distil`). The loop knows only a `Student`:
the trained weights, and a function that computes the losses of some sequences. The best epoch by a held-out number is
kept. The start counts as an epoch. Measured by this number, the result is therefore never worse than the start.
"""
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from kdp_core.base.resume import Progress, Resume
from kdp_core.methods._train import copies, cosine, restore
from kdp_core.model.distil import Losses

logger = logging.getLogger(__name__)


class FinetuneError(ValueError):
    """Fine-tuning is not possible with these options, models or tokens."""


class Options(NamedTuple):
    """The options of the function `finetune`, which are described in its docstring."""
    targets: str
    rank: int
    alpha: float
    dropout: float
    lr: float
    epochs: int
    kl_weight: float
    temperature: float
    batch_sequences: int
    warmup: float
    clip: float
    heldout: float
    judge: str
    seed: int


class Student(NamedTuple):
    """A pruned model with low-rank changes, or the part of the model that the changes can influence."""
    module: nn.Module
    """The module that is in training mode during updates, so that its dropout is active."""
    weights: list[Tensor]
    """The trained weights: the factors A and B of all changes."""
    losses: Callable[[Tensor], Losses]
    """The losses of the sequences with the given numbers."""
    change: Callable[[], dict[str, Tensor]]
    """The tensors of a checkpoint that the changes add or replace."""


def train(build: Callable[[], Student], train_S: Tensor, held_S: Tensor, part_sequences: int, device: torch.device,
          options: Options, resume: Resume) -> tuple[Student, list[dict[str, Any]], int]:
    """Train the student that `build` makes on the sequences train_S. Returns the student with its best weights, one
    entry for each epoch, and the number of the best epoch.

    held_S: sequences that only judge epochs.
    part_sequences: number of sequences in a forward pass of an update.
    """
    # peft and dropout use the global random generator, whose state is set here and restored afterwards
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        student = build()
        updates = options.epochs * math.ceil(len(train_S) / options.batch_sequences)
        optimiser = torch.optim.Adam(student.weights, lr=options.lr)
        rise = math.ceil(options.warmup * updates)
        schedule = LambdaLR(optimiser, lambda update: cosine(update, updates, warmup=rise))
        order = torch.Generator().manual_seed(options.seed)
        progress = Progress(resume, student.weights, {"adam": optimiser, "rate": schedule, "order": order,
                                                      "dropout": _global(device)},
                            curve=[_entry(0, 0.0, None, None, _judge(student, held_S))], best=0,
                            best_weights=copies(student.weights), total=0.0, lr=None)
        values, curve = progress.values, progress.values["curve"]
        for epoch in progress.epochs(options.epochs):
            if progress.update == 0:
                values["lr"] = schedule.get_last_lr()[0]
            order_S = progress.order(lambda: torch.randperm(len(train_S), generator=order))
            student.module.train()
            for which in progress.updates(order_S.split(options.batch_sequences)):
                loss = _update(student, train_S[which], part_sequences, optimiser, options.clip)
                values["total"] += loss * len(which) / len(order_S)
                schedule.step()
            loss, values["total"] = values["total"], 0.0
            seconds = progress.seconds() - sum(entry["seconds"] for entry in curve)
            with progress.judging():
                curve.append(_entry(epoch, seconds, values["lr"], loss, _judge(student, held_S)))
            if figure(curve[epoch], options.judge) < figure(curve[values["best"]], options.judge):
                values |= {"best": epoch, "best_weights": copies(student.weights)}
        restore(student.weights, values["best_weights"])
    return student, curve, values["best"]


def _global(device: torch.device) -> torch.Generator:
    """The random generator that dropout uses on this device."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _update(student: Student, which_S: Tensor, part_sequences: int, optimiser: torch.optim.Optimizer,
            clip: float) -> float:
    """One update on the sequences which_S. Returns the mean loss over these sequences."""
    total = 0.0
    optimiser.zero_grad()
    for part_S in which_S.split(part_sequences):
        loss = len(part_S) / len(which_S) * student.losses(part_S).loss
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(student.weights, clip)
    optimiser.step()
    return total


@torch.no_grad()
def _judge(student: Student, held_S: Tensor) -> Losses:
    student.module.eval()
    return student.losses(held_S)


def _entry(epoch: int, seconds: float, lr: float | None, loss: float | None, held: Losses) -> dict[str, Any]:
    entry = {"epoch": epoch, "seconds": seconds, "lr": lr, "loss": loss, "heldout_loss": held.loss.item(),
             "heldout_kl_nats": held.kl_nats.item(), "heldout_ce_nats": held.ce_nats.item()}
    logger.info("epoch %d: held-out loss %.4f, KL %.4f nats, perplexity %.2f", epoch, entry["heldout_loss"],
                entry["heldout_kl_nats"], math.exp(min(entry["heldout_ce_nats"], 99.0)))
    return entry


def figure(entry: dict[str, Any], judge: str) -> float:
    """The held-out number by which an epoch is judged; lower is better.

    If `judge` is ppl, this number is the cross-entropy. NaN counts as infinite.
    """
    value = entry["heldout_ce_nats" if judge == "ppl" else "heldout_loss"]
    return math.inf if math.isnan(value) else value
