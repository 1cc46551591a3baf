"""The model in the form that lm-eval calls: `Judge` answers the requests of a task with log-likelihoods or with text.

`Judge` is lm-eval's own `HFLM` with three changes. First, if items contain token ids (`heldout_ppl`), these ids are
scored without a BOS or EOS token before them. Second, exactly one first token precedes a text whose rolling
log-likelihood is computed. If a tokenizer adds a first token, lm-eval 0.4.13 adds a second first token and also scores
the tokenizer's token (EleutherAI/lm-evaluation-harness#3333). Third, if a family needs a first token, every window of a
text begins with this token (EleutherAI/lm-evaluation-harness#2382). The module kdp_core.score.fast computes the same
log-likelihoods faster.
Axes: S sequences, T tokens, V vocabulary.
"""
import logging
import time
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdp_core.model import checkpoints
from kdp_core.model.families import FamilyError, first_token

logger = logging.getLogger(__name__)

LOGITS_BYTES = 2 ** 30
"""Largest size in bytes of the logits of one batch in main memory. The logits of four pages of WikiText at once would
need 4 GB, and their logarithms another 4 GB."""
PROGRESS_SECONDS = 60.0
"""Shortest time in seconds between two log lines on the progress of a task."""
Request = tuple[Any, list[int], list[int]]
"""lm-eval's tokenised request: (key, context ids, continuation ids)."""


class Judge(HFLM):
    """A loaded model in the form that lm-eval calls, with lm-eval's tokenisation and batches and the changes of this
    module."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8,
                 max_length: int | None = None) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
                         max_length=max_length)
        self.progress = Progress("", 0)
        self._start = _first_token(model)
        checkpoints.begin_with(tokenizer, self._start)
        _pad_within(tokenizer, model.get_input_embeddings().num_embeddings)

    def watch(self, progress: "Progress") -> None:
        """Report each answered request to `progress`. `progress` takes the place of lm-eval's cache hook, which
        receives each answer."""
        self.progress = progress
        self.set_cache_hook(progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each item's text.

        If an item has `ids`, these are the tokens of a window, and its tokens 2 to end are scored.
        """
        scores: list[float | None] = [None] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_length[len(request.doc.get("ids") or ())].append(place)
        for length, places in by_length.items():
            if not length:
                found = []
                for first in range(0, len(places), self.batch_size):
                    few = [requests[place] for place in places[first:first + self.batch_size]]
                    found += self._texts([request.args[0] for request in few], disable_tqdm)
            else:
                found = self._windows([requests[place].doc["ids"] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    def _texts(self, texts: list[str], disable_tqdm: bool) -> list[float]:
        """Log-likelihood (nats) of each text. A long text is scored in windows of the model's length that overlap by
        one token."""
        prefix, asked, owners = self.prefix_token_id, [], []
        room = self.max_length - (self._start is not None)
        for place, text in enumerate(texts):
            ids = self.tok_encode(text, add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [prefix] else ids
            for window in get_rolling_token_windows(ids, prefix_token=prefix, max_seq_len=room, context_len=1):
                context, predicted = make_disjoint_window(window)
                begun = self._start in (None, context[0])
                asked.append((None, context if begun else [self._start, *context], predicted))
                owners.append(place)
        found = [0.0] * len(texts)
        scores = self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm) if asked else []
        for place, (log_likelihood, _) in zip(owners, scores, strict=True):
            found[place] += log_likelihood
        self.progress.advance(len(texts))
        return found

    @torch.inference_mode()
    def _windows(self, windows: list[list[int]]) -> list[float]:
        """Log-likelihood (nats) of tokens 2 to end of each window. All windows have the same length."""
        found: list[float] = []
        for first in range(0, len(windows), self.batch_size):
            ids_ST = torch.tensor(windows[first:first + self.batch_size], device=self.device)
            logits_STV = self.model(ids_ST, use_cache=False).logits[:, :-1]
            found += _log_probs(logits_STV, ids_ST[:, 1:]).sum(-1, dtype=torch.float64).tolist()
            self.progress.advance(len(ids_ST))
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding produces the continuation) for each continuation, in order.

        The values are lm-eval's. A batch has fewer sequences if its logits would need too much memory.
        """
        before, longest = self.batch_size, max(len(context) + len(ids) for _, context, ids in requests)
        if self.device.type == "cpu":
            sequence_bytes = 4 * min(longest, self.max_length) * self.model.config.vocab_size
            self.batch_size_per_gpu = max(1, min(before, LOGITS_BYTES // sequence_bytes))
        try:
            return super()._loglikelihood_tokens(requests, **settings)
        finally:
            self.batch_size_per_gpu = before


class Progress:
    """Counts the answered requests of a task and logs their number. lm-eval calls this object in the place of its cache
    hook."""

    def __init__(self, label: str, requests: int) -> None:
        self._label, self._requests, self._done = label, requests, 0
        self._started = self._said = time.perf_counter()

    def advance(self, requests: int) -> None:
        """Add `requests` to the number of answered requests."""
        self._done += requests
        now = time.perf_counter()
        if now - self._said >= PROGRESS_SECONDS and self._done < self._requests:
            self._said = now
            logger.info("%s: %d of %d requests after %.0f s", self._label, self._done, self._requests,
                        now - self._started)

    def add_partial(self, *_: Any) -> None:
        """lm-eval calls this method after each answer that it computes."""
        self.advance(1)


def _first_token(model: PreTrainedModel) -> int | None:
    try:
        return first_token(model)
    except FamilyError:
        return None


def _pad_within(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """If the padding token has no row in the embedding, pad with a token that has one. No token attends to padding."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        ends = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends if ends is not None and ends < rows else 0)


def _log_probs(logits_STV: Tensor, ids_ST: Tensor) -> Tensor:
    """log softmax of the logits at the ids, float32 (S, T). One sequence is computed at a time, because a second tensor
    of S x T x V numbers would need too much memory."""
    return torch.stack([-functional.cross_entropy(logits_TV.float(), ids_T, reduction="none")
                        for logits_TV, ids_T in zip(logits_STV, ids_ST, strict=True)])
