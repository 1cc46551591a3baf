"""Training of some weights of a pruned model to match the outputs of the dense model. All other weights are frozen.

Adam lowers KL(dense || pruned) of the next-token distributions (kdp_core.model.distil). In each sequence only randomly
drawn positions are compared, because the output head causes half of the cost of a small model.

The loss on held-out sequences is computed before the first epoch and after each epoch. The weights of the best epoch
are kept. The weights before the first epoch are a candidate too. If kl_weight is 1, the training only imitates the
dense model. If kl_weight is less than 1, the loss also contains the next-token loss on the calibration text. A lower
kl_weight raises the divergence from the dense model. For kdp_narrow, it lowers the perplexity on similar text and also
on text of other kinds (docs/kdp.md and docs/decisions.md have the numbers).
"""
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base import products
from kdp_core.base.records import Tokens
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._train import copies, cosine, descend, restore
from kdp_core.model.distil import SLICED_TOKENS, Head, Losses, SlicedChunk, token_losses
from kdp_core.model.passes import Passes, Step
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
WARMUP = 8
"""Number of updates over which the learning rate rises. The rate is also multiplied by half a cosine, which falls to
zero over all updates."""
CLIP = 1.0
"""Largest norm of the gradient; a larger gradient is scaled down to this norm."""
KEPT_NUMBERS = 2**27
"""Largest number of logits of the dense model that are kept for several comparisons: 512 MiB in float32."""


class Data(NamedTuple):
    """The data that training reads. States are read for each minibatch, so the memory does not depend on the number of
    sequences."""
    start: Callable[[Tensor], Tensor]
    """Reads the states at the start of the path for the sequences with these numbers, (S, T, D)."""
    final: Callable[[Tensor], Tensor]
    """Reads the last states of the dense model for the sequences with these numbers, (S, T, D)."""
    ids_ST: Tensor
    head: Head | None = None
    """The output head of the dense model; None if the pruned model has the same head."""


def data_of(hidden: HiddenStates, tokens: Tokens, start: int) -> Data:
    """The data for training a path of layers whose input is state `start`. The layers before this state are unchanged
    layers of the dense model."""
    return Data(hidden.reader(start), hidden.reader(hidden.layers[-1]), tokens.ids_ST)


def train(passes: Passes, path: list[Step], data: Data, weights: list[Tensor], kept: Tensor, held: Tensor, *,
          epochs: int, lr: float, batch_sequences: int, positions: int, kl_weight: float, seed: int,
          resume: Resume = OFF) -> list[dict[str, Any]]:
    """Train `weights` in place on the sequences `kept`. Every tensor of `weights` must belong to the path. At the end,
    the weights have the values of the epoch with the lowest loss on the sequences `held`.

    Returns one entry for each epoch. The first entry describes the weights before the first epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99), fused=True)
    total = epochs * math.ceil(len(kept) / batch_sequences)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda update: cosine(update, total, warmup=WARMUP, at_once=True))
    judged = judge(passes, path, data, held, batch_sequences, kl_weight)
    progress = Progress(resume, weights, {"adam": adam, "rate": schedule, "order": generator},
                        best=judged["heldout_loss"], best_weights=copies(weights), sums=0.0,
                        curve=[{"epoch": 0, "seconds": 0.0, "kl": None, **judged}])
    values = progress.values
    for epoch in progress.epochs(epochs):
        order = progress.order(lambda: kept[torch.randperm(len(kept), generator=generator)])
        for which in progress.updates(order.split(batch_sequences)):
            values["sums"] += _update(passes, path, data, which, adam, positions, kl_weight, generator)
            schedule.step()
        kl, values["sums"] = values["sums"] / len(order), 0.0
        judged = judge(passes, path, data, held, batch_sequences, kl_weight)
        values["curve"].append({"epoch": epoch, "seconds": progress.seconds(), "kl": kl, **judged})
        logger.info("epoch %d of %d: divergence %.4f, held out %.4f nats", epoch, epochs, kl, judged["heldout_kl"])
        if judged["heldout_loss"] < values["best"]:
            values |= {"best": judged["heldout_loss"], "best_weights": copies(weights)}
    restore(weights, values["best_weights"])
    return values["curve"]


def _update(passes: Passes, path: list[Step], data: Data, which: Tensor, adam: torch.optim.Optimizer, positions: int,
          kl_weight: float, generator: torch.Generator) -> float:
    """One update. Returns the KL in nats per token, summed over the sequences of the update."""
    # the last position has no next token, so it is not compared
    chosen = torch.randperm(data.ids_ST.shape[1] - 1, generator=generator)[:positions].sort().values
    with products.attention(data.ids_ST.shape[1]):
        h_BTD = passes.run(data.start(which).to(passes.device, passes.model.dtype), path)
    losses = _loss(passes, h_BTD[:, chosen], data.final(which)[:, chosen], data.ids_ST[which][:, chosen + 1],
                   data.head, kl_weight)
    descend(losses.loss, adam, training="joint training", remedy="lower compose.lr", clip=CLIP)
    return losses.kl_nats.item() * len(which)


def _loss(passes: Passes, h_BPD: Tensor, final_BPD: Tensor, next_BP: Tensor, dense_head: Head | None,
          kl_weight: float) -> Losses:
    """Losses at some positions, from the last states of the pruned and of the dense model before the final norm."""
    return token_losses(passes.to_head(h_BPD).flatten(0, 1), passes.to_head(final_BPD).flatten(0, 1),
                        next_BP.flatten(), passes.head, dense_head or passes.head, kl_weight=kl_weight)


@torch.no_grad()
def judge(passes: Passes, path: list[Step], data: Data, held: Tensor, batch: int,
          kl_weight: float) -> dict[str, float]:
    """The loss and KL(dense || pruned) on the sequences `held`, in nats per token."""
    loss = kl = 0.0
    for which in held.split(batch):
        h_BTD = passes.run(data.start(which).to(passes.device, passes.model.dtype), path)
        losses = _loss(passes, h_BTD[:, :-1], data.final(which)[:, :-1], data.ids_ST[which][:, 1:],
                       data.head, kl_weight)
        loss, kl = loss + losses.loss.item() * len(which), kl + losses.kl_nats.item() * len(which)
    return {"heldout_loss": loss / len(held), "heldout_kl": kl / len(held)}


class Compared:
    """Compares the outputs of pruned models with those of the dense model on the same sequences. The dense model's
    logits are computed only once if they are few enough to be kept."""

    @torch.no_grad()
    def __init__(self, passes: Passes, final_STD: Tensor, batch: int) -> None:
        """final_STD: last states of the dense model. batch: number of sequences in a forward pass."""
        self.passes, self.batch = passes, batch
        self._dense = [self._entering(final_BTD) for final_BTD in final_STD.split(batch)]
        self._kept: list[list[list[Tensor]]] = []
        """The dense model's logits for each batch, chunk of tokens and slice of the vocabulary."""
        head = passes.head
        if head.sliced and head.rare is None and final_STD.shape[:2].numel() * head.linear.out_features <= KEPT_NUMBERS:
            self._kept = [[list(head.slices(head.prepared(dense_CD))) for dense_CD in dense_ND.split(SLICED_TOKENS)]
                          for dense_ND in self._dense]

    @torch.no_grad()
    def divergence(self, path: Sequence[Step], h_STD: Tensor, head: Head | None = None) -> float:
        """KL(dense || pruned) in nats per token, over all positions.

        h_STD: states at the start of the path.
        head: the output head of the pruned model; None if it is that of the dense model.
        """
        total = 0.0
        for number, h_BTD in enumerate(h_STD.split(self.batch)):
            student_ND = self._entering(self.passes.run(h_BTD.to(self.passes.device, self.passes.model.dtype), path))
            total += self._kl(student_ND, number, head) * len(h_BTD)
        return total / len(h_STD)

    def _kl(self, student_ND: Tensor, number: int, head: Head | None) -> float:
        """The divergence in batch `number`."""
        # next tokens are not read, because cross-entropy is not used
        next_N = torch.zeros(len(student_ND), dtype=torch.int64)
        own = self.passes.head
        if head is not None or not self._kept:
            return token_losses(student_ND, self._dense[number], next_N, head or own, own, kl_weight=1.0).kl_nats.item()
        chunks = zip(self._kept[number], student_ND.split(SLICED_TOKENS), next_N.split(SLICED_TOKENS), strict=True)
        sums = [SlicedChunk(dense, own.slices(own.prepared(student_CD)), next_C, 1.0, keep=False).sums_2[0]
                for dense, student_CD, next_C in chunks]
        return torch.stack(sums).sum().item() / len(student_ND)

    def _entering(self, h_BTD: Tensor) -> Tensor:
        """The states that enter the output head, (N, D)."""
        return self.passes.to_head(h_BTD).flatten(0, 1)
