"""What a search for layers minimises. An objective is computed from the last states of the pruned and of the dense
model.

    loss        -1/N sum_t log q(x_t+1 | x_1 .. x_t), the next-token loss on calibration text
    kl          1/N sum_t KL(p || q), p and q the next-token distributions of the dense and of the pruned model
    last_state  1/N sum_t (1 - cos(h_t, h'_t)), the last states before the final norm
    margin      -1/I sum_i (s_i,right - max over wrong c of s_i,c), s_i,c the mean log q of the tokens of choice c
    accuracy    -1/I sum_i [s_i,right > max over wrong c of s_i,c]

The sums over t may use only some positions of each sequence. These positions are evenly spaced and the same for every
set. The output head of a small model costs as much as several layers (eight for SmolLM2-135M). With 16 of 128
positions, the head costs as much as one layer. The items of `margin` and `accuracy` are calibration items and never
those of an evaluation. Without a file, the items are made from the calibration sequences. The beginning of a sequence
is the context, the end of the sequence is the right choice, and the ends of other sequences are the wrong choices. Each
line of a file is a JSON object with `context`, `choices` and `answer`, the number of the right choice from 0.

Axes: R rows, I items. A row is the context of an item, followed by one choice of the item.
"""
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdp_core.base.records import Tokens
from kdp_core.methods._judge import RankError
from kdp_core.model.distil import token_losses
from kdp_core.model.passes import Passes

Goal = Literal["loss", "kl", "margin", "accuracy", "last_state"]
CHOICE_SHARE = 8
"""The last 1 / CHOICE_SHARE of the tokens of a sequence are its end, the right choice."""
MOST_TOKENS = 256
"""Largest number of tokens of an item of a file. A longer context is cut at its beginning."""


class Items(NamedTuple):
    """Multiple-choice items as rows of tokens that the model reads."""
    ids_RT: Tensor
    """Context and choice, padded at the end. The padding changes no prediction, because a causal model reads only
    earlier tokens."""
    choice_RT: Tensor
    """bool: the tokens of the choice."""
    item_R: Tensor
    """Number of the item."""
    right_R: Tensor
    """bool: whether the choice is right. Each item has one right choice."""


class Objective(NamedTuple):
    """What is minimised."""
    name: str
    ids_ST: Tensor
    """The sequences that the model reads."""
    score: Callable[[Passes, Tensor, Tensor], float]
    """Computes the value from the passes, the last states of the pruned model and the last states of the dense
    model."""


def objective_of(goal: Goal, ids_ST: Tensor, items: Items | None, positions: int | None = None) -> Objective:
    """An objective on calibration sequences, or on items for `margin` and `accuracy`.

    positions: number of positions of each sequence at which the objective is computed. With None, or with a number that
        is too large, all positions except the last are used.
    """
    if goal in ("margin", "accuracy"):
        return Objective(goal, items.ids_RT, lambda passes, last_RTD, _: _of_items(goal, passes, last_RTD, items))
    last = ids_ST.shape[1] - 1
    chosen = list(range(last)) if positions is None or positions >= last else spaced(last, positions)
    score = {"loss": partial(_loss, ids_ST=ids_ST), "kl": _divergence, "last_state": _turned}[goal]
    return Objective(goal, ids_ST, partial(score, chosen=chosen))


def spaced(length: int, positions: int) -> list[int]:
    """Select `positions` of the numbers 1 .. length - 1, evenly spaced up to the last number. Position 0 is omitted,
    because its token is massive.
    """
    return [length - 1 - (positions - 1 - i) * (length - 1) // positions for i in range(positions)]


def drawn(tokens: Tokens, sequences: int, draw: int) -> Tensor:
    """The ids of draw number `draw`: `sequences` sequences in their original order. Two draws share no sequence."""
    S, T = tokens.ids_ST.shape
    if T < 2:
        raise RankError(f"sequences of {T} tokens have no next token to predict; pack longer ones")
    if (draw + 1) * sequences > S:
        raise RankError(f"compose.draw {draw} of {sequences} sequences needs {(draw + 1) * sequences} calibration "
                        f"sequences, and there are {S}; lower compose.sequences or add calibration sequences")
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    return tokens.ids_ST[order[draw * sequences:(draw + 1) * sequences].sort().values]


@torch.no_grad()
def _loss(passes: Passes, last_STD: Tensor, dense_STD: Tensor, *, ids_ST: Tensor, chosen: list[int]) -> float:
    x_ND = passes.to_head(last_STD[:, chosen]).flatten(0, 1)
    next_SP = ids_ST[:, [place + 1 for place in chosen]]
    # -1/N sum_t log q(x_t+1 | x_1 .. x_t)
    return -_log_probabilities(passes, x_ND, next_SP.flatten()).double().mean().item()


@torch.no_grad()
def _divergence(passes: Passes, last_STD: Tensor, dense_STD: Tensor, *, chosen: list[int]) -> float:
    student_ND, dense_ND = (passes.to_head(h_STD[:, chosen]).flatten(0, 1) for h_STD in (last_STD, dense_STD))
    # KL(p || q) = sum_v p_v (log p_v - log q_v); cross-entropy, and so the next tokens, are not used
    next_N = torch.zeros(len(student_ND), dtype=torch.int64)
    return token_losses(student_ND, dense_ND, next_N, passes.head, passes.head, kl_weight=1.0).kl_nats.item()


def _turned(passes: Passes, last_STD: Tensor, dense_STD: Tensor, *, chosen: list[int]) -> float:
    # 1 - cos(h_t, h'_t)
    return 1 - cosine_similarity(last_STD[:, chosen].double(), dense_STD[:, chosen].double(), dim=-1).mean().item()


@torch.no_grad()
def _of_items(goal: str, passes: Passes, last_RTD: Tensor, items: Items) -> float:
    margin_I = margins(passes, last_RTD, items)
    return -(margin_I if goal == "margin" else (margin_I > 0).double()).mean().item()


def margins(passes: Passes, last_RTD: Tensor, items: Items) -> Tensor:
    """The score of the right choice minus the score of the best wrong choice, for each item; float64."""
    predicts_RT = items.choice_RT[:, 1:]
    x_ND = passes.to_head(last_RTD[:, :-1][predicts_RT])
    logq_N = _log_probabilities(passes, x_ND, items.ids_RT[:, 1:][predicts_RT]).double()
    row_N = predicts_RT.nonzero()[:, 0]
    R, count = len(items.ids_RT), int(items.item_R.max()) + 1
    # s = mean log q over the tokens of the choice
    score_R = torch.zeros(R, dtype=torch.float64).index_add_(0, row_N, logq_N) / predicts_RT.sum(dim=1)
    wrong_R = score_R.masked_fill(items.right_R, -torch.inf)
    best_I = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, items.item_R, wrong_R, "amax")
    return score_R[items.right_R] - best_I


def _log_probabilities(passes: Passes, x_ND: Tensor, next_N: Tensor) -> Tensor:
    """log q of each next token. Logits (C, V) are computed for one chunk of tokens at a time."""
    size = passes.head.chunk()
    return torch.cat([passes.head(x_CD).log_softmax(dim=-1).gather(-1, next_C.to(x_CD.device)[:, None])[:, 0].cpu()
                      for x_CD, next_C in zip(x_ND.split(size), next_N.split(size), strict=True)])


# Items ----------------------------------------------------------------------------------------------------------------

def items_of_text(ids_ST: Tensor, choices: int) -> Items:
    """Make one item from each sequence: the right choice is the end that belongs to the beginning of the sequence. The
    wrong ends are the ends of the next sequences.

    Raises RankError if there are fewer sequences than choices.
    """
    S, T = ids_ST.shape
    if choices > S:
        raise RankError(f"compose.choices is {choices}, but the ends of only {S} sequences can be chosen from; give 2 "
                        f"to {S}, or raise compose.sequences")
    end = max(1, T // CHOICE_SHARE)
    source_R = torch.tensor([(item + step) % S for item in range(S) for step in range(choices)])
    item_R = torch.arange(S).repeat_interleave(choices)
    ids_RT = torch.cat((ids_ST[item_R, :T - end], ids_ST[source_R, T - end:]), dim=1)
    choice_RT = (torch.arange(T) >= T - end).expand(len(item_R), T)
    return Items(ids_RT, choice_RT, item_R, source_R == item_R)


def items_of_file(path: str | Path, tokenizer: Any, start: int | None, count: int, draw: int) -> Items:
    """The items of `entries_of`, converted to token ids by the tokenizer.

    start: id of the token that begins a text, if the model has one.
    """
    rows, right = [], []
    for number, (context, choices, answer) in enumerate(entries_of(path, count, draw)):
        before = [] if start is None else [start]
        before += tokenizer(context, add_special_tokens=False)["input_ids"]
        for place, choice in enumerate(choices):
            own = tokenizer(f" {choice.strip()}", add_special_tokens=False)["input_ids"]
            kept = before[max(0, len(before) + len(own) - MOST_TOKENS):]
            rows.append((number, kept, own))
            right.append(place == answer)
    return _padded(rows, right)


def entries_of(path: str | Path, count: int, draw: int) -> list[tuple[str, list[str], int]]:
    """The entries of draw number `draw`: `count` items (context, choices, answer) of a file, in the order of the file.
    Two draws share no item.

    Raises RankError for a file that cannot be read, for entries that are not valid items, and for too few items.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines][draw * count:(draw + 1) * count]
        known = [(one["context"], one["choices"], one["answer"]) for one in entries]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RankError(f"compose.items {path} cannot be read as JSON lines with context, choices and answer: "
                        f"{error}") from None
    if len(known) < count:
        raise RankError(f"compose.items {path} has {len(lines)} items, and draw {draw} of {count} needs "
                        f"{(draw + 1) * count}; lower compose.sequences or compose.draw")
    for number, (_, choices, answer) in enumerate(known):
        if not (len(choices) > 1 and answer in range(len(choices))):
            raise RankError(f"compose.items {path}: item {number} has {len(choices)} choices and the answer {answer}; "
                            "give at least 2 choices and the number of one of them, from 0")
    return known


def _padded(rows: list[tuple[int, list[int], list[int]]], right: list[bool]) -> Items:
    """Rows of (item, context, choice), padded to one length. The padding is token 0, and no prediction reads it."""
    T = max(len(context) + len(choice) for _, context, choice in rows)
    ids_RT, choice_RT = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.bool)
    for row, (_, context, choice) in enumerate(rows):
        length = len(context) + len(choice)
        ids_RT[row, :length] = torch.tensor(context + choice)
        choice_RT[row, len(context):length] = True
    return Items(ids_RT, choice_RT, torch.tensor([item for item, *_ in rows]), torch.tensor(right))
