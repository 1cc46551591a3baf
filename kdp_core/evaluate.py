"""Scores of a checkpoint by lm-eval (EleutherAI's evaluation harness), each with its standard error.

Two things are done otherwise than in lm-eval's own `HFLM`, with the same results up to rounding:
    windows    rows that carry token ids (`heldout_ppl`) are scored on these ids, without a BOS or EOS before them
    prefixes   choices that share a context run it once, with a KV cache, which saves up to 3/4 of a four-choice task
Standard errors: means have lm-eval's closed form; perplexities and bits per byte the delta method over items instead
of lm-eval's bootstrap, or of none; anything else a bootstrap of 1,000 draws in this process.
Nothing touches the network unless a task's own data lie on a hub.
"""
import contextlib
import difflib
import importlib.metadata
import io
import json
import logging
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdp_core import models, store
from kdp_core.records import Score, Scores
from kdp_core.tasks import as_pairs, nats_per_unit

logger = logging.getLogger(__name__)

PRIMARY = ("acc_norm", "acc", "exact_match", "em")
"""The metric that counts for a task's accuracy, first choice first: acc_norm where the task has one (HellaSwag, ARC,
PIQA), acc elsewhere (WinoGrande, BoolQ, MMLU). Papers mix them, which alone moves a mean by points."""
PERPLEXITIES = ("ppl", "perplexity", "word_perplexity", "byte_perplexity")
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1")
PPL_CEILING = 1e12
"""Recorded, without a standard error, for a perplexity above it or not a number: JSON has no infinity, and a collapsed
model should stand at the end of a table, not drop out of it."""
BOOTSTRAP_DRAWS = 1000
PACKAGES = ("lm-eval", "torch", "transformers", "datasets", "tokenizers")
Request = tuple[Any, list[int], list[int]]
"""lm-eval's tokenised request: (key, context ids, continuation ids)."""


class EvaluationError(ValueError):
    """An evaluation cannot be run as it was asked for."""


def evaluate(folder: str | Path, *, tasks: Sequence[str], task_folders: Sequence[str | Path] = (),
             limit: int | None = None, fewshot: int | None = None, batch_size: int = 8, max_length: int | None = None,
             device: str = "cpu", dtype: str = "float32", samples_folder: str | Path | None = None,
             seed: int = 0) -> Scores:
    """Score the checkpoint in `folder`, dense or pruned, on lm-eval tasks, groups or tags by name.

    limit           items a task at most, the first ones
    fewshot         examples a prompt, for tasks that do not fix it themselves
    max_length      tokens a sequence at most, if fewer than the model's own
    samples_folder  gets a JSONL file a task, a line an item: id, target, responses, metrics
    A task within a group is named `group/task`. Unknown tasks raise EvaluationError before the model is loaded.
    """
    started = time.perf_counter()
    _check_arguments(tasks, limit, fewshot, batch_size)
    manager = _task_manager(tasks, [Path(path) for path in task_folders], folder)
    with _quiet():
        loaded = _load_tasks(manager, tasks)
        _prepare(loaded["tasks"], fewshot, seed)
        model = models.load_model(folder, device=device, dtype=dtype)
        judge = Judge(model, models.load_tokenizer(folder), batch_size=batch_size, max_length=max_length)
        results = evaluator.evaluate(judge, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS)
    scores = _scores(results, loaded)
    if samples_folder is not None:
        write_samples(samples_folder, results["samples"])
    seconds = time.perf_counter() - started
    logger.info("%d scores of %s in %.1f s", len(scores), folder, seconds)
    return Scores(scores, seconds, _versions(results))


def primary(scores: Scores) -> list[Score]:
    """The accuracy that counts of each task, by PRIMARY, in the order of the scores; tasks with none are left out.

    Members of a group that has a score of its own are left out too, so that nothing counts twice in a mean.
    """
    found: dict[str, Score] = {}
    for metric in reversed(PRIMARY):
        found |= {score.task: score for score in scores.scores if score.metric == metric}
    names = list(dict.fromkeys(score.task for score in scores.scores))
    return [found[name] for name in names
            if name in found and not any(name.startswith(f"{other}/") for other in found)]


class Judge(HFLM):
    """lm-eval's view of a loaded model: its tokenisation and batching, with the two changes named above."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8,
                 max_length: int | None = None) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
                         max_length=max_length)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each row's text; a row with `ids` is a window and predicts its tokens 2 to end."""
        scores: list[float | None] = [None] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_length[len(request.doc.get("ids") or ())].append(place)
        for length, places in by_length.items():
            if not length:
                found = super().loglikelihood_rolling([requests[place] for place in places], disable_tqdm)
            else:
                found = self._windows([requests[place].doc["ids"] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    @torch.inference_mode()
    def _windows(self, windows: list[list[int]]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(windows), self.batch_size):
            ids_ST = torch.tensor(windows[first:first + self.batch_size], device=self.device)
            logits_STV = self.model(ids_ST, use_cache=False).logits[:, :-1]
            found += _log_probs(logits_STV, ids_ST[:, 1:]).sum(-1, dtype=torch.float64).tolist()
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, in order."""
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        shared, single = self._by_context(requests)
        for places in shared:
            found = self._continuations(requests[places[0]][1], [requests[place][2] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        rest = super()._loglikelihood_tokens([requests[place] for place in single], **settings) if single else []
        for place, score in zip(single, rest, strict=True):
            scores[place] = score
        return scores

    def _by_context(self, requests: list[Request]) -> tuple[list[list[int]], list[int]]:
        """Places of requests that share a context worth running once (in groups), and places of all others.

        Left to lm-eval: lone requests, one-token choices (it shares their logits already), contexts of one token
        (nothing to share) and sequences that must be cut to the model's length.
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


def ppl_stderr(items: list[Any]) -> float | None:
    """Standard error of `tasks.ppl` over items (log-likelihood, weight), by the delta method; None for one item."""
    error = nats_stderr(items)
    if error is None:
        return None
    # d exp(L) = exp(L) dL
    nats = nats_per_unit(items)
    return math.exp(nats) * error if nats < math.log(PPL_CEILING) else None


def nats_stderr(items: list[Any]) -> float | None:
    """Standard error of L = -sum ll_i / sum n_i, a ratio of two sums over the same W items; None for one item."""
    pairs = as_pairs(items)
    if len(pairs) < 2:
        return None
    nats = nats_per_unit(items)
    # se(L) = sqrt(W / (W - 1) * sum_i (-ll_i - L n_i)^2) / sum_i n_i
    squares = sum((-ll - nats * weight) ** 2 for ll, weight in pairs)
    return math.sqrt(len(pairs) / (len(pairs) - 1) * squares) / sum(weight for _, weight in pairs)


def write_samples(folder: str | Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """One JSONL file a task, a line an item and filter: id, target, responses, metrics, hashes of row and prompt."""
    for task, rows in sorted(samples.items()):
        lines = []
        for row in rows:
            kept = {"doc_id": row["doc_id"], "target": row["target"], "responses": row["filtered_resps"],
                    "filter": row["filter"], **{metric: row[metric] for metric in row["metrics"]},
                    "doc_hash": row["doc_hash"], "prompt_hash": row["prompt_hash"]}
            lines.append(_line(kept))
        store.write_text(Path(folder) / f"{task}.jsonl", "".join(lines))


def _line(row: dict[str, Any]) -> str:
    """Compact JSON; NaN and infinities, which json.dumps would print as such, become null."""
    text = json.dumps(row, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False) + "\n"


def _log_probs(logits_STV: Tensor, ids_ST: Tensor) -> Tensor:
    """log softmax of the logits at the ids, float32, a sequence at a time: a second S x T x V would cost too much."""
    return torch.stack([-functional.cross_entropy(logits_TV.float(), ids_T, reduction="none")
                        for logits_TV, ids_T in zip(logits_STV, ids_ST, strict=True)])


def _check_arguments(tasks: Sequence[str], limit: int | None, fewshot: int | None, batch_size: int) -> None:
    if isinstance(tasks, str) or not tasks:
        raise EvaluationError(f"tasks {tasks!r} is no list of task names; name at least one, such as ['hellaswag']")
    if batch_size < 1 or (limit is not None and limit < 1) or (fewshot is not None and fewshot < 0):
        raise EvaluationError(f"batch_size {batch_size}, limit {limit}, fewshot {fewshot}: batch_size and limit must "
                              "be at least 1, fewshot at least 0")


def _task_manager(tasks: Sequence[str], folders: list[Path], model_folder: str | Path) -> TaskManager:
    """A manager that knows all `tasks`; lm-eval's own index (seconds) is read only where the folders do not do."""
    for path in folders:
        if not path.is_dir():
            raise EvaluationError(f"task folder {path} does not exist; make it with kdp_core.tasks.write_tasks or "
                                  "correct the path")
    metadata = {"tokenizer": str(model_folder)}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders, metadata=metadata)
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise EvaluationError(f"task {name!r} is unknown to lm-eval {importlib.metadata.version('lm-eval')} and to "
                                  f"the task folders; close names: {', '.join(close) or 'none'}")
    return manager


def _load_tasks(manager: TaskManager, tasks: Sequence[str]) -> Mapping[str, Any]:
    """Tasks, groups and their data, which lm-eval reads here."""
    try:
        return manager.load(list(tasks))
    except (OSError, ImportError) as error:  # datasets' errors on missing data and a shut network are OSErrors
        raise EvaluationError(f"tasks {', '.join(tasks)}: data or code cannot be loaded ({error}); put their data into "
                              "the Hugging Face cache, allow the network, or install what is missing") from error


def _prepare(tasks: Mapping[str, Any], fewshot: int | None, seed: int) -> None:
    """Few-shot numbers as `simple_evaluate` sets them (a task that fixes 0 keeps it), and all of lm-eval's seeds."""
    for task in tasks.values():
        fixed = task.get_config("num_fewshot")
        if fixed is None or (fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the tasks' own code draws from the global state
    torch.manual_seed(seed)


def _scores(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> list[Score]:
    """lm-eval's results as scores, tasks and groups in name order."""
    paths = _paths(loaded.get("groups") or {})
    found = []
    for name, values in sorted(results["results"].items(), key=lambda item: paths.get(item[0], item[0])):
        seen: set[str] = set()
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            # lm-eval's filters extract answers: the first gives the metric, further ones `metric,filter`
            label = metric if metric not in seen else key
            seen.add(metric)
            rows = [row for row in results["samples"].get(name, []) if row["filter"] == chosen and metric in row]
            better = results["higher_is_better"].get(name, {}).get(metric)
            found.append(_score(paths.get(name, name), metric, value, values.get(f"{metric}_stderr,{chosen}"),
                                [row[metric] for row in rows],
                                int(values["sample_len"]), better is not False)._replace(metric=label))
    return found


def _score(task: str, metric: str, value: float, stderr: Any, items: list[Any], count: int, better: bool) -> Score:
    error = float(stderr) if isinstance(stderr, float | int) else None
    unit = "share" if metric in SHARES else "score"
    if metric in PERPLEXITIES:
        unit, error = "ppl", ppl_stderr(items) if items else None
        if not value <= PPL_CEILING:  # also true of NaN
            logger.warning("%s: %s is %s, recorded as %g", task, metric, value, PPL_CEILING)
            value, error = PPL_CEILING, None
    elif metric == "bits_per_byte":
        nats = nats_stderr(items) if items else None
        unit, error = "bits/byte", None if nats is None else nats / math.log(2)
    return Score(task, metric, float(value), error, count, better, unit)


def _paths(groups: Mapping[str, Any]) -> dict[str, str]:
    """For every member of a group, `group/.../task`; names outside groups are not in it."""
    parents = {child: name for name, group in groups.items() for child in group.child_names}

    def path(name: str) -> str:
        return f"{path(parents[name])}/{name}" if name in parents else name

    return {name: path(name) for name in parents}


def _versions(results: Mapping[str, Any]) -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return packages | {f"task:{name}": str(version) for name, version in sorted(results["versions"].items())}


class _Lines(io.TextIOBase):
    """A text stream whose lines go to this module's logger at DEBUG; a redrawn progress bar is a line each time."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(None, map(str.strip, lines)):
            logger.debug("%s", line)
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Prints and, where no terminal shows them, progress bars of lm-eval and transformers go to the log.

    lm-eval's bootstrap is kept in this process: its pool of workers would load every library once a core.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(_Lines()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(_Lines()))
            yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
