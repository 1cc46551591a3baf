"""The table METHODS: every pruning method as a row of plain functions.

A row names the paper, how blocks are selected, the steps that fit a stand-in for one block, and how their records
become that stand-in. Positional arguments of these functions are records (hence the inputs of workflow rules);
keyword-only arguments are what the config may set, and the config's schema is made from their signatures. Adding a
method is one file, one row here, one block in the config. Methods neither evaluate nor save nor print.
"""
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kdp_core.base import options
from kdp_core.base.records import Block, Composed, ModelFacts, Module, Plan, Selection, Similarity, Tokens
from kdp_core.methods import _runs as runs
from kdp_core.methods import _select as blocks
from kdp_core.methods import linear, lorp
from kdp_core.methods.kdp import inverse, kernel
from kdp_core.states.hidden import HiddenStates

GRID_ARGUMENTS = ("ratio", "k_max", "module_params", "model_layers", "device", "dtype", "resume")
"""Keyword-only arguments that the grid or the workflow fills in, not a method's block of the config."""


MethodError = options.OptionError
"""An unknown method, step or option."""


class Lazy:
    """A function by name, imported when it is called: the models of transformers cost seconds, most steps need none."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        return getattr(importlib.import_module(self.module), self.name)

    def __call__(self, *args: Any, **own: Any) -> Any:
        """As the function."""
        return self.function(*args, **own)


class Method(NamedTuple):
    """One row; the key in METHODS is the key in the config and the {method} of result paths."""
    paper: str
    """Reference, with equation or table numbers."""
    select: Callable[..., Selection]
    """(similarity or search, facts, *, ratio, k_max, module_params, ...) -> Selection."""
    steps: dict[str, Callable[..., Any]]
    """In order; the first takes (hidden, block), a later one (hidden, record of the step before)."""
    module: Callable[..., Module] | None
    """Records of all steps -> stand-in; None: nothing takes the block's place."""
    module_params: Callable[..., int]
    """(facts, options by step) -> parameters of one stand-in, known before any fit."""
    size_options: tuple[str, ...] = ()
    """The options that module_params reads, as step.option: only they can change which blocks are selected."""
    search: Lazy | None = None
    """(dense folder, hidden, tokens, facts, *, k_max, ...) -> Search, what `select` reads instead of the similarity."""
    compose: Lazy | None = None
    """(dense folder, hidden, tokens, selection, *, ...) -> Composed: a whole grid point fitted at once, for rows whose
    blocks cannot be fitted one by one; such a row has no steps and no `module`."""


def _no_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    return 0


METHODS: dict[str, Method] = {
    "remove": Method(
        "KDP (ICLR 2026), `w/o kernel` of Table 1: the blocks dropped, nothing in their place",
        blocks.most_similar, {}, None, _no_params),
    "linear": Method(
        "KDP (ICLR 2026), `Direct OLS` of Table 3",
        blocks.most_similar, {"fit": linear.direct}, linear.to_module, linear.module_params),
    "linear_sequential": Method(
        "KDP (ICLR 2026), `Sequential OLS` of Table 3",
        blocks.most_similar, {"fit": linear.sequential}, linear.to_module, linear.module_params),
    "kdp": Method(
        "KDP (ICLR 2026), Algorithm 1, equations 2, 5, 6",
        blocks.most_similar, {"kernel": kernel.fit, "inverse": inverse.fit}, inverse.to_module, inverse.module_params,
        ("kernel.features", "inverse.width")),
    "linear_prefix": Method(
        "this project: `Direct OLS`, each block fitted on what the pruned model before it feeds it",
        blocks.most_similar, {}, None, Lazy("kdp_core.methods.kdp_residual.fit", "linear_params"),
        compose=Lazy("kdp_core.methods.kdp_residual.fit", "compose_linear")),
    "replaceme_lstsq": Method(
        "Shopkhoev et al. 2025, ReplaceMe, least squares: a run of layers absorbed into the MLP before it",
        runs.one_run, {}, None, _no_params, compose=Lazy("kdp_core.methods.replaceme", "compose")),
    "replaceme_cosine": Method(
        "Shopkhoev et al. 2025, ReplaceMe, cosine: the same matrix trained on the angle of the states",
        runs.one_run, {}, None, _no_params, compose=Lazy("kdp_core.methods.replaceme", "compose_cosine")),
    "streamline": Method(
        "Chen et al. 2025, LLM-Streamline: a run of layers replaced by one trained layer",
        runs.most_alike, {}, None, Lazy("kdp_core.methods.streamline", "module_params"),
        compose=Lazy("kdp_core.methods.streamline", "compose")),
    "laco": Method(
        "Yang et al. 2024, LaCo: layers merged into the one before them while the last state keeps its direction",
        runs.as_many, {}, None, _no_params, compose=Lazy("kdp_core.methods.laco", "laco")),
    "sliding_merge": Method(
        "Sliding Layer Merging 2025: windows of layers merged, as wide as the last state keeps its direction",
        runs.as_many, {}, None, _no_params, compose=Lazy("kdp_core.methods.laco", "sliding")),
    "shortgpt": Method(
        "Men et al. 2024, ShortGPT: the layers of least block influence",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.shortgpt", "block_influence")),
    "block_drop": Method(
        "He et al. 2024, LLM-Drop: whole layers by the cosine around them, which is block influence",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.shortgpt", "block_influence")),
    "sleb": Method(
        "Song et al. 2024, SLEB: greedily the layer whose loss is least, scored again after each",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.sleb", "greedy")),
    "shortened_ppl": Method(
        "Kim et al. 2024, Shortened LLaMA: layers by the perplexity without each",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.shortened", "perplexity")),
    "shortened_taylor": Method(
        "Kim et al. 2024, Shortened LLaMA: layers by sum |W g|",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.shortened", "taylor")),
    "shortened_magnitude": Method(
        "Kim et al. 2024, Shortened LLaMA: layers by sum |W|",
        blocks.in_order, {}, None, _no_params, search=Lazy("kdp_core.methods.shortened", "magnitude")),
    "angular": Method(
        "Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers: angular distance of last tokens",
        runs.angular, {}, None, _no_params),
    "deepest": Method(
        "Gromov et al. 2024: the deepest layers but the last",
        runs.deepest, {}, None, _no_params),
    "cosine_run": Method(
        "Chen et al. 2025, LLM-Streamline's selection alone, as LoRP compares with it",
        runs.most_alike, {}, None, _no_params),
    "lorp": Method(
        "LoRP 2026, locality-aware redundancy pruning: clusters of layers give up one each",
        lorp.spread, {}, None, _no_params),
    "attn_drop": Method(
        "He et al. 2024, LLM-Drop: attentions left out by the cosine around them",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.llm_drop", "attention")),
    "mlp_drop": Method(
        "He et al. 2024, LLM-Drop: MLPs left out by the cosine around them",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.llm_drop", "mlp")),
    "joint_drop": Method(
        "He et al. 2024, LLM-Drop: attentions and MLPs from one list",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.llm_drop", "joint")),
    "llm_pruner": Method(
        "Ma et al. 2023, LLM-Pruner: heads and MLP channels cut out by what they are worth to the loss",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.llm_pruner", "compose")),
    "slicegpt": Method(
        "Ashkboos et al. 2024, SliceGPT: the width of the states cut to their principal components",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.slicegpt", "compose")),
    "magnitude": Method(
        "weights of least magnitude set to zero, the baseline of Wanda and SparseGPT",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.sparse", "magnitude")),
    "wanda": Method(
        "Sun et al. 2024, Wanda: weights set to zero by magnitude times the norm of what they read",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.sparse", "wanda")),
    "sparsegpt": Method(
        "Frantar and Alistarh 2023, SparseGPT: weights set to zero, the others moved to make up for it",
        runs.no_layer, {}, None, _no_params, compose=Lazy("kdp_core.methods.sparse", "sparsegpt")),
    "kdp_residual": Method(
        "this project: skip path, linear part and a dictionary of the model's own neurons; docs/kdp.md",
        blocks.in_order, {}, None, Lazy("kdp_core.methods.kdp_residual.fit", "module_params"),
        ("compose.dictionary", "compose.entries"), search=Lazy("kdp_core.methods.kdp_residual.search", "by_divergence"),
        compose=Lazy("kdp_core.methods.kdp_residual.fit", "compose")),
}


def method_of(name: str) -> Method:
    """The row of a method; MethodError lists the known ones."""
    if name not in METHODS:
        raise MethodError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]




def arguments(function: Callable[..., Any], filled: tuple[str, ...] = GRID_ARGUMENTS) -> dict[str, inspect.Parameter]:
    """The options of a function that a config may set."""
    return options.arguments(_resolved(function), filled)


def settings(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """All options of a function: its defaults, overridden by `given`."""
    return options.settings(_resolved(function), given, GRID_ARGUMENTS)


def option_schema(function: Callable[..., Any], filled: tuple[str, ...] = GRID_ARGUMENTS) -> dict[str, Any]:
    """JSON schema of a function's options."""
    return options.schema(_resolved(function), filled)


def _resolved(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.function if isinstance(function, Lazy) else function


def parts(row: Method) -> dict[str, Callable[..., Any]]:
    """What a row's block of the config may set options of, by key."""
    whole = {"search": row.search, "compose": row.compose}
    return {"block": row.select, **row.steps, **{key: part for key, part in whole.items() if part is not None}}




def check_options(name: str, given: dict[str, dict[str, Any]]) -> None:
    """MethodError for a step or an option that the method does not have."""
    row = method_of(name)
    known = parts(row)
    if unknown := sorted(set(given) - set(known)):
        raise MethodError(f"method {name} has no step {unknown[0]!r}; it has {', '.join(known)}")
    for step, own in given.items():
        settings(known[step], own)








def method_schema(name: str) -> dict[str, Any]:
    """JSON schema of a method's block in the config: `block` and one key a step."""
    row = method_of(name)
    made = {key: option_schema(part) for key, part in parts(row).items()}
    made["block"]["properties"]["sized_as"] = {
        "type": "string", "description": "Count the stand-ins of this row when choosing how many blocks go, so that "
                                         "both rows replace the same blocks."}
    return {"type": "object", "additionalProperties": False, "x-size": list(row.size_options),
            "x-steps": list(row.steps), "properties": made}


def fit_step(name: str, step: str, hidden: HiddenStates, block: Block, before: list[Any], **own: Any) -> Any:
    """Run one step of a method on one block; `before` holds the records of its earlier steps."""
    fit = method_of(name).steps[step]
    return fit(hidden, before[-1] if before else block, **own)


def plan(name: str, selection: Selection, fitted: dict[Block, list[Any]]) -> Plan:
    """The plan of a method from its selected blocks and, for each, the records of its steps."""
    row = method_of(name)
    drop = [(layer, "whole") for start, stop in selection.blocks for layer in range(start, stop)]
    modules = [row.module(*fitted[block]) for block in selection.blocks] if row.module else []
    return Plan(name, drop, modules, {})


def whole(name: str, selection: Selection, composed: Composed) -> Plan:
    """The plan of a method that fits a grid point at once."""
    blocks = [(layer, "whole") for start, stop in selection.blocks for layer in range(start, stop)]
    # a fit that chooses its layers itself, or keeps some of a block's, says so in its plan
    return composed.plan._replace(method=name, drop=composed.plan.drop or blocks)


def run(name: str, dense: Path, hidden: HiddenStates, tokens: Tokens, similarity: Similarity, facts: ModelFacts, *,
        ratio: float, k_max: int, options: dict[str, dict[str, Any]]) -> Plan:
    """A whole method in memory: search, select, fit every block, plan."""
    row = method_of(name)
    check_options(name, options)
    base = row.search(dense, hidden, tokens, facts, k_max=k_max,
                      **options.get("search", {})) if row.search else similarity
    selection = row.select(base, facts, ratio=ratio, k_max=k_max,
                           module_params=row.module_params(facts, options), **options.get("block", {}))
    if row.compose:
        return whole(name, selection, row.compose(dense, hidden, tokens, selection, **options.get("compose", {})))
    fitted: dict[Block, list[Any]] = {}
    for block in selection.blocks:
        fitted[block] = []
        for step in row.steps:
            fitted[block].append(fit_step(name, step, hidden, block, fitted[block], **options.get(step, {})))
    return plan(name, selection, fitted)
