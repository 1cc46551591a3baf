"""Many token sequences packed into few rows of tokens. A beginning that several sequences share is computed once.

A row is a forest of token sequences. Each token is a node, and the tokens of a sequence are a path from a root.
Sequences that begin with the same tokens share the first nodes of their paths. A token attends only to the tokens of
its own path (`visible`), and its position is counted along this path. The states of a sequence are the same as if the
sequence were alone in a row, and no padding is needed. A long beginning that several rows share is a prefix (`Group`).
The prefix is computed once, and the rows of the group attend to the prefix through the KV cache.
Axes: N tokens of a row, P tokens of a prefix.
"""
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WHOLE = 2
"""A group of sequences gets a prefix only if it has more than this many times the tokens of a row. The sequences of one
context are split into units of at most this size."""
PREFIX = 64
"""Smallest number of tokens of a prefix; a shorter prefix is not worth a forward pass of its own."""


class Scored(NamedTuple):
    """A sequence that the model reads, and the tokens that are scored."""
    ids: tuple[int, ...]
    """What the model reads."""
    targets: tuple[int, ...]
    """The correct next tokens at the last len(targets) positions of `ids`."""

    @property
    def free(self) -> int:
        """Number of tokens at the beginning of `ids` at which no target is scored."""
        return len(self.ids) - len(self.targets)


class Row(NamedTuple):
    """Several sequences as a forest. A parent comes before its children."""
    ids_N: list[int]
    parents_N: list[int]
    """Index of each node's parent. The index is -1 for a root, which follows the prefix."""
    positions_N: list[int]
    ends: list[tuple[int, int]]
    """For each sequence, (number of the sequence, index of its last node)."""

    def path(self, end: int, tokens: int) -> list[int]:
        """The last `tokens` nodes on the path that ends at `end`, in the order of the path."""
        nodes = []
        for _ in range(tokens):
            nodes.append(end)
            end = self.parents_N[end]
        return nodes[::-1]

    @property
    def chain(self) -> bool:
        """Whether the row is a single path. For a row that is a single path, the usual causal mask is correct."""
        return self.parents_N == list(range(-1, len(self.parents_N) - 1))


class Group(NamedTuple):
    """Rows that share one prefix. The prefix of most groups is empty."""
    prefix: tuple[int, ...]
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads for the group."""
        return len(self.prefix) + sum(len(row.ids_N) for row in self.rows)


def pack(sequences: list[Scored], limit: int) -> list[Group]:
    """All sequences, packed in rows of about `limit` tokens. The largest groups come first."""
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].ids)
    groups, small = [], []
    for shared, numbers in _runs(sequences, order):
        size = _size(sequences, numbers, 0)
        if shared >= PREFIX and size > WHOLE * limit and len(numbers) > 1:
            groups.append(group(sequences, numbers, shared, limit))
        else:
            small += numbers
    groups += [Group((), [row]) for row in _rows(sequences, _units(sequences, small, 0, limit), 0, limit)]
    return sorted(groups, key=lambda group: -group.tokens)


def group(sequences: list[Scored], numbers: list[int], shared: int, limit: int) -> Group:
    """A group of sorted sequences that share their first `shared` tokens. These tokens become the prefix."""
    return Group(sequences[numbers[0]].ids[:shared],
                 _rows(sequences, _units(sequences, numbers, shared, limit), shared, limit))


def visible(row: Row, prefix: int, window: int | None = None) -> Tensor:
    """Whether each token of a row sees each token of the prefix and of the row, (N, P + N).

    window: number of positions that a token sees, up to its own position; None means all positions.
    """
    count = len(row.ids_N)
    seen_NN = torch.zeros(count, count, dtype=torch.bool)
    for node, parent in enumerate(row.parents_N):
        if parent >= 0:
            seen_NN[node] = seen_NN[parent]
        seen_NN[node, node] = True
    seen = torch.cat([torch.ones(count, prefix, dtype=torch.bool), seen_NN], dim=1)
    if window is not None:
        positions_N = torch.tensor(row.positions_N)
        keys = torch.cat([torch.arange(prefix), positions_N])
        seen &= positions_N[:, None] - keys < window
    return seen


def _common(first: Scored, second: Scored) -> int:
    """Number of equal leading tokens of two sequences, up to the first position at which one of them is scored."""
    most = min(first.free, second.free)
    if first.ids[:most] == second.ids[:most]:
        return most
    return next(place for place in range(most) if first.ids[place] != second.ids[place])


def _runs(sequences: list[Scored], order: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Groups of neighbours in the sorted order, each as (number of shared leading tokens, numbers of the sequences).

    A new group begins if the next sequence would shorten the shared beginning of the group to fewer than PREFIX tokens,
    or to less than half.
    """
    numbers: list[int] = []
    shared = 0
    for number in order:
        common = _common(sequences[numbers[-1]], sequences[number]) if numbers else 0
        joined = min(shared, common) if len(numbers) > 1 else common
        if numbers and joined >= max(PREFIX, shared / 2 if len(numbers) > 1 else 0):
            numbers.append(number)
            shared = joined
            continue
        if numbers:
            yield shared if len(numbers) > 1 else 0, numbers
        numbers, shared = [number], 0
    if numbers:
        yield shared if len(numbers) > 1 else 0, numbers


def _size(sequences: list[Scored], numbers: list[int], skip: int) -> int:
    """Number of nodes of the forest that the sorted sequences form, without the first `skip` tokens of each
    sequence."""
    size, before = 0, ()
    for number in numbers:
        ids = sequences[number].ids
        size += len(ids) - max(skip, _alike(before, ids))
        before = ids
    return size


def _alike(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Number of equal leading tokens of two sequences."""
    return next((place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
                min(len(first), len(second)))


def _units(sequences: list[Scored], numbers: list[int], skip: int, limit: int) -> list[tuple[int, list[int]]]:
    """(number of nodes, numbers of the sequences) of each unit. All sequences of a unit are in one row. A unit has the
    sequences of one context, or a part of them if they are too many for a row."""
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in numbers:
        by_context[sequences[number].ids[:sequences[number].free]].append(number)
    units = []
    for group in by_context.values():
        part: list[int] = []
        for number in group:
            if part and _size(sequences, [*part, number], skip) > WHOLE * limit:
                units.append((_size(sequences, part, skip), part))
                part = []
            part.append(number)
        units.append((_size(sequences, part, skip), part))
    return units


def _rows(sequences: list[Scored], units: list[tuple[int, list[int]]], skip: int, limit: int) -> list[Row]:
    """Rows of at most `limit` tokens. Rows are filled with units in the given order.

    A unit with more than `limit` tokens becomes a row by itself.
    """
    rows, numbers, size = [], [], 0
    for more, group in units:
        if numbers and size + more > limit:
            rows.append(_forest(sequences, numbers, skip))
            numbers, size = [], 0
        numbers += group
        size += more
    return [*rows, _forest(sequences, numbers, skip)] if numbers else rows


def _forest(sequences: list[Scored], numbers: list[int], skip: int) -> Row:
    """One row of the given sequences without their first `skip` tokens."""
    row = Row([], [], [], [])
    children: dict[tuple[int, int], int] = {}
    for number in numbers:
        node = -1
        for position, token in enumerate(sequences[number].ids[skip:], start=skip):
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(row.ids_N)
                row.ids_N.append(token)
                row.parents_N.append(node)
                row.positions_N.append(position)
            node = child
        row.ends.append((number, node))
    return row
