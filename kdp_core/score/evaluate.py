"""Scores of a checkpoint by lm-eval (EleutherAI's evaluation harness), each with its standard error.

Two things are done otherwise than in lm-eval's own `HFLM`, with the same results up to rounding:
    windows    rows that carry token ids (`heldout_ppl`) are scored on these ids, without a BOS or EOS before them
    prefixes   choices that share a context run it once, with a KV cache, which saves up to 3/4 of a four-choice task
With a folder of records the scores of a task are kept as soon as it is done: an evaluation that was killed goes on at
the task it was in, and one that is asked for more scores what is new. A record is named by a hash of all that its
scores depend on; see `_key`. Several evaluations of one checkpoint, each of some of the tasks, may share a folder at
the same time; one of all tasks then takes what they kept.
Standard errors: means have lm-eval's closed form; perplexities and bits per byte the delta method over items instead
of lm-eval's bootstrap, or of none; areas under the curve DeLong's; anything else a bootstrap of 1,000 draws in this
process.
Nothing touches the network unless a task's own data lie on a hub.
"""
import contextlib
import difflib
import hashlib
import importlib.metadata
import inspect
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
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.evaluator_utils import EvalAcc, aggregate_groups
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdp_core.base import store
from kdp_core.base.records import Score, Scores
from kdp_core.model import assets, checkpoints
from kdp_core.score import benchmarks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.tasks import as_pairs, nats_per_unit

logger = logging.getLogger(__name__)

PRIMARY = ("acc_norm", "acc", "exact_match", "em")
"""The metric that counts for a task's accuracy, first choice first: acc_norm where the task has one (HellaSwag, ARC,
PIQA), acc elsewhere (WinoGrande, BoolQ, MMLU). Papers mix them, which alone moves a mean by points."""
PERPLEXITIES = ("ppl", "perplexity", "word_perplexity", "byte_perplexity")
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "auc", "rouge1", "pass@1")
PPL_CEILING = 1e12
"""Recorded, without a standard error, for a perplexity above it or not a number: JSON has no infinity, and a collapsed
model should stand at the end of a table, not drop out of it."""
BOOTSTRAP_DRAWS = 1000
PACKAGES = ("lm-eval", "torch", "transformers", "datasets", "tokenizers")
LOGITS_BYTES = 2 ** 30
"""Of one batch's logits at most, where they are in main memory: four pages of WikiText at once would take 4 GB of them,
and as much again for their logarithms."""
PROGRESS_SECONDS = 60.0
"""A line at most this often within a task."""
Request = tuple[Any, list[int], list[int]]
"""lm-eval's tokenised request: (key, context ids, continuation ids)."""


class EvaluationError(ValueError):
    """An evaluation cannot be run as it was asked for."""


class Record(NamedTuple):
    """What one task gave, as its file holds it: the samples follow, a line an item."""
    task: str
    scores: list[Score]
    metrics: dict[str, Any]
    """lm-eval's own figures, from which groups are put together."""
    higher_is_better: dict[str, bool]
    version: str
    data: str
    """Hash of the scored items."""
    seconds: float
    samples: list[str]


class _Job(NamedTuple):
    """One task of an evaluation."""
    name: str
    task: Any
    limit: int | None
    path: Path | None
    """Where its record is or will be."""


def evaluate(folder: str | Path, *, tasks: Sequence[str], chosen: Chosen | None = None,
             task_folders: Sequence[str | Path] = (), limit: int | None = None, fewshot: int | None = None,
             batch_size: int = 8, max_length: int | None = None, device: str = "cpu", dtype: str = "float32",
             samples_folder: str | Path | None = None, records_folder: str | Path | None = None,
             kept_only: bool = False, code: str = "", seed: int = 0) -> Scores:
    """Score the checkpoint in `folder`, dense or pruned, on lm-eval tasks, groups or tags by name, and on benchmarks.

    chosen          benchmarks of kdp_core.score.benchmarks, scored beside the others in one load of the model
    limit           items a task at most, the first ones; of `tasks`, as benchmarks have their own
    fewshot         examples a prompt, for tasks that do not fix it themselves; likewise
    max_length      tokens a sequence at most, if fewer than the model's own
    samples_folder  gets a JSONL file a task, a line an item: id, target, responses, metrics
    records_folder  keeps what each task gave; a record that holds what would be scored again is taken as it is
    kept_only       take records alone, without the model: one that is missing raises EvaluationError
    code            what else the records depend on, such as a hash of this library's code
    A task within a group is named `group/task`. Unknown tasks raise EvaluationError before the model is loaded, which
    is not loaded at all where every record is there.
    """
    started = time.perf_counter()
    _check_arguments(tasks, chosen, limit, fewshot, batch_size)
    names = [*tasks, *(chosen.tasks if chosen else ())]
    settings = {"dtype": dtype, "device": device.split(":")[0], "batch_size": batch_size, "max_length": max_length,
                "seed": seed, "code": code}
    if records_folder is not None:
        settings["checkpoint"] = assets.sha256_of(folder)
    with _quiet(), benchmarks.task_folder(chosen) as made:
        manager = _task_manager(names, [*made, *map(Path, task_folders)], folder)
        loaded = _load_tasks(manager, names, seed)
        _check_code(loaded["tasks"], chosen)
        _prepare(loaded["tasks"], chosen, fewshot, seed)
        jobs = _jobs(loaded["tasks"], chosen, limit, records_folder, settings)
        if kept_only:
            _check_kept(jobs, records_folder)
        judge, found = None, []
        for place, job in enumerate(jobs, start=1):
            kept = _read(job.path)
            if kept is None:
                judge = judge or Judge(checkpoints.load_model(folder, device=device, dtype=dtype),
                                       checkpoints.load_tokenizer(folder), batch_size=batch_size, max_length=max_length)
                kept = _run(job, judge, f"{job.name}, task {place} of {len(jobs)}", seed)
                _keep(job.path, kept)
            else:
                logger.info("%s, task %d of %d: kept from an earlier run", job.name, place, len(jobs))
            found.append(kept)
    scores = _scores(found, loaded.get("groups") or {})
    if samples_folder is not None:
        for kept in found:
            store.write_text(Path(samples_folder) / f"{kept.task}.jsonl", "".join(kept.samples))
    seconds = sum(kept.seconds for kept in found)
    logger.info("%d scores of %s in %.1f s", len(scores), folder, time.perf_counter() - started)
    return Scores(scores, seconds, _versions(found))


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
        self.progress = _Progress("", 0)

    def watch(self, progress: "_Progress") -> None:
        """Tell each answered request to `progress`, through the hook that lm-eval has for partial results."""
        self.progress = progress
        self.set_cache_hook(progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of each row's text; a row with `ids` is a window and predicts its tokens 2 to end."""
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
        found: list[float] = []
        for first in range(0, len(windows), self.batch_size):
            ids_ST = torch.tensor(windows[first:first + self.batch_size], device=self.device)
            logits_STV = self.model(ids_ST, use_cache=False).logits[:, :-1]
            found += _log_probs(logits_STV, ids_ST[:, 1:]).sum(-1, dtype=torch.float64).tolist()
            self.progress.step(len(ids_ST))
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation, in order."""
        scores: list[tuple[float, bool] | None] = [None] * len(requests)
        shared, single = self._by_context(requests)
        for places in shared:
            found = self._continuations(requests[places[0]][1], [requests[place][2] for place in places])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
            self.progress.step(len(places))
        rest = self._alone([requests[place] for place in single], **settings) if single else []
        for place, score in zip(single, rest, strict=True):
            scores[place] = score
        return scores

    def _alone(self, requests: list[Request], **settings: Any) -> list[tuple[float, bool]]:
        """As lm-eval does it, fewer sequences at a time where their logits would be too large."""
        before, longest = self.batch_size, max(len(context) + len(ids) for _, context, ids in requests)
        if self.device.type == "cpu":
            row = 4 * min(longest, self.max_length) * self.model.config.vocab_size
            self.batch_size_per_gpu = max(1, min(before, LOGITS_BYTES // row))
        try:
            return super()._loglikelihood_tokens(requests, **settings)
        finally:
            self.batch_size_per_gpu = before

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


class _Progress:
    """Counts answered requests of a task and says so now and then; stands in for lm-eval's hook of partial results."""

    def __init__(self, label: str, requests: int) -> None:
        self._label, self._requests, self._done = label, requests, 0
        self._started = self._said = time.perf_counter()

    def step(self, requests: int) -> None:
        """So many more are answered."""
        self._done += requests
        now = time.perf_counter()
        if now - self._said >= PROGRESS_SECONDS and self._done < self._requests:
            self._said = now
            logger.info("%s: %d of %d requests after %.0f s", self._label, self._done, self._requests,
                        now - self._started)

    def add_partial(self, *_: Any) -> None:
        """lm-eval's call after each of its own answers."""
        self.step(1)


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


def _sample_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line an item and filter: id, target, responses, metrics, hashes of row and prompt."""
    return [_line({"doc_id": row["doc_id"], "target": row["target"], "responses": row["filtered_resps"],
                   "filter": row["filter"], **{metric: row[metric] for metric in row["metrics"]},
                   "doc_hash": row["doc_hash"], "prompt_hash": row["prompt_hash"]}) for row in rows]


def _line(row: dict[str, Any]) -> str:
    """Compact JSON; NaN and infinities, which json.dumps would print as such, become null."""
    text = json.dumps(row, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False) + "\n"


def _log_probs(logits_STV: Tensor, ids_ST: Tensor) -> Tensor:
    """log softmax of the logits at the ids, float32, a sequence at a time: a second S x T x V would cost too much."""
    return torch.stack([-functional.cross_entropy(logits_TV.float(), ids_T, reduction="none")
                        for logits_TV, ids_T in zip(logits_STV, ids_ST, strict=True)])


def _check_arguments(tasks: Sequence[str], chosen: Chosen | None, limit: int | None, fewshot: int | None,
                     batch_size: int) -> None:
    if isinstance(tasks, str) or not (tasks or (chosen and chosen.tasks)):
        raise EvaluationError(f"tasks {tasks!r} is no list of task names; name at least one, such as ['hellaswag']")
    if batch_size < 1 or (limit is not None and limit < 1) or (fewshot is not None and fewshot < 0):
        raise EvaluationError(f"batch_size {batch_size}, limit {limit}, fewshot {fewshot}: batch_size and limit must "
                              "be at least 1, fewshot at least 0")
    if twice := set(tasks) & set(chosen.tasks if chosen else ()):
        raise EvaluationError(f"{sorted(twice)[0]!r} is named as task and as benchmark; name it once")


def _check_code(tasks: Mapping[str, Any], chosen: Chosen | None) -> None:
    """Tasks of lm-eval or of the user's folders that run programs are refused like benchmarks that do."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not (chosen and chosen.allow_code):
            raise EvaluationError(f"task {name!r} runs programs that the model writes; set evaluate.benchmarks."
                                  "allow_code to true to run it, or leave it out")


def _task_manager(tasks: Sequence[str], folders: list[Path], model_folder: str | Path) -> TaskManager:
    """A manager that knows all `tasks`; lm-eval's own index (seconds) is read only where the folders do not do."""
    for path in folders:
        if not path.is_dir():
            raise EvaluationError(f"task folder {path} does not exist; make it with kdp_core.score.tasks.write_tasks or "
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


def _load_tasks(manager: TaskManager, tasks: Sequence[str], seed: int) -> Mapping[str, Any]:
    """Tasks, groups and their data, which lm-eval reads here, each task as if it were the only one."""
    built: list[Any] = []
    try:
        for name in tasks:
            _sow(seed)
            found = manager.load([name])
            built += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    except (OSError, ImportError) as error:  # datasets' errors on missing data and a shut network are OSErrors
        raise EvaluationError(f"tasks {', '.join(tasks)}: data or code cannot be loaded ({error}); put their data into "
                              "the Hugging Face cache, allow the network, or install what is missing") from error
    return manager.load(built)


def _prepare(tasks: Mapping[str, Any], chosen: Chosen | None, fewshot: int | None, seed: int) -> None:
    """Few-shot numbers as `simple_evaluate` sets them (a task that fixes 0 keeps it), and the seed of their draw."""
    for name, task in tasks.items():
        fixed = task.get_config("num_fewshot")
        if chosen and name in chosen.tasks:
            task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, chosen.fewshot))
        elif fixed is None or (fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)


def _jobs(tasks: Mapping[str, Any], chosen: Chosen | None, limit: int | None, folder: str | Path | None,
          settings: Mapping[str, Any]) -> list[_Job]:
    """All single tasks in order, their requests built, each with its limit and, given a folder, its record's place."""
    jobs = []
    for name, task in tasks.items():
        mine = chosen.limits.get(name, chosen.limit) if chosen and name in chosen.tasks else limit
        _sow(settings["seed"])
        task.build_all_requests(limit=mine)
        path = None if folder is None else Path(folder) / f"{_file_name(name)}-{_key(task, settings)}.jsonl"
        jobs.append(_Job(name, task, mine, path))
    return jobs


def _file_name(task: str) -> str:
    """No two tasks share one: the removal of old records must not meet another task's."""
    return quote(task, safe="")


def _check_kept(jobs: Sequence[_Job], folder: str | Path | None) -> None:
    for job in jobs:
        if job.path is None or not job.path.exists():
            raise EvaluationError(f"task {job.name!r}: no record in {folder} holds what would be scored now; delete "
                                  "the folder, so that every task is scored again")


def _key(task: Any, settings: Mapping[str, Any]) -> str:
    """Hash of all that a task's scores depend on.

    The checkpoint's files, precision, device and batch; the items themselves and every prompt as the model gets it,
    which is where data, their revision, limit and examples go in; the task's definition with the source of its
    functions and of the files they stand in; versions of the packages.
    """
    definition = {key: value for key, value in task.dump_config().items()
                  # paths of this run; what they hold is in the items
                  if key not in ("metadata", "dataset_kwargs", "custom_dataset", "include")}
    parts = {"settings": settings, "definition": definition, "version": str(task.VERSION), "files": _sources(task),
             "packages": _packages(), "requests": [[one.request_type, one.arguments] for one in task.instances],
             "items": _data_hash(task)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_named).encode()).hexdigest()[:16]


def _named(value: Any) -> Any:
    """What JSON has no word for, without the address in memory that `str` would give."""
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', value)}"
    return vars(value) if hasattr(value, "__dict__") else str(value)


def _sources(task: Any) -> dict[str, str]:
    """Hashes of Python files that a task rests on: its class's, and those beside its definition."""
    beside = Path(task.config.metadata["config_source"]).parent.glob("*.py")
    files = {Path(inspect.getfile(type(task))), *beside}
    return {file.name: assets.sha256_of(file) for file in sorted(files)}


def _data_hash(task: Any) -> str:
    """Hash of the items that are scored, by the requests that were built of them."""
    digest = hashlib.sha256()
    for one in task.instances:
        digest.update(json.dumps(one.doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _run(job: _Job, judge: "Judge", label: str, seed: int) -> Record:
    """Score one task."""
    started = time.perf_counter()
    logger.info("%s: %d items", label, len({one.doc_id for one in job.task.instances}))
    # lm-eval builds the requests again: examples and answers are drawn as if this were the only task
    job.task.set_fewshot_seed(seed=seed)
    _sow(seed)
    judge.watch(_Progress(label, len(job.task.instances)))
    results = evaluator.evaluate(judge, {"tasks": {job.name: job.task}}, limit=job.limit,
                                 bootstrap_iters=BOOTSTRAP_DRAWS, confirm_run_unsafe_code=True)
    metrics, better = results["results"][job.name], results["higher_is_better"].get(job.name, {})
    samples = results["samples"][job.name]
    seconds = time.perf_counter() - started
    logger.info("%s: done in %.1f s", label, seconds)
    return Record(job.name, _task_scores(job.name, metrics, better, samples), metrics, better,
                  str(results["versions"][job.name]), _data_hash(job.task), seconds, _sample_lines(samples))


def _sow(seed: int) -> None:
    """Seed the global generators: the tasks' own code draws from them, some of it when a task is loaded."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _keep(path: Path | None, record: Record) -> None:
    """Write a record, then remove those of the same task that hold something else."""
    if path is None:
        return
    head = record._replace(scores=[score._asdict() for score in record.scores], samples=[])._asdict()
    store.write_text(path, "".join([json.dumps(head, ensure_ascii=False, default=float) + "\n", *record.samples]))
    for stale in path.parent.glob(f"{_file_name(record.task)}-{'[0-9a-f]' * 16}.jsonl"):
        if stale != path:
            stale.unlink(missing_ok=True)


def _read(path: Path | None) -> Record | None:
    if path is None or not path.exists():
        return None
    with path.open(encoding="utf-8", newline="\n") as file:
        head, samples = json.loads(file.readline()), list(file)
    return Record(**head | {"scores": [Score(**score) for score in head["scores"]], "samples": samples})


def _scores(found: Sequence[Record], groups: Mapping[str, Any]) -> list[Score]:
    """Scores of all tasks and of the groups that have some, in name order."""
    paths = _paths(groups)
    made = {kept.task: kept.scores for kept in found}
    if groups:
        better = {metric: value for kept in found for metric, value in kept.higher_is_better.items()}
        whole = aggregate_groups(EvalAcc(metrics={kept.task: kept.metrics for kept in found}, groups=dict(groups)))
        made |= {name: _task_scores(name, whole.metrics[name], better, []) for name in groups}
    return [score._replace(task=paths.get(name, name))
            for name in sorted(made, key=lambda name: paths.get(name, name)) for score in made[name]]


def _task_scores(name: str, values: Mapping[str, Any], better: Mapping[str, bool],
                 samples: Sequence[Mapping[str, Any]]) -> list[Score]:
    """lm-eval's figures of a task or group as scores."""
    found, seen = [], set()
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        # lm-eval's filters extract answers: the first gives the metric, further ones `metric,filter`
        label = metric if metric not in seen else key
        seen.add(metric)
        items = [row[metric] for row in samples if row["filter"] == chosen and metric in row]
        found.append(_score(name, metric, value, values.get(f"{metric}_stderr,{chosen}"), items,
                            int(values["sample_len"]), better.get(metric) is not False)._replace(metric=label))
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
    elif metric == "auc" and items:
        error = benchmarks.auc_stderr(items)
    return Score(task, metric, float(value), error, count, better, unit)


def _paths(groups: Mapping[str, Any]) -> dict[str, str]:
    """For every member of a group, `group/.../task`; names outside groups are not in it."""
    parents = {child: name for name, group in groups.items() for child in group.child_names}

    def path(name: str) -> str:
        return f"{path(parents[name])}/{name}" if name in parents else name

    return {name: path(name) for name in parents}


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _versions(found: Sequence[Record]) -> dict[str, str]:
    """Of packages and tasks, and a hash of each task's items."""
    ordered = sorted(found, key=lambda kept: kept.task)
    return (_packages() | {f"task:{kept.task}": kept.version for kept in ordered}
            | {f"data:{kept.task}": kept.data for kept in ordered})


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
