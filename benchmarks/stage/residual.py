"""Compares the fit of kdp_residual with lower limits: its closed form with matrix products, its training with bare
passes. Its search is measured as a share of the time of search plus fit.

The closed form of one stand-in chooses 96 of all neurons of its block. Three matrix products of the fit run in float32:
they compute the features, the Gram matrix and the cross matrix. The limit is the time of products of square matrices
with the same number of operations. An update of joint training is compared with a bare forward and backward pass
through the same layers, stand-ins and output head. The bare pass runs no optimiser, computes no divergence and selects
no tokens at random. The losses at the outputs, from slices of the vocabulary, are compared with the same losses from
all logits of the tokens at once.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdp_core.base.records import Block, Selection
from kdp_core.methods import _outputs
from kdp_core.methods.kdp_residual import closed_form, dictionaries, search
from kdp_core.methods.kdp_residual.compose import compose
from kdp_core.model import distil
from kdp_core.model.distil import Head, head_of, to_head, token_losses
from kdp_core.model.passes import Passes, built, path_of
from kdp_core.model.stand_ins import RareEmbedding, RareHead
from stage import shared
from stage.setup import Setup
from stage.timing import Row, figure, in_turns, kept, products, turns_of_products


def measure(setup: Setup) -> list[Row]:
    """Measure the closed form, joint training, the losses at the outputs and the search."""
    return [*closed(setup), joint(setup), *outputs(setup), *search_share(setup)]


def closed(setup: Setup) -> list[Row]:
    """Compare the closed form of one stand-in with the limit of matrix products."""
    block, sequences = setup.block, setup.size(64, 12)
    h_STD, y_STD = (setup.hidden.state(k)[:sequences] for k in block)
    fit = dictionaries.closed_form_options(setup.model, setup.hidden, dictionary="neurons",
                                           entries=setup.size(96, 4), seed=0)
    entries = dictionaries.candidates(setup.model, block, h_STD, y_STD, fit)
    keep_ST, _ = dictionaries.counted(h_STD, y_STD, fit.massive_factor)
    flops = shared.operations(int(keep_ST.sum()), setup.facts.width, entries)
    times = in_turns({"limit": products(),
                      "products": lambda: closed_form._statistics(entries, h_STD, y_STD, keep_ST, fit),
                      "whole": lambda: closed_form.fit_stand_in(block, entries, h_STD, y_STD, fit)}, setup.repeats)
    scale = turns_of_products(flops)
    return [times.row(f"Gram products of {entries.entries} candidates, {int(keep_ST.sum())} tokens", "products",
                      "limit", target=0.6, scale=scale, against="limit of matrix products"),
            times.row("the whole closed form, with the choice of neurons in float64", "whole", "limit", scale=scale,
                      against="limit of the same products")]


def joint(setup: Setup) -> Row:
    """Compare one update of joint training with the bare forward and backward pass."""
    start = setup.block[0]
    modules = shared.linear_stand_ins(setup.facts.width, [setup.block])
    passes = Passes(setup.model, setup.tokens.ids_ST.shape[1])
    stand_ins = nn.ModuleList(built(module) for module in modules)
    path = path_of(modules, list(stand_ins), start, len(passes.layers))
    data = _outputs.data_of(setup.hidden, setup.tokens, start)
    adam, which = torch.optim.Adam(stand_ins.parameters(), lr=1e-6), torch.arange(shared.BATCH)
    generator = torch.Generator().manual_seed(0)
    setup.model.requires_grad_(False)

    def update() -> None:
        _outputs._update(passes, path, data, which, adam, shared.POSITIONS, 0.5, generator)

    bare = shared.bare(passes, path, data.start(which), data.final(which))
    times = in_turns({"update": update, "bare": bare}, setup.repeats)
    return times.row("an update of joint training", "update", "bare", target=0.85,
                     against="bare forward and backward pass")


def outputs(setup: Setup) -> list[Row]:
    """Compare losses from slices of the vocabulary with losses from all logits at once: with gradients, and without
    gradients as in a search. The pruned model has the dense model's head, or a head with rows of low rank."""
    dense = head_of(setup.model.requires_grad_(False))
    vocabulary, width = dense.linear.weight.shape
    rare = RareEmbedding(vocabulary, width, vocabulary // 2, width // 3).requires_grad_(False)
    rare.place.copy_(torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)))
    count = setup.size(192, 8)
    x_ND = to_head(setup.model, setup.hidden.state(setup.hidden.layers[-1])[:8]).flatten(0, 1)[:count]
    next_N, rows = torch.zeros(len(x_ND), dtype=torch.int64), []

    def loss(head: Head, student_ND: Tensor) -> Tensor:
        return token_losses(student_ND, x_ND, next_N, head, dense).loss

    def whole(head: Head, student_ND: Tensor) -> Tensor:
        return distil._chunk(student_ND, x_ND, next_N, head, dense, 1.0).mean()

    for name, head in (("", dense), (", head with rare rows", Head(RareHead(rare)))):
        def trained(by: Callable[[Head, Tensor], Tensor], head: Head = head) -> None:
            by(head, x_ND.clone().requires_grad_(True)).backward()

        judged = torch.no_grad()(lambda by, head=head: by(head, x_ND))
        for what, run in (("losses and gradients", trained), ("losses", judged)):
            times = in_turns({"sliced": lambda run=run: run(loss), "whole": lambda run=run: run(whole)}, setup.repeats)
            rows.append(times.row(f"{what} of {count} tokens at the outputs{name}", "sliced", "whole",
                                  against="all logits at once"))
    for tokens in (1, setup.size(128, 4)):
        heads = {"rare": RareHead(rare), "dense": dense.linear}
        times = in_turns({name: torch.no_grad()(lambda head=head, tokens=tokens: head(x_ND[:tokens]))
                          for name, head in heads.items()}, setup.repeats)
        rows.append(times.row(f"all logits of {tokens} token{'s' * (tokens > 1)}, head with rare rows", "rare", "dense",
                              against="the dense head"))
    return rows


def search_share(setup: Setup) -> list[Row]:
    """Measure the search's share of the time of search plus fit, for both values of `order`.

    The search stops when it has ordered a fifth of the layers. The fit replaces three blocks of one layer each, and
    trains the three stand-ins together for one epoch.
    """
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
