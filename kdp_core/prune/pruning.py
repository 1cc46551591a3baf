"""A whole pruning in one call: from a loaded model and a list of documents to the pruned model.

The call runs the stages of the workflow one after the other on a folder of its own: calibration tokens, hidden states,
similarity, the method, and `fold`. With the same model, documents, options and seed the call gives the same bits as the
workflow. `prune_model` keeps nothing between two calls. `stages` can keep every record; the command line uses it in
this way. A grid of many points is the workflow's task.
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
"""The method of a call that names none."""


def prune_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: list[str], *,
                method: str = METHOD, ratio: float = 0.25, k_max: int = 3, sequences: int = 128,
                length: int = 128, seed: int = 0, options: dict[str, dict[str, Any]] | None = None,
                out: str | Path | None = None) -> "PreTrainedModel":
    """Remove the share `ratio` of all parameters of a causal language model by one method; return the pruned model.

    The given model does not change. The pruned model is in float32, on the CPU and in eval mode. `save_pretrained`
    writes the pruned model to disk.

    documents: texts for the calibration; they must give `sequences` sequences of `length` tokens.
    method: a name of `METHODS`.
    ratio: share of all parameters to remove, between 0 and 1.
    k_max: layers of a block's context, for the methods that select blocks.
    seed: seed for the choice of the calibration sequences.
    options: options of the method, by step, as in the configuration: `{"compose": {"epochs": 2}}`. With the default
        options a pruning may take an hour on a small model. `kdp_core.methods.method_of(method).quick` holds options
        with which it takes minutes.
    out: folder that receives the pruned checkpoint; without it no file is kept.
    Raises OptionError for an unknown method or option, TextError for too few documents, and the error of the method,
    a ValueError, for a ratio that cannot be reached or a family that the method cannot prune.

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

    The states stay in `folder`; states that are already in it are read and not computed again. `methods.run` describes
    `keep` and `filled`; here `keep` also gets the records `similarity` and `pruned`.
    """
    dense, states = folder / "dense", folder / "hidden.zarr"
    if not states.exists():
        where = {name: filled[name] for name in ("device", "dtype") if name in filled}
        hidden.extract(checkpoints.load_model(dense, **where), tokens, states)
    read = hidden.read(states)
    searches = methods.method_of(method).search is not None
    basis = None if searches else keep("similarity", lambda: similarity.similarity(read))
    plan = methods.run(method, dense, read, tokens, basis, facts, ratio=ratio, k_max=k_max, options=options, keep=keep,
                       **filled)
    return keep("pruned", lambda: fold.fold(plan, dense, out))
