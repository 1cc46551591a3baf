"""The closed-form fit of kdp_narrow: parts are narrowed from the first layer to the last, and their writers are solved
again.

Each writer is solved on its inputs in the already pruned model, with the dense model's state as the target. A new
writer therefore also corrects the errors of earlier parts.
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
    """None: each writer uses the ridge of RIDGES that is best on the held-out sequences."""
    solve: bool
    """Whether writers are solved again. If false, the kept weights of the writers are unchanged."""
    batch: int
    """Number of sequences in a forward pass."""


class Part(NamedTuple):
    """A part of a layer from which units may be removed."""
    layer: int
    name: str
    units: int
    unit_params: int


def in_order(passes: Passes, hidden: HiddenStates, sizes: list[tuple[Part, int]], fitted: Tensor, held: Tensor,
             how: Closed, start_STD: Tensor | None = None) -> list[tuple[Part, Tensor, float]]:
    """Narrow the parts in the order of `sizes`, from the first layer to the last. Returns (part, kept units, held-out
    error of the state after the part) for each part.

    The writers of the model are changed in place; the columns of removed units become zero.
    start_STD: states of the sequences of `fitted` and `held` before the first part; None if they are those of the dense
        model.
    """
    which, found, changed = torch.cat((fitted, held)), [], start_STD is not None
    h_STD = hidden.state(sizes[0][0].layer, which) if start_STD is None else start_STD
    del start_STD
    for part, count in sizes:
        given = parts.fed(passes, part.layer, part.name, h_STD, how.batch)
        if part.name == PARTS[-1]:
            # the input of the layer is not needed any more; it is freed before the target is read
            del h_STD
        y_STD = goal(passes, hidden, part, None, which, how)
        changed = changed or count < part.units
        units, ridge = torch.arange(part.units), 0.0
        if count < part.units or (changed and how.solve):
            first, rest = (slice(len(fitted)), slice(len(fitted), None))
            products = products_of(passes, part, Fed(*(one[first] for one in given)), y_STD[first], how)
            units = kept_units(products.equations(first_ridge(how)), part.units, [count],
                               parts.gain_after(passes, part.layer, part.name))[count]
            columns = columns_of(units, inputs(passes, part))
            if how.solve and how.ridge is None:
                others = products_of(passes, part, Fed(*(one[rest] for one in given)), y_STD[rest], how)
                w_FD, ridge = solved_by(others, products, columns)
            else:
                w_FD, ridge = matrix_of(products, columns, how), first_ridge(how)
            narrow(passes, part, units, w_FD)
        after_STD = parts.after(passes, part.layer, part.name, given, how.batch, in_place=True)
        error = relative_error(after_STD[len(fitted):].flatten(0, 1), y_STD[len(fitted):].flatten(0, 1))
        found.append((part, units, error))
        logger.info("layer %d, %s: %d of %d units are kept, ridge %g, held-out error %.4f", part.layer, part.name,
                    count, part.units, ridge, error)
        if part.name == PARTS[-1]:
            h_STD = after_STD
        del given, after_STD, y_STD
    return found


def inputs(passes: Passes, part: Part) -> int:
    """Number of inputs of the writer that belong to one unit."""
    return matrix(parts.writer_of(passes, part.layer, part.name)).shape[1] // part.units


def goal(passes: Passes, hidden: HiddenStates, part: Part, given: Fed | None, which: Tensor, how: Closed) -> Tensor:
    """The state of the dense model after a part. The model must still have the dense weights of this part."""
    if part.name == PARTS[-1]:
        return hidden.state(part.layer + 1, which)
    own = given or parts.fed(passes, part.layer, part.name, hidden.state(part.layer, which), how.batch)
    return parts.after(passes, part.layer, part.name, own, how.batch, in_place=given is None)


def products_of(passes: Passes, part: Part, given: Fed, y_STD: Tensor, how: Closed) -> Products:
    """The products of inputs and targets from which the normal equations of a part's writer are computed."""
    gram_FF, cross_FD = parts.products(passes, part.layer, part.name, given, y_STD, how.batch)
    return Products(gram_FF, cross_FD, parts.weights_of(parts.writer_of(passes, part.layer, part.name)))


def first_ridge(how: Closed) -> float:
    """The ridge with which units are chosen."""
    return RIDGES[0] if how.ridge is None else how.ridge


def matrix_of(products: Products, columns: Tensor, how: Closed) -> Tensor:
    """The matrix w_FD for the inputs `columns`. If writers are solved again, w_FD is the solution with the first ridge;
    otherwise w_FD is the old matrix."""
    return solved(products.equations(first_ridge(how)).of(columns)) if how.solve else products.old_FD[columns]


@torch.no_grad()
def narrow(passes: Passes, part: Part, units: Tensor, w_FD: Tensor) -> None:
    """Set the matrix of a part's writer. The inputs of the kept `units` get the weights w_FD, and all other inputs get
    zero.

    A part without units is removed together with its bias.
    """
    writer = parts.writer_of(passes, part.layer, part.name)
    parts.put(writer, w_FD, columns_of(units, inputs(passes, part)))
    if not len(units) and writer.bias is not None:
        writer.bias.zero_()
