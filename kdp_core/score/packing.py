"""Many token sequences packed into few rows of tokens; a beginning that several sequences share is computed once.

A row is a forest: each token is a node, the nodes of a sequence are a path from a root, and sequences that begin alike
share the beginning of their path. A token attends only to the tokens of its own path (`visible`), with the positions of
that path. So each sequence of a row has the states that it would have in a row of its own, and nothing is padded. A
long beginning that several rows share is a prefix (`Group`): the prefix is computed once, and the rows of the group
attend to the prefix through the KV cache.
Axes: N tokens of a row, P tokens of a prefix.
"""
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WHOLE = 2
"""A group of sequences is one row, without a prefix, up to this many times the tokens of a row."""
PREFIX = 64
"""Fewest tokens of a prefix that is worth a pass of its own."""


class Scored(NamedTuple):
    """A sequence that a model reads, and the tokens that it should predict."""
    ids: tuple[int, ...]
    """What the model reads."""
    targets: tuple[int, ...]
    """The tokens that follow the last len(targets) tokens of `ids`."""

    @property
    def free(self) -> int:
        """Number of leading tokens at which nothing is scored."""
        return len(self.ids) - len(self.targets)


class Row(NamedTuple):
    """A forest of sequences; a parent comes before its children."""
    ids_N: list[int]
    parents_N: list[int]
    """-1 for a root, which follows the prefix."""
    positions_N: list[int]
    ends: list[tuple[int, int]]
    """(number of a sequence, its last node)."""

    def path(self, end: int, tokens: int) -> list[int]:
        """The last `tokens` nodes of the path to `end`, in order."""
        nodes = []
        for _ in range(tokens):
            nodes.append(end)
            end = self.parents_N[end]
        return nodes[::-1]

    @property
    def chain(self) -> bool:
        """Whether the row is a single path, so that the plain causal mask is right."""
        return self.parents_N == list(range(-1, len(self.parents_N) - 1))


class Group(NamedTuple):
    """Rows that follow one prefix; most groups have an empty prefix."""
    prefix: tuple[int, ...]
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Number of tokens that a model reads for the group."""
        return len(self.prefix) + sum(len(row.ids_N) for row in self.rows)


def pack(sequences: list[Scored], limit: int) -> list[Group]:
    """All sequences in rows of about `limit` tokens, the largest groups first."""
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].ids)
    groups, small = [], []
    for shared, numbers in _runs(sequences, order):
        size = _size(sequences, numbers, 0)
        if shared >= PREFIX and size > WHOLE * limit and len(numbers) > 1:
            groups.append(group(sequences, numbers, shared, limit))
        else:
            small += _units(sequences, numbers, 0, limit)
    groups += [Group((), [row]) for row in _rows(sequences, small, 0, limit)]
    return sorted(groups, key=lambda group: -group.tokens)


def group(sequences: list[Scored], numbers: list[int], shared: int, limit: int) -> Group:
    """The group of sorted sequences whose first `shared` tokens are the same; these tokens are its prefix."""
    return Group(sequences[numbers[0]].ids[:shared],
                 _rows(sequences, _units(sequences, numbers, shared, limit), shared, limit))


def visible(row: Row, prefix: int, window: int | None = None) -> Tensor:
    """Whether each token of a row sees each token of the prefix and of the row, (N, P + N).

    window: number of last positions that a token sees, its own position included; None for all.
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
    """Number of leading tokens that two sequences share and at which neither is scored."""
    most = min(first.free, second.free)
    if first.ids[:most] == second.ids[:most]:
        return most
    return next(place for place in range(most) if first.ids[place] != second.ids[place])


def _runs(sequences: list[Scored], order: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Groups of neighbours in the sorted order: (number of shared leading tokens, numbers of the sequences).

    If a further sequence would make the common beginning less than half as long, a new group begins with that sequence.
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
    """Number of nodes of the forest of sorted sequences without their first `skip` tokens."""
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
    """(nodes, sequences) of each unit that is kept in one row.

    A unit holds the sequences of one context, unless they are too many.
    """
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
    """Rows of at most `limit` tokens, filled with units in the order of their first tokens.

    A larger unit is a row itself.
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
    """The row of some sequences without their first `skip` tokens."""
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
