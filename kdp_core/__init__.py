"""kdp: Kernelized Dynamics Pruning and its neighbours, as a pure PyTorch library.

The folders are listed in the order in which the pipeline uses them. A folder imports only from itself and from folders
above it.
    base     records that pass between stages, their storage, options, resuming, texts
    model    model families, checkpoints, passes through single layers, distillation losses
    states   hidden states, the states of one block, similarity of layers
    methods  every pruning method, a file each with its record of the table METHODS
    prune    a plan to a pruned checkpoint, fine-tuning, and a whole pruning in one call
    score    tasks, benchmarks, scores, costs, diagnosis
    study    theory, kernel-space views, three spaces, published oracles, planner
    results  tables, comparisons, ablations, the paper's tables, the report
    figures  every figure, in one style

kdp_core exports the few names that a notebook needs: `prune_model`, `fold`, `load_model`, `load_tokenizer`, `evaluate`,
`METHODS`. Each name is imported only when it is first used, so `import kdp_core` is fast.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdp_core.methods import METHODS
    from kdp_core.model.checkpoints import load_model, load_tokenizer
    from kdp_core.prune.fold import fold
    from kdp_core.prune.pruning import prune_model
    from kdp_core.score.evaluate import evaluate

PUBLIC = {"METHODS": "kdp_core.methods", "evaluate": "kdp_core.score.evaluate", "fold": "kdp_core.prune.fold",
          "load_model": "kdp_core.model.checkpoints", "load_tokenizer": "kdp_core.model.checkpoints",
          "prune_model": "kdp_core.prune.pruning"}
"""For each public name, the module that defines it."""
__all__ = ["METHODS", "evaluate", "fold", "load_model", "load_tokenizer", "prune_model"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in PUBLIC:
        raise AttributeError(f"kdp_core has no {name!r}; its public names are {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
