"""The record of a pruning method, and functions that read only this record.

A method is one file of this folder. The file contains plain functions and ends with `METHODS`, a tuple of records. The
positional arguments of a function are stored records, which the workflow rule of the function reads from its input
files. The keyword-only arguments of the functions are the options that the configuration may set. The schema of the
configuration is made from the signatures of the functions. A method does not evaluate, save or print.
"""
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from kdp_core.base import options
from kdp_core.base.records import Composed, ModelFacts, Module, Search, Selection
from kdp_core.model.families import Family

GRID_ARGUMENTS = ("ratio", "k_max", "module_params", "model_layers", "device", "dtype", "resume",
                  "similarity")
"""Keyword-only arguments that the grid or the workflow fills in; the configuration does not set them."""

GROUPS: dict[str, str] = {
    "layers removed": "layers removed",
    "layers merged": "layers replaced or merged",
    "layers replaced": "layers replaced or merged",
    "parts removed": "inside the layers",
    "heads and channels removed": "inside the layers",
    "states narrowed": "inside the layers",
    "weights set to zero": "inside the layers",
}
"""For each kind of change to the model: the group in which figures show the method. The list of methods follows the
order of the keys in this table."""

Given = Mapping[str, Mapping[str, Any]]
"""Options by part: `{"kernel": {"epochs": 2}}`."""

NOTHING: Mapping[str, Any] = {}

MethodError = options.OptionError
"""An unknown method, step or option."""


class Sizes(NamedTuple):
    """The sizes from which the number of floating-point operations of a part is computed."""
    sequences: int
    """Number of sequences in the calibration set."""
    length: int
    """Number of tokens in a sequence."""
    width: int
    """Width of the states."""
    layers: int
    """Number of layers of the dense model."""
    layer_macs: float
    """Multiply-adds of one layer for one token."""
    head_macs: int
    """Multiply-adds of the output head for one token."""
    block_layers: int = 0
    """Number of layers of the block that a step fits; 0 for `search` and `compose`, which do not fit a single block."""

    @property
    def tokens(self) -> int:
        """Number of tokens in the calibration set."""
        return self.sequences * self.length


Orders = Callable[[ModelFacts, int, Mapping[str, Any]], int]
"""(facts, k_max, options of the search) -> the most layers that the search can order."""

Flops = Callable[[Sizes, Mapping[str, Any]], float]
"""(sizes, options of the part and of the steps before it) -> floating-point operations."""


def no_params(facts: ModelFacts, options: Given) -> int:
    """Use this function as `module_params` of a method without stand-ins."""
    return 0


def no_family(family: Family) -> str:
    """Use this function as `refuses` of a method that prunes models of every family."""
    return ""


def no_state_between(family: Family) -> str:
    """Use this function as `refuses` of a method that needs a state between the attention and the MLP of a layer."""
    return "attention and MLP read the same state, so that no state lies between them" if family.parallel else ""


class Method(NamedTuple):
    """A pruning method. The files of this folder list their records in `METHODS`."""
    name: str
    """Key of the method in METHODS and in the configuration; in result paths it replaces {method}."""
    paper: str
    """Reference, with equation or table numbers."""
    group: str
    """A key of GROUPS."""
    select: Callable[..., Selection]
    """Called with (similarity or search, facts, *, ratio, k_max, module_params, ...), returns a record Selection."""
    steps: Mapping[str, Callable[..., Any]] = NOTHING
    """Steps in order. The first step is called with (hidden, block), and each later step with (hidden, record of the
    step before)."""
    module: Callable[..., Module] | None = None
    """A function that makes the stand-in of a block from the records of all steps. The field is None for a method
    without steps."""
    module_params: Callable[[ModelFacts, Given], int] = no_params
    """(facts, options by part) -> parameters of one stand-in, which are known before any fit."""
    size_options: tuple[str, ...] = ()
    """The options that `module_params` reads, as part.option. Only these options can change which blocks are
    selected."""
    search: Callable[..., Search] | None = None
    """Called with (dense folder, hidden, tokens, facts, *, k_max, ...), returns a record Search. If a method has a
    `search`, `select` reads the record Search instead of the similarity."""
    compose: Callable[..., Composed] | None = None
    """Called with (dense folder, hidden, tokens, selection, *, ...), returns a record Composed. One call of `compose`
    fits a whole grid point. A method with `compose` has no steps and no `module`."""
    flops: Mapping[str, Flops] = NOTHING
    """For each part: the number of its floating-point operations, for the planner. If a part has no formula, the
    planner reports that the formula is missing."""
    similar: Mapping[str, Any] = NOTHING
    """The options with which `search` reads the record of the similarity, through its argument `similarity`. An empty
    field means that `search` never reads the similarity."""
    orders: Orders | None = None
    """The largest number of layers that `search` can order, known before the search runs. None: all layers."""
    needs: Literal["model", "states"] = "model"
    """`model`: `search` runs the whole model on one device. `states`: `search` reads only stored states."""
    refuses: Callable[[Family], str] = no_family
    """(family) -> why the method cannot prune models of the family, as in "slicegpt refuses gemma2: ...". The function
    returns an empty text if the method can prune models of the family."""
    keeps: int = 0
    """Number of layers of each selected block that remain in the model; `compose` changes the weights of these
    layers."""
    example: Given = NOTHING
    """Options by part that make a fit small enough for a test."""
    quick: Given = NOTHING
    """Options by part that make a fit on a small model take minutes instead of an hour; empty if a fit with the default
    options is fast."""
    own: bool = False
    """Whether the method was developed in this project. Figures mark the methods of this project."""


def parts(method: Method) -> dict[str, Callable[..., Any]]:
    """The functions of a method whose options the configuration may set, by the name of the part."""
    whole = {"search": method.search, "compose": method.compose}
    return {"block": method.select, **method.steps, **{key: part for key, part in whole.items() if part is not None}}


def one_device(method: Method) -> str:
    """The name of the part that runs the whole model on one device: `compose` or `search`. Returns an empty text if no
    part runs the whole model."""
    if method.compose:
        return "compose"
    return "search" if method.search and method.needs == "model" else ""


def arguments(function: Callable[..., Any], filled: tuple[str, ...] = GRID_ARGUMENTS) -> dict[str, inspect.Parameter]:
    """The options of a function that the configuration may set."""
    return options.arguments(function, filled)


def settings(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a function: its defaults, overridden by `given`."""
    return options.settings(function, given, GRID_ARGUMENTS)


def option_schema(function: Callable[..., Any], filled: tuple[str, ...] = GRID_ARGUMENTS) -> dict[str, Any]:
    """JSON schema of a function's options."""
    return options.schema(function, filled)
