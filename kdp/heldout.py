"""Perplexity of checkpoints on the windows of one held-out text. The workflow's task heldout_ppl scores perplexity in
the same way.

Axes: S windows, T tokens of a window, J models.
"""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from torch import Tensor

from kdp_core.base import texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.results import paired
from kdp_core.score import metrics, standard_errors
from kdp_core.score.fast import FastJudge


class HeldoutError(ValueError):
    """Two checkpoints cannot be compared on one text."""


class Perplexity(NamedTuple):
    """Perplexity of one checkpoint."""
    ppl: float
    """Per predicted token."""
    stderr: float | None
    """Standard error over windows; None if there is one window."""
    nats: list[float]
    """Log-likelihood of each window, in nats."""
    predictions: int
    """Number of predicted tokens in a window."""


class Difference(NamedTuple):
    """The difference of two checkpoints on the same windows: second minus first."""
    nats_per_token: float
    stderr: float
    p: float
    """Two-sided p-value, from Student's t over windows."""
    ratio: float
    """The perplexity of the second checkpoint divided by the perplexity of the first checkpoint."""
    windows: int


def windows(folder: Path, documents: list[str], length: int) -> Tensor:
    """The windows of a text, tokenised with the tokenizer of the checkpoint in `folder`, int64 (S, T)."""
    config = checkpoints.config_of(folder)
    return texts.windows(checkpoints.load_tokenizer(folder), documents, length=length, vocabulary=config.vocab_size,
                         start=first_token(config))


def perplexity(folder: Path, ids_ST: Tensor, *, device: str = "cpu", dtype: str = "float32") -> Perplexity:
    """Score the checkpoint in `folder`, dense or pruned, on windows."""
    judge = FastJudge(checkpoints.load_model(folder, device=device, dtype=dtype), checkpoints.load_tokenizer(folder))
    asked = [Instance("loglikelihood_rolling", {"ids": ids}, ("",), place) for place, ids in enumerate(ids_ST.tolist())]
    nats, predictions = judge.loglikelihood_rolling(asked, disable_tqdm=True), ids_ST.shape[1] - 1
    pairs = [(one, predictions) for one in nats]
    return Perplexity(metrics.ppl(pairs), standard_errors.perplexity(pairs), nats, predictions)


def check_same_tokens(first: Path, second: Path) -> None:
    """Raise HeldoutError for checkpoints with different tokenizers, because they do not predict the same tokens."""
    known, other = (checkpoints.load_tokenizer(folder).get_vocab() for folder in (first, second))
    if known != other:
        raise HeldoutError(f"{first} and {second} have different tokenizers, so their perplexities cannot be "
                           "compared; name models with the same tokenizer")


def difference(first: Perplexity, second: Perplexity) -> Difference:
    """The paired difference of two checkpoints that were scored on the same windows."""
    values: Sequence[list[float]] = (first.nats, second.nats)
    ll_SJ, tokens_S = np.array(values).T, np.full(len(first.nats), first.predictions)
    table = paired.perplexities({"text": ll_SJ}, {"text": tokens_S}, {"text": "ppl"})["text"]
    nats = float(table.difference_JJ[1, 0])
    return Difference(nats, float(table.stderr_JJ[1, 0]), float(table.p_JJ[1, 0]), math.exp(nats), table.items)
