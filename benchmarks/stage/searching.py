"""Measures the search of kdp_residual as a share of the time of search plus fit, for each value of its option `order`.

The search stops when it has ordered a fifth of the layers. The fit replaces three blocks of one layer each, and trains
the three stand-ins together for one epoch.
"""
from kdp_core.base.records import Block, Selection
from kdp_core.methods.kdp_residual import search
from kdp_core.methods.kdp_residual.compose import compose
from stage.setup import Setup
from stage.timing import Row, figure, kept


def measure(setup: Setup) -> list[Row]:
    """Measure the search's share of the time of search plus fit, for both values of `order`."""
    entries, judged = setup.size(96, 4), setup.size(16, 4)
    rows = []
    for order in ("cka", "divergence"):
        found, searched = kept(lambda order=order: search.by_divergence(
            setup.dense, setup.hidden, setup.tokens, setup.facts, k_max=3, order=order, largest=0.2, entries=entries,
            judge_sequences=judged))
        selection = chosen([(layer, layer + 1) for layer in sorted(found.order[:3])])
        _, fitted = kept(lambda selection=selection: compose(
            setup.dense, setup.hidden, setup.tokens, selection, entries=entries))
        rows.append(figure(f"order {order}: share of the search in search and fit",
                           searched.wall / (searched.wall + fitted.wall), "", "limit", 0.25, target=1.0, at_most=True,
                           cpu=searched.cpu / (searched.cpu + fitted.cpu)))
    return rows


def chosen(blocks: list[Block]) -> Selection:
    """A selection with these blocks.

    The other fields of the selection are only placeholders, because `compose` uses only the blocks.
    """
    return Selection(blocks, [0.0] * len(blocks), "search", 0.0, 0.0, 0.0, 3, [], len(blocks))
