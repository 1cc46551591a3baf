"""Distillation: a training loss that measures how far a pruned model's next-token distribution is from the dense
model's.

    L = lambda tau^2 KL(p || q) + (1 - lambda) CE,    p, q = softmax(logits / tau) of dense and pruned model

The loss is that of KDP (Ma et al., ICLR 2026), appendix B, with lambda = 0.5 and tau = 1. The factor tau^2 (Hinton et
al. 2015) keeps the gradients of the two terms comparable. The paper does not say whether its loss contains tau^2. For
the paper's tau = 1, tau^2 is 1 too. Cross-entropy is always at temperature 1. Both terms are means over the tokens that
have a next token.

The loss reads the states that enter the output heads. The dense model's states (S, T, D) never change, so they are
computed once and stored. The dense model's logits are computed again for one chunk of tokens at a time, so that no
matrix (N, V) is in memory. If the heads are not trained, the logits on a CPU are computed in slices of the vocabulary,
which stay in the cache of a core. The gradient of the states is then computed together with the loss.
Axes: C tokens of a chunk, W tokens of the vocabulary in a slice.
"""
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kdp_core.model.families import base_of, family_of, final_norm, output_head, trunk
from kdp_core.model.stand_ins import RareEmbedding, RareHead

CHUNK_NUMBERS = 2**24
"""Number of elements in one matrix of logits: 64 MiB in float32. About five such matrices are in memory at once."""
SLICE = 2048
"""Number of tokens of the vocabulary in a slice. A matrix product with a slice of the head's rows is faster than one
with all rows, because both the rows and the logits stay in the cache."""
SLICED_TOKENS = 256
"""Number of tokens whose logits are computed together in slices, if no gradient is needed."""


class DistilError(ValueError):
    """The loss cannot be computed from these states, token ids or options."""


class Losses(NamedTuple):
    """Scalars: means over the tokens that have a next token. Only `loss` has gradients."""
    loss: Tensor
    kl_nats: Tensor
    """KL(dense || pruned) at the given temperature, without tau^2."""
    ce_nats: Tensor
    """Cross-entropy of the next token, at temperature 1. The exponential of this value is the perplexity."""


class Head(nn.Module):
    """Maps the states that enter the output head, (..., D), to float32 logits, (..., V).

    `forward` applies an adapter (if there is one), then the output head, then the soft cap (in families that have one).
    """

    def __init__(self, linear: nn.Module, soft_cap: float | None = None, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.adapter, self.soft_cap = linear, adapter, soft_cap

    def forward(self, h: Tensor) -> Tensor:
        return self._capped(self.linear(self.prepared(h)))

    def prepared(self, h: Tensor) -> Tensor:
        """The input of the matrix: `h` after the adapter, in the precision and on the device of the matrix."""
        weight = self.linear.weight
        # the head of a spread model may be in main memory or on disk; accelerate moves it to the device of the states
        device = h.device if weight.is_meta else weight.device
        if self.adapter is not None:
            # the small adapter is trained in float32, whatever the model's precision is
            h = self.adapter(h.to(device, torch.float32))
        return h.to(device, weight.dtype)

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def chunk(self) -> int:
        """Number of tokens whose logits are in memory together."""
        return max(1, CHUNK_NUMBERS // self.linear.out_features)

    @property
    def sliced(self) -> bool:
        """Whether logits are computed in slices of the vocabulary: the matrix of the head is on a CPU, and nothing acts
        before or after it, such as a fine-tuned adapter or the code that moves a spread model's weights."""
        own = self.linear
        return (type(own) in (nn.Linear, RareHead) and own.weight.device.type == "cpu" and "forward" not in vars(own)
                and not own._forward_pre_hooks and not own._forward_hooks)

    @property
    def rare(self) -> RareEmbedding | None:
        """The embedding with rare rows to which the head is tied."""
        return self.linear.embedding if type(self.linear) is RareHead else None

    @property
    def trained(self) -> bool:
        """Whether the matrix of the head receives gradients."""
        return any(weight.requires_grad for weight in (self.rare or self.linear).parameters())

    def tokens(self) -> list[Tensor] | None:
        """The tokens of each slice. None means the order of the vocabulary; with rare rows, frequent tokens come
        first."""
        if not self.sliced or self.rare is None:
            return None
        order_V, count = self.rare.place.argsort(), len(self.rare.frequent)
        return [*order_V[:count].split(SLICE), *order_V[count:].split(SLICE)]

    def places(self, ids: Tensor) -> Tensor:
        """The places of tokens in the concatenated slices."""
        return self.rare.place[ids].long() if self.sliced and self.rare is not None else ids

    def slices(self, x: Tensor, tokens: list[Tensor] | None = None) -> Iterator[Tensor]:
        """The logits in slices of the vocabulary, (..., W) each. `x` is prepared. Without `sliced`, the only slice is
        the whole vocabulary.

        tokens: the tokens of each slice, for a plain matrix; None means the head's own order (`tokens`).
        """
        if not self.sliced:
            yield self._capped(self.linear(x))
            return
        low, shift = (x @ self.rare.basis.T, (x @ self.rare.mean)[..., None]) if self.rare else (None, None)
        for weight_WK, bias_W, is_rare in self._rows(tokens):
            # e_v = rare_v basis + mean
            yield self._capped(functional.linear(low, weight_WK) + shift if is_rare
                               else functional.linear(x, weight_WK, bias_W))

    def pulled(self, grads: Iterable[Tensor]) -> Tensor:
        """Gradient of the prepared states (C, D), from the gradients (C, W) of the logits of all slices."""
        whole, low, shift = 0.0, 0.0, 0.0
        for grad_CW, (weight_WK, _, is_rare) in zip(grads, self._rows(None), strict=True):
            part = (grad_CW.to(weight_WK.dtype) @ weight_WK).float()
            if is_rare:
                low, shift = low + part, shift + grad_CW.sum(dim=-1, keepdim=True)
            else:
                whole = whole + part
        return whole if self.rare is None else whole + low @ self.rare.basis.float() + shift * self.rare.mean.float()

    def _rows(self, tokens: list[Tensor] | None) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """The rows, the biases, and whether the rows are rare rows, for each slice."""
        if self.rare is not None:
            for rows, is_rare in ((self.rare.frequent, False), (self.rare.rare, True)):
                yield from ((weight_WK, None, is_rare) for weight_WK in rows.split(SLICE))
            return
        weight_VD, bias_V = self.linear.weight, self.linear.bias
        for which in tokens or (slice(first, first + SLICE) for first in range(0, len(weight_VD), SLICE)):
            yield weight_VD[which], None if bias_V is None else bias_V[which], False


def head_of(model: nn.Module) -> Head:
    """The head of a model, with the model's own weights."""
    cap = family_of(model).soft_cap
    return Head(output_head(model), getattr(model.config, cap) if cap else None)


def to_head(model: nn.Module, h: Tensor) -> Tensor:
    """The input of the output head, computed from states before the final norm. In some OPT models this input is
    projected to another width."""
    name = family_of(model).project_out
    project_out = getattr(trunk(model), name) if name else None
    h = final_norm(model)(h.to(model.device, model.dtype))
    return h if project_out is None else project_out(h)


@torch.no_grad()
def final_states(model: nn.Module, ids_ST: Tensor, *, batch_sequences: int = 8) -> Tensor:
    """h_STD: the input of the output head, after the final norm, in the model's precision, on the CPU."""
    return torch.cat([base_of(model)(ids_BT.to(model.device), use_cache=False).last_hidden_state.cpu()
                      for ids_BT in ids_ST.split(batch_sequences)])


def distillation_loss(student_STD: Tensor, teacher_STD: Tensor, head_student: Head, head_teacher: Head,
                      ids_ST: Tensor, *, kl_weight: float = 0.5, temperature: float = 1.0) -> Losses:
    """The loss L of this module's docstring, over one batch of sequences without padding.

    The student's states and head receive gradients; the teacher's states and head do not. If the student's head is
    trained and there are several chunks, each chunk is computed again in the backward pass. The loss then needs the
    memory of only one chunk, but takes two thirds more time.
    kl_weight: lambda, 0 (cross-entropy alone) to 1 (distillation alone).
    temperature: tau of the KL term, above 0.
    Raises DistilError for shapes that differ and values out of range.
    """
    _check(student_STD, teacher_STD, ids_ST, kl_weight, temperature)
    return token_losses(student_STD[:, :-1].flatten(0, 1), teacher_STD[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten(),
                        head_student, head_teacher, kl_weight=kl_weight, temperature=temperature)


def token_losses(student_ND: Tensor, teacher_ND: Tensor, next_N: Tensor, head_student: Head, head_teacher: Head, *,
                 kl_weight: float = 0.5, temperature: float = 1.0) -> Losses:
    """The same loss as `distillation_loss`, but over any list of tokens. `next_N` contains the id of each token's next
    token."""
    if _can_slice(head_student, head_teacher):
        return Losses(*_Sliced.apply(head_student.prepared(student_ND), head_teacher.prepared(teacher_ND).detach(),
                                     next_N.cpu(), head_student, head_teacher, kl_weight, temperature))
    chunks = [tokens.split(head_student.chunk()) for tokens in (student_ND, teacher_ND, next_N)]
    again = torch.is_grad_enabled() and len(chunks[0]) > 1
    sums_2 = torch.zeros(2, device=head_student.linear.weight.device)
    for student_CD, teacher_CD, next_C in zip(*chunks, strict=True):
        arguments = (student_CD, teacher_CD, next_C, head_student, head_teacher, temperature)
        sums_2 = sums_2 + (checkpoint(_chunk, *arguments, use_reentrant=False) if again else _chunk(*arguments))
    kl, ce = sums_2 / len(student_ND)
    # L = lambda tau^2 KL + (1 - lambda) CE
    return Losses(kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach())


def variance(weight_NV: Tensor, d_NV: Tensor) -> Tensor:
    """Var_w(d) for each token. For each token the weights w sum to 1."""
    mean_N = (weight_NV * d_NV).sum(dim=-1)
    return (weight_NV * (d_NV - mean_N[:, None]).square()).sum(dim=-1)


def _chunk(student_CD: Tensor, teacher_CD: Tensor, next_C: Tensor, head_student: Head, head_teacher: Head,
           temperature: float) -> Tensor:
    """The sum of KL and the sum of cross-entropy over a chunk, as a tensor (2,)."""
    with torch.no_grad():
        logp_CV = (head_teacher(teacher_CD) / temperature).log_softmax(dim=-1)
    logits_CV = head_student(student_CD)
    logq_CV = (logits_CV / temperature).log_softmax(dim=-1)
    # KL(p || q) = sum_v p_v (log p_v - log q_v)
    kl = functional.kl_div(logq_CV, logp_CV.to(logq_CV.device), reduction="sum", log_target=True)
    return torch.stack((kl, functional.cross_entropy(logits_CV, next_C.to(logits_CV.device), reduction="sum")))


def _can_slice(student: Head, teacher: Head) -> bool:
    """Whether the losses are computed in slices: the slices of both heads can have the same tokens, and the student's
    head is not trained."""
    alike = teacher.rare is None or teacher.linear is student.linear
    return student.sliced and teacher.sliced and alike and not (torch.is_grad_enabled() and student.trained)


class _Sliced(torch.autograd.Function):
    """The losses of `token_losses` from slices of the vocabulary. The heads receive no gradients.

    The gradient of the student's states is computed with the loss, while the logits of a chunk are in memory. So no
    logits are computed again, and none are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, next_N: Tensor, head_student: Head,
                head_teacher: Head, kl_weight: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[0]
        # about six matrices of CHUNK_NUMBERS are in memory: the probabilities and the logits of twice as many tokens
        size, tokens = 2 * head_student.chunk() if needed else SLICED_TOKENS, head_student.tokens()
        sums_2, grads, N = torch.zeros(2), [], len(student_ND)
        for student_CD, teacher_CD, next_C in zip(*(one.split(size) for one in (student_ND, teacher_ND, next_N)),
                                                  strict=True):
            chunk = SlicedChunk(head_teacher.slices(teacher_CD, tokens), head_student.slices(student_CD),
                                head_student.places(next_C), temperature, keep=needed)
            sums_2 += chunk.sums_2
            if needed:
                grads.append(chunk.gradient(head_student, kl_weight).div_(N).to(student_ND.dtype))
        ctx.save_for_backward(*([torch.cat(grads)] if needed else []))
        kl, ce = sums_2 / N
        ctx.mark_non_differentiable(kl, ce)
        # L = lambda tau^2 KL + (1 - lambda) CE
        return kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad, *[None] * 6


class SlicedChunk:
    """The sums of KL and of cross-entropy over the tokens of a chunk, and the gradient of their states.

    log Z is log sum_v exp of the logits z of the dense and z' of the pruned model at temperature tau:
        KL(p || q) = sum_v p_v (z_v - z'_v) / tau - log Z + log Z'.
    The sum over v is computed slice by slice, with the probabilities inside the slice. The probabilities of the slices
    are then the weights of their sums.
    """

    def __init__(self, dense: Iterable[Tensor], pruned: Iterable[Tensor], next_C: Tensor, temperature: float,
                 keep: bool) -> None:
        """next_C: the places of the next tokens in the slices. keep: whether `gradient` will be called."""
        self.next_C, self.temperature = next_C, temperature
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        """For each slice: the probabilities of both models inside the slice, and the logits of the pruned model. Empty
        if no gradient is needed."""
        sums, gaps, first, said_C = [], [], 0, torch.empty(len(next_C))
        for z_CW, other_CW in zip(dense, pruned, strict=True):
            inside, ids = self._targets(first, z_CW)
            said_C[inside] = other_CW[inside, ids]
            first += z_CW.shape[-1]
            p_CW, dense_C = _softmax(z_CW / temperature)
            if keep or temperature != 1.0:
                q_CW, pruned_C = _softmax(other_CW / temperature)
            plain_C = pruned_C if keep and temperature == 1.0 else other_CW.logsumexp(dim=-1)
            gaps.append((p_CW * (z_CW - other_CW)).sum(dim=-1) / temperature)
            sums.append((dense_C, plain_C if temperature == 1.0 else pruned_C, plain_C))
            if keep:
                self.kept.append((p_CW, q_CW, other_CW))
        # B slices
        self.dense_CB, self.pruned_CB, plain_CB = (torch.stack(one, dim=-1) for one in zip(*sums, strict=True))
        self.dense_C, self.pruned_C, self.plain_C = (
            one_CB.logsumexp(dim=-1) for one_CB in (self.dense_CB, self.pruned_CB, plain_CB))
        # KL(p || q) = sum_v p_v (z_v - z'_v) / tau - log Z + log Z'
        gap_C = (self.dense_CB.softmax(dim=-1) * torch.stack(gaps, dim=-1)).sum(dim=-1)
        self.sums_2 = torch.stack(((gap_C - self.dense_C + self.pruned_C).sum(), (self.plain_C - said_C).sum()))

    def gradient(self, head: Head, kl_weight: float) -> Tensor:
        """Gradient of lambda tau^2 KL + (1 - lambda) CE, summed over the tokens, with respect to the prepared states;
        (C, D)."""
        return head.pulled(self._of_logits(head.soft_cap, kl_weight))

    def _of_logits(self, soft_cap: float | None, kl_weight: float) -> Iterator[Tensor]:
        """The gradient of the logits before the soft cap, for each slice."""
        tau, first = self.temperature, 0
        # probabilities of the slices: with them, p_v inside a slice becomes p_v
        p_CB, q_CB = (self.dense_CB - self.dense_C[:, None]).exp(), (self.pruned_CB - self.pruned_C[:, None]).exp()
        for number, (p_CW, q_CW, other_CW) in enumerate(self.kept):
            # dL/dz' = lambda tau (q - p) + (1 - lambda) (q at temperature 1 - the next token)
            share = kl_weight * tau + (1 - kl_weight if tau == 1.0 else 0.0)
            grad_CW = q_CW.mul_(share * q_CB[:, number, None])
            grad_CW.addcmul_(p_CW, p_CB[:, number, None], value=-kl_weight * tau)
            if tau != 1.0:
                grad_CW.add_((other_CW - self.plain_C[:, None]).exp_(), alpha=1 - kl_weight)
            inside, ids = self._targets(first, q_CW)
            grad_CW[inside, ids] -= 1 - kl_weight
            if soft_cap is not None:
                # d(cap tanh(x / cap)) / dx = 1 - tanh(x / cap)^2
                grad_CW.mul_(1 - (other_CW / soft_cap).square_())
            first += grad_CW.shape[-1]
            yield grad_CW

    def _targets(self, first: int, slice_CW: Tensor) -> tuple[Tensor, Tensor]:
        """The positions whose next token is in the slice that begins at `first`, and these tokens' places in it."""
        inside = ((self.next_C >= first) & (self.next_C < first + slice_CW.shape[-1])).nonzero()[:, 0]
        return inside, self.next_C[inside] - first


def _softmax(z_CW: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log sum exp of each row."""
    top_C1 = z_CW.amax(dim=-1, keepdim=True)
    e_CW = (z_CW - top_C1).exp_()
    sum_C1 = e_CW.sum(dim=-1, keepdim=True)
    return e_CW.div_(sum_C1), (top_C1 + sum_C1.log())[:, 0]


def _check(student_STD: Tensor, teacher_STD: Tensor, ids_ST: Tensor, kl_weight: float, temperature: float) -> None:
    if student_STD.shape[:2] != ids_ST.shape or teacher_STD.shape[:2] != ids_ST.shape:
        raise DistilError(f"states of the pruned model are {list(student_STD.shape)}, of the dense model "
                          f"{list(teacher_STD.shape)}, ids {list(ids_ST.shape)}; give all three for the same sequences")
    if ids_ST.shape[0] < 1 or ids_ST.shape[1] < 2:
        raise DistilError(f"sequences of {ids_ST.shape[1]} tokens, {ids_ST.shape[0]} of them, have no next token to "
                          "predict; give at least one sequence of 2 tokens")
    if not 0 <= kl_weight <= 1:
        raise DistilError(f"kl_weight {kl_weight} is no share; give a number from 0 to 1")
    if not temperature > 0:
        raise DistilError(f"temperature {temperature} is not above 0; give 1 to 4")
