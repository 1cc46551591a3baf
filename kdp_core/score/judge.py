"""The model as lm-eval sees it: `Judge` answers the requests of a task with log-likelihoods or with text.

It differs from lm-eval's own `HFLM` in two ways, with the same results up to rounding:
    windows    items that carry token ids (`heldout_ppl`) are scored on these ids, without a BOS or EOS before them
    prefixes   choices that share a context run it once, with a KV cache, which saves up to 3/4 of a four-choice task
Axes: S sequences, T tokens, V vocabulary.
"""
import logging
import time
from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOGITS_BYTES = 2 ** 30
"""Most bytes of one batch's logits in main memory. Four pages of WikiText at once would take 4 GB of logits, and as
much again for their logarithms."""
PROGRESS_SECONDS = 60.0
"""Fewest seconds between two lines of progress within a task."""
Request = tuple[Any, list[int], list[int]]
"""lm-eval's tokenised request: (key, context ids, continuation ids)."""


class Judge(HFLM):
    """lm-eval's view of a loaded model: its tokenisation and batching, with the two changes of this module."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8,
                 max_length: int | None = None) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
                         max_length=max_length)
        self.progress = Progress("", 0)

    def watch(self, progress: "Progress") -> None:
        """Report each answered request to `progress`, through the hook that lm-eval has for partial results."""
        self.progress = progress
        self.set_cache_hook(progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each item's text; of an item with `ids`, a window, that of its tokens 2 to end."""
        scores: list[float | None] = [None] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_length[len(request.doc.get("ids") or ())].append(place)
        for length, places in by_length.items():
            if not length:
                found = []
                for first in range(0, len(places), self.batch_size):
                    few = [requests[place] for place in places[first:first + self.batch_size]]
                    found += super().loglikelihood_rolling(few, disable_tqdm)
            else:
                found = self._windows([requests[place].doc["ids"] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    @torch.inference_mode()
    def _windows(self, windows: list[list[int]]) -> list[float]:
        """Log-likelihood (nats) of each window's tokens 2 to end; all windows have one length."""
        found: list[float] = []
        for first in range(0, len(windows), self.batch_size):
            ids_ST = torch.tensor(windows[first:first + self.batch_size], device=self.device)
            logits_STV = self.model(ids_ST, use_cache=False).logits[:, :-1]
            found += _log_probs(logits_STV, ids_ST[:, 1:]).sum(-1, dtype=torch.float64).tolist()
            self.progress.advance(len(ids_ST))
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, in order."""
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        shared, single = self._by_context(requests)
        for places in shared:
            found = self._continuations(requests[places[0]][1], [requests[place][2] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
            self.progress.advance(len(places))
        rest = self._alone([requests[place] for place in single], **settings) if single else []
        for place, score in zip(single, rest, strict=True):
            scores[place] = score
        return scores

    def _alone(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """Score as lm-eval does, with fewer sequences at a time where their logits would be too large."""
        before, longest = self.batch_size, max(len(context) + len(ids) for _, context, ids in requests)
        if self.device.type == "cpu":
            sequence_bytes = 4 * min(longest, self.max_length) * self.model.config.vocab_size
            self.batch_size_per_gpu = max(1, min(before, LOGITS_BYTES // sequence_bytes))
        try:
            return super()._loglikelihood_tokens(requests, **settings)
        finally:
            self.batch_size_per_gpu = before

    def _by_context(self, requests: list[Request]) -> tuple[list[list[int]], list[int]]:
        """Places of the requests that share a context worth running once (in groups), and places of all others.

        The others are scored by lm-eval: lone requests, one-token choices (lm-eval shares their logits already),
        contexts of one token (nothing can be shared) and sequences that must be cut to the model's length.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, _) in enumerate(requests):
            groups[tuple(context)].append(place)
        shared = []
        for context, places in groups.items():
            lengths = [len(requests[place][2]) for place in places]
            if len(places) > 1 and len(context) > 1 and max(lengths) > 1 and \
                    len(context) + max(lengths) <= self.max_length:
                shared += [places[i:i + self.batch_size] for i in range(0, len(places), self.batch_size)]
        taken = {place for places in shared for place in places}
        return shared, [place for place in range(len(requests)) if place not in taken]

    @torch.inference_mode()
    def _continuations(self, context: list[int], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Score the continuations of one context: all but its last token run once, then the cache is repeated."""
        prefix_1T = torch.tensor([context[:-1]], device=self.device)
        cache = self.model(prefix_1T, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(continuations))
        longest = max(map(len, continuations))
        # padding is at the end, where a causal model's earlier positions do not see it
        target_ST = torch.tensor([ids + [0] * (longest - len(ids)) for ids in continuations], device=self.device)
        input_ST = torch.cat([torch.full_like(target_ST[:, :1], context[-1]), target_ST[:, :-1]], dim=1)
        logits_STV = self.model(input_ST, past_key_values=cache, use_cache=True).logits
        log_probs_ST, hits_ST = _log_probs(logits_STV, target_ST), logits_STV.argmax(-1) == target_ST
        return [(float(log_probs[:len(ids)].sum(dtype=torch.float64)), bool(hits[:len(ids)].all()))
                for ids, log_probs, hits in zip(continuations, log_probs_ST, hits_ST, strict=True)]


class Progress:
    """Counts the answered requests of a task and logs their number; it takes the place of lm-eval's hook."""

    def __init__(self, label: str, requests: int) -> None:
        self._label, self._requests, self._done = label, requests, 0
        self._started = self._said = time.perf_counter()

    def advance(self, requests: int) -> None:
        """Count so many more answered requests."""
        self._done += requests
        now = time.perf_counter()
        if now - self._said >= PROGRESS_SECONDS and self._done < self._requests:
            self._said = now
            logger.info("%s: %d of %d requests after %.0f s", self._label, self._done, self._requests,
                        now - self._started)

    def add_partial(self, *_: Any) -> None:
        """lm-eval calls this after each of its own answers."""
        self.advance(1)


def _log_probs(logits_STV: Tensor, ids_ST: Tensor) -> Tensor:
    """log softmax of the logits at the ids, float32 (S, T), one sequence at a time.

    A second tensor of S x T x V numbers would take too much memory.
    """
    return torch.stack([-functional.cross_entropy(logits_TV.float(), ids_T, reduction="none")
                        for logits_TV, ids_T in zip(logits_STV, ids_ST, strict=True)])
