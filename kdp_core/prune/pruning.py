"""A whole pruning in one call: from a loaded model and a list of documents to the pruned model.

The call runs the stages of the workflow one after the other on a folder of its own: calibration tokens, hidden states,
similarity, the method, and `fold`. With the same model, documents, options and seed it gives the same bits as the
workflow. It keeps nothing between two calls; a grid of many points is the workflow's task.
"""
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdp_core import methods
from kdp_core.base import texts
from kdp_core.base.records import Tokens
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.prune import fold
from kdp_core.states import hidden, similarity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", documents: list[str], *,
                method: str = "kdp_residual", ratio: float = 0.25, k_max: int = 3, sequences: int = 128,
                length: int = 128, seed: int = 0, options: dict[str, dict[str, Any]] | None = None,
                out: str | Path | None = None) -> "PreTrainedModel":
    """Remove the share `ratio` of all parameters of a causal language model by one method; return the pruned model.

    The given model stays as it is. The pruned one is in float32 on the CPU, in eval mode; `save_pretrained` writes it.

    documents: texts for the calibration; they must give `sequences` sequences of `length` tokens.
    method: a name of `METHODS`.
    ratio: share of all parameters to remove, between 0 and 1.
    k_max: layers of a block's context, for the methods that select blocks.
    seed: of the choice of the calibration sequences.
    options: of the method, by step, as in the configuration: `{"compose": {"epochs": 2}}`.
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
        return _pruned(folder, tokens, method, ratio, k_max, options or {}, Path(out) if out else folder / "pruned")


def _pruned(folder: Path, tokens: Tokens, method: str, ratio: float, k_max: int, options: dict[str, dict[str, Any]],
            out: Path) -> "PreTrainedModel":
    """Run the stages on the dense checkpoint in `folder` and load the result."""
    dense = checkpoints.load_model(folder / "dense")
    facts = checkpoints.facts(dense, source="", sha256="")
    hidden.extract(dense, tokens, folder / "hidden.zarr")
    states = hidden.read(folder / "hidden.zarr")
    plan = methods.run(method, folder / "dense", states, tokens, similarity.similarity(states), facts, ratio=ratio,
                       k_max=k_max, options=options)
    fold.fold(plan, folder / "dense", out)
    return checkpoints.load_model(out)
