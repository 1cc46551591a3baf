"""A whole pruning in one call, from a loaded model and a list of documents to the pruned model.

The call runs the stages of the workflow one after the other in a temporary folder: calibration tokens, hidden states,
similarity, the method, and `fold`. With the same model, documents, options and seed, the result is equal to the
workflow's result to the bit. `prune_model` stores nothing between two calls. `stages` can store every record; the
command line uses `stages` for this reason. For a grid of many points, use the workflow.
"""
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdp_core import methods
from kdp_core.base import texts
from kdp_core.base.records import ModelFacts, PrunedFacts, Tokens
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.prune import fold
from kdp_core.states import hidden, similarity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "kdp_residual"
"""The method that is used if a call names no method."""


def prune_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: list[str], *,
                method: str = METHOD, ratio: float = 0.25, k_max: int = 3, sequences: int = 128,
                length: int = 128, seed: int = 0, options: dict[str, dict[str, Any]] | None = None,
                out: str | Path | None = None) -> "PreTrainedModel":
    """Remove the share `ratio` of all parameters from a causal language model by one method, and return the pruned
    model.

    The given model does not change. The pruned model is in float32, on the CPU and in eval mode. `save_pretrained`
    writes the pruned model to disk.

    documents: texts for the calibration. The texts must be long enough for `sequences` sequences of `length` tokens.
    method: the name of a method in `METHODS`.
    ratio: share of all parameters to remove, between 0 and 1.
    k_max: number of layers in the context of a block, for the methods that select blocks.
    seed: seed for the choice of the calibration sequences.
    options: options of the method, by step, as in the configuration: `{"compose": {"epochs": 2}}`. With the default
        options, pruning a small model may take an hour. With the options in `kdp_core.methods.method_of(method).quick`
        it takes minutes.
    out: folder to which the pruned checkpoint is written. If `out` is not given, no file remains after the call.
    Raises OptionError for an unknown method or option, and TextError for too few documents. Raises the error of the
    method, a ValueError, for a ratio that cannot be reached or a family that the method cannot prune.

    The example prunes a checkpoint in `folder` with the texts `documents`:

    >>> import kdp_core
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    >>> pruned = kdp_core.prune_model(model, tokenizer, documents, method="linear_prefix", ratio=0.2, sequences=40)
    >>> pruned.num_parameters() < 0.9 * model.num_parameters()
    True
    """
    methods.check_options(method, options or {})
    # too few documents are refused before the model is written
    tokens = texts.pack(tokenizer, [texts.Part("documents", documents, sequences)], length=length, seed=seed,
                        vocabulary=model.get_input_embeddings().weight.shape[0], start=first_token(model))
    with tempfile.TemporaryDirectory(prefix="kdp-") as kept:
        folder = Path(kept)
        model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        place = Path(out) if out else folder / "pruned"
        stages(folder, tokens, checkpoints.facts(model, source="", sha256=""), place, method=method, ratio=ratio,
               k_max=k_max, options=options or {})
        return checkpoints.load_model(place)


def stages(folder: Path, tokens: Tokens, facts: ModelFacts, out: Path, *, method: str, ratio: float, k_max: int,
           options: dict[str, dict[str, Any]], keep: methods.Keep = methods.made, **filled: Any) -> PrunedFacts:
    """Prune the dense checkpoint in `folder`/dense and write the result to `out`: states, similarity, method, fold.

    The states stay in `folder`. If the folder already contains states, these states are read and not computed again.
    The docstring of `methods.run` explains `keep` and `filled`. This function calls `keep` for two more records,
    `similarity` and `pruned`.
    """
    dense, states = folder / "dense", folder / "hidden.zarr"
    if not states.exists():
        where = {name: filled[name] for name in ("device", "dtype") if name in filled}
        hidden.extract(checkpoints.load_model(dense, **where), tokens, states)
    read, place = hidden.read(states), str(checkpoints.resolve_device(filled.get("device", "cpu")))
    searches = methods.method_of(method).search is not None
    basis = None if searches else keep("similarity", lambda: similarity.similarity(read, device=place))
    plan = methods.run(method, dense, read, tokens, basis, facts, ratio=ratio, k_max=k_max, options=options, keep=keep,
                       **filled)
    return keep("pruned", lambda: fold.fold(plan, dense, out))
