"""The fast scorer: it computes lm-eval's log-likelihoods from as few tokens and logits as possible.

lm-eval's HFLM pads sequences to one length, computes the context again for each choice, and computes the logits of
every token. Here sequences are packed in rows (kdp_core.score.packing). The model reads a context once together with
all its choices. The shared examples at the beginning of many prompts are computed once for all these prompts. The
output head reads only the tokens that are scored. On CPU, the rows run in parallel, one row on each thread, so no
thread waits for other threads after every operation. Prompts, metrics and generated text come from lm-eval's own code.
Packing needs a model that accepts an arbitrary attention mask and arbitrary positions of tokens. The function `packs`
tests on a few tokens whether a model accepts both. A model that fails the test is scored by lm-eval's own code.
Axes: N tokens of a row, P tokens of a prefix, C scored tokens of some rows, D width, V vocabulary.
"""
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kdp_core.model.distil import Head, head_of
from kdp_core.model.families import FamilyError, base_of, family_of
from kdp_core.score import packing
from kdp_core.score.judge import Judge, Request
from kdp_core.score.packing import Group, Row, Scored

logger = logging.getLogger(__name__)

ROW_TOKENS = 256
"""Number of tokens of a row on CPU. On other devices a row has ROW_TOKENS times the batch size. Matrix products reach
their full speed at 64 tokens. The states of more than 256 tokens do not fit into the cache of a core."""
HEAD_TOKENS = 64
"""Number of tokens whose logits are in memory at the same time, on CPU."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of attention of a layer (all positions, or a sliding window), in transformers' words."""


class Found(NamedTuple):
    """The score of one sequence of a row."""
    number: int
    log_likelihood: float
    greedy: bool


class FastJudge(Judge):
    """A loaded model in the form that lm-eval calls. This class computes the log-likelihoods on packed rows."""

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding produces the continuation) for each continuation, in
        order."""
        if not self._packs:
            return super()._loglikelihood_tokens(requests, **settings)
        sequences = [_scored(context, continuation, self.max_length) for _, context, continuation in requests]
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        for found in self._all(packing.pack(sequences, self._row_tokens), sequences):
            for number, log_likelihood, greedy in found:
                scores[number] = log_likelihood, greedy
            # a rolling window has no key: a text counts as answered when all its windows are scored
            self.progress.advance(sum(requests[one.number][0] is not None for one in found))
        return scores

    def _windows(self, windows: list[list[int]]) -> list[float]:
        if not self._packs:
            return super()._windows(windows)
        return [score for score, _ in self._loglikelihood_tokens([("window", ids[:1], ids[1:]) for ids in windows])]

    @property
    def _row_tokens(self) -> int:
        return ROW_TOKENS if self.device.type == "cpu" else ROW_TOKENS * self.batch_size

    @property
    def _packs(self) -> bool:
        """Whether the model can read packed rows. The model is tested only once."""
        if not hasattr(self, "_tried"):
            self._tried = packs(self.model)
        return self._tried

    def _all(self, groups: list[Group], sequences: list[Scored]) -> Iterator[list[Found]]:
        """The scores of each row; the rows come in any order."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        if min(threads, len(groups)) == 1:
            for group in groups:
                yield from score_group(self.model, group, sequences)
            return
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                jobs = [pool.submit(lambda one: list(score_group(self.model, one, sequences)), group)
                        for group in groups]
                for job in as_completed(jobs):
                    yield from job.result()
        finally:
            torch.set_num_threads(threads)


def packs(model: PreTrainedModel) -> bool:
    """Whether a model gives packed sequences the same scores as single sequences. The function compares these scores on
    a few tokens.

    The scores differ if a layer mixes neighbouring tokens of a row by other operations than attention, such as a
    convolution.
    """
    ends = ((4, 5, 6), (4, 8), (7, 7, 7, 7))
    tried = [Scored((2, 3, *context, *targets), targets) for context in ((4, 5, 6, 7), (9,)) for targets in ends]
    try:
        family_of(model)
        if not set(_kinds(model)) <= {FULL, SLIDING}:
            return False
        numbers = list(range(len(tried)))
        alone = [_values(model, packing.group([one], [0], 0, ROW_TOKENS), [one])[0] for one in tried]
        together = [_values(model, packing.group(tried, numbers, shared, ROW_TOKENS), tried) for shared in (0, 2)]
    except (FamilyError, TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        logger.info("%s takes no packed sequences (%s); lm-eval's own route scores it", type(model).__name__, error)
        return False
    # rounding alone changes these scores of SmolLM2 (about -65 nats, on meaningless tokens) by 1e-3 in float32
    share = min(1000 * torch.finfo(model.dtype).eps, 0.02)
    return all(torch.allclose(torch.tensor(one), torch.tensor(alone), rtol=share, atol=8 * share, equal_nan=True)
               for one in together)


def _values(model: PreTrainedModel, group: Group, sequences: list[Scored]) -> list[float]:
    """The log-likelihoods of the sequences of one group, in the order of the sequences."""
    return [one.log_likelihood for one in sorted(itertools.chain(*score_group(model, group, sequences)))]


@torch.inference_mode()
def score_group(model: PreTrainedModel, group: Group, sequences: list[Scored]) -> Iterator[list[Found]]:
    """The scores of each row of a group. The numbers in the rows are indices of `sequences`."""
    cache = DynamicCache() if group.prefix else None
    if group.prefix:
        base_of(model)(torch.tensor([group.prefix], device=model.device), past_key_values=cache, use_cache=True)
    for row in group.rows:
        h_ND = _states(model, row, len(group.prefix), cache)
        yield _row_scores(model, h_ND, row, sequences)


def _states(model: PreTrainedModel, row: Row, prefix: int, cache: DynamicCache | None) -> Tensor:
    """For each token of a row, the vector that the output head reads, (N, D)."""
    given: dict[str, Any] = {}
    if prefix or not row.chain:
        given = {"position_ids": torch.tensor([row.positions_N], device=model.device),
                 "attention_mask": _masks(model, row, prefix)}
    states = base_of(model)(torch.tensor([row.ids_N], device=model.device), past_key_values=cache,
                            use_cache=cache is not None, **given).last_hidden_state[0]
    if cache is not None:
        cache.crop(-len(row.ids_N))
    return states


def _masks(model: PreTrainedModel, row: Row, prefix: int) -> Tensor | dict[str, Tensor]:
    """Additive masks (1, 1, N, P + N): one mask for all layers, or one for each kind of layer if the model has several
    kinds."""
    def mask(window: int | None) -> Tensor:
        seen = packing.visible(row, prefix, window)
        least = torch.finfo(model.dtype).min
        return torch.where(seen, 0.0, least)[None, None].to(model.device, model.dtype)

    window = getattr(model.config, "sliding_window", None)
    kinds = _kinds(model)
    if kinds:
        return {kind: mask(window if kind == SLIDING else None) for kind in dict.fromkeys((FULL, *kinds))}
    return mask(window)


def _kinds(model: PreTrainedModel) -> list[str]:
    """The kind of each layer; empty if all layers have the same kind."""
    return list(getattr(model.config, "layer_types", None) or [])


def _row_scores(model: PreTrainedModel, h_ND: Tensor, row: Row, sequences: list[Scored]) -> list[Found]:
    """The scores of the sequences of a row."""
    paths = [(number, row.path(end, len(sequences[number].targets))) for number, end in row.ends]
    nodes = sorted({node for _, path in paths for node in path})
    place = {node: place for place, node in enumerate(nodes)}
    at = torch.tensor([place[node] for _, path in paths for node in path], device=h_ND.device)
    targets = torch.tensor([token for number, _ in paths for token in sequences[number].targets], device=h_ND.device)
    log_probs, hits = _log_probs(head_of(model), h_ND[nodes], at, targets)
    lengths = [len(path) for _, path in paths]
    return [Found(number, float(own.sum(dtype=torch.float64)), bool(hit.all()))
            for (number, _), own, hit in zip(paths, log_probs.split(lengths), hits.split(lengths), strict=True)]


def _log_probs(head: Head, h_CD: Tensor, at: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of the logits at the targets (float32), and whether each target is the most likely token.

    For each target, `at` is the row of `h_CD` that predicts it.
    """
    chunk = HEAD_TOKENS if h_CD.device.type == "cpu" else ROW_TOKENS
    log_probs = torch.empty(len(targets), device=h_CD.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=h_CD.device)
    places = head.places(targets)
    for first in range(0, len(h_CD), chunk):
        # a softmax of all logits at once has the same rounding as in lm-eval
        logits_CV = torch.cat(list(head.slices(head.prepared(h_CD[first:first + chunk]))), dim=-1)
        mine = ((at >= first) & (at < first + chunk)).nonzero()[:, 0]
        rows, ids = at[mine] - first, places[mine]
        hits[mine] = logits_CV.argmax(-1)[rows] == ids
        log_probs[mine] = logits_CV.log_softmax(-1)[rows, ids]
    return log_probs, hits


def _scored(context: list[int], continuation: list[int], max_length: int) -> Scored:
    """The tokens of a request as lm-eval gives them to the model. If the tokens are more than the model can read, the
    first tokens are removed.

    Raises AssertionError, as lm-eval does, if a continuation is empty or longer than the model can read.
    """
    assert context and 0 < len(continuation) <= max_length
    return Scored(tuple([*context, *continuation][-(max_length + 1):][:-1]), tuple(continuation))
