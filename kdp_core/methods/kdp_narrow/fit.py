"""The closed-form half of kdp_narrow: parts are narrowed in the order of depth, and their writers are solved again.

Each writer is solved on its inputs in the already pruned model, with the dense model's state as the target. So the new
writer also corrects the errors of earlier parts.
Axes: as in `parts`.
"""
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.methods.heads_channels.units import PARTS, columns_of
from kdp_core.methods.kdp_narrow import parts
from kdp_core.methods.kdp_narrow.parts import Fed
from kdp_core.methods.kdp_narrow.surgeon import RIDGES, Products, kept_units, solved, solved_by
from kdp_core.model.families import matrix
from kdp_core.model.passes import Passes
from kdp_core.states.block import relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


class Closed(NamedTuple):
    """How writers are solved."""
    ridge: float | None
    """None: the one of RIDGES that is best on the held-out sequences."""
    solve: bool
    """Whether writers are solved again; otherwise kept weights stay as they are."""
    batch: int
    """Sequences of a forward pass."""


class Part(NamedTuple):
    """A part of a layer that may lose units."""
    layer: int
    name: str
    units: int
    unit_params: int


def in_order(passes: Passes, hidden: HiddenStates, sizes: list[tuple[Part, int]], fitted: Tensor, held: Tensor,
             how: Closed) -> list[tuple[Part, Tensor, float]]:
    """Narrow the parts, which are given in the order of depth: (part, kept units, held-out error of the state after).

    The writers of the model are changed in place; the columns of removed units become zero.
    """
    which, found, changed = torch.cat((fitted, held)), [], False
    h_STD = hidden.state(sizes[0][0].layer)[which]
    for part, count in sizes:
        given = parts.fed(passes, part.layer, part.name, h_STD, how.batch)
        y_STD = goal(passes, hidden, part, None, which, how)
        changed = changed or count < part.units
        units, ridge = torch.arange(part.units), 0.0
        if count < part.units or (changed and how.solve):
            # the products of the fitted and of the held-out sequences
            products, others = (products_of(passes, part, Fed(*(one[span] for one in given)), y_STD[span], how)
                                for span in (slice(len(fitted)), slice(len(fitted), None)))
            units = kept_units(products.equations(first_ridge(how)), part.units, [count],
                               parts.gain_after(passes, part.layer, part.name))[count]
            ridge = narrow(passes, part, units, products, how, others)
        after_STD = parts.after(passes, part.layer, part.name, given, how.batch)
        error = relative_error(after_STD[len(fitted):].flatten(0, 1), y_STD[len(fitted):].flatten(0, 1))
        found.append((part, units, error))
        logger.info("layer %d, %s: %d of %d units are kept, ridge %g, held-out error %.4f", part.layer, part.name,
                    count, part.units, ridge, error)
        h_STD = after_STD if part.name == PARTS[-1] else h_STD
    return found


def inputs(passes: Passes, part: Part) -> int:
    """Inputs of the writer that belong to one unit."""
    return matrix(parts.writer_of(passes, part.layer, part.name)).shape[1] // part.units


def goal(passes: Passes, hidden: HiddenStates, part: Part, given: Fed | None, which: Tensor, how: Closed) -> Tensor:
    """The state of the dense model after a part. The part still has its dense weights."""
    if part.name == PARTS[-1]:
        return hidden.state(part.layer + 1)[which]
    given = given or parts.fed(passes, part.layer, part.name, hidden.state(part.layer)[which], how.batch)
    return parts.after(passes, part.layer, part.name, given, how.batch)


def products_of(passes: Passes, part: Part, given: Fed, y_STD: Tensor, how: Closed) -> Products:
    """The products from which the normal equations of a part's writer are made."""
    gram_FF, cross_FD = parts.products(passes, part.layer, part.name, given, y_STD, how.batch)
    return Products(gram_FF, cross_FD, parts.weights_of(parts.writer_of(passes, part.layer, part.name)))


def first_ridge(how: Closed) -> float:
    """The ridge with which units are chosen."""
    return RIDGES[0] if how.ridge is None else how.ridge


@torch.no_grad()
def narrow(passes: Passes, part: Part, units: Tensor, products: Products, how: Closed,
           held: Products | None = None) -> float:
    """Set the writer of a part to zero for all other units, and to a new or the old matrix for the kept `units`.

    A part without units is removed together with its bias. Returns the ridge; if `how` names no ridge, it is chosen on
    `held`.
    """
    columns, writer = columns_of(units, inputs(passes, part)), parts.writer_of(passes, part.layer, part.name)
    w_FD, ridge = products.old_FD[columns], 0.0
    if how.solve and held is not None and how.ridge is None and len(units):
        w_FD, ridge = solved_by(held, products, columns)
    elif how.solve:
        ridge = first_ridge(how)
        w_FD = solved(products.equations(ridge).of(columns))
    parts.put(writer, w_FD, columns)
    if not len(units) and writer.bias is not None:
        writer.bias.zero_()
    return ridge
