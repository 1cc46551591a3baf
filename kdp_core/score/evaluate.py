"""Scores of a checkpoint by lm-eval (EleutherAI's evaluation harness), each with its standard error.

`evaluate` loads the tasks, scores them one by one with kdp_core.score.judge, and returns all scores. If a folder of
records is given, the scores of a task are written as soon as the task is scored (kdp_core.score.task_records). An
evaluation that was killed continues with the interrupted task. An evaluation with further tasks scores only these
further tasks. Several evaluations of one checkpoint may share a folder at the same time, if each scores other tasks. An
evaluation of all tasks then reads the scores from the records.
The standard error of a mean is computed by lm-eval in closed form. The standard errors of perplexities and bits per
byte come from the delta method over items, and those of areas under the curve from DeLong's method
(kdp_core.score.standard_errors). The standard errors of all other metrics come from lm-eval's bootstrap.
The network is used only if the data of a task are on a hub.
"""
import contextlib
import difflib
import importlib.metadata
import io
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from kdp_core.base import options, provenance, store
from kdp_core.base.measurements import Scores
from kdp_core.base.options import Count, Natural
from kdp_core.model import assets, checkpoints
from kdp_core.score import benchmark_data, benchmark_scores, benchmarks, metrics, task_records
from kdp_core.score import tasks as heldout_tasks
from kdp_core.score.benchmarks import Chosen, Scorer
from kdp_core.score.fast import FastJudge
from kdp_core.score.judge import Judge, Progress
from kdp_core.score.task_records import Record
from kdp_core.score.task_scores import all_scores, task_scores

logger = logging.getLogger(__name__)

BOOTSTRAP_DRAWS = 1000
"""Number of samples that lm-eval's bootstrap draws, in this process."""
JUDGES: Mapping[str, type[Judge]] = {"fast": FastJudge, "lm_eval": Judge}
CALLED_BY_NAME = (benchmark_data, benchmark_scores, heldout_tasks, metrics)
"""Modules whose functions lm-eval calls by the names in the task files. The modules are imported here, because the hash
of the library's code covers only modules that are imported."""


class EvaluationError(ValueError):
    """An evaluation cannot be run with the given settings."""


class _Job(NamedTuple):
    """One task to score, with its settings."""
    name: str
    task: Any
    limit: int | None
    path: Path | None
    """The path of the task's record, which may not exist yet."""


def evaluate(folder: str | Path, *, tasks: Sequence[str], chosen: Chosen | None = None,
             task_folders: Sequence[str | Path] = (), limit: Count | None = None, fewshot: Natural | None = None,
             scorer: Scorer = "fast", batch_size: Count = 8, max_length: Count | None = None, device: str = "cpu",
             dtype: str = "float32", samples_folder: str | Path | None = None, records_folder: str | Path | None = None,
             kept_only: bool = False, code: str = "", seed: int = 0) -> Scores:
    """Score the checkpoint in `folder`, dense or pruned, on benchmarks and on lm-eval's tasks, groups or tags, given by
    name.

    chosen: benchmarks of kdp_core.score.benchmarks, which are scored in the same run as the tasks.
    task_folders: folders with further task files.
    limit: largest number of items of a task; the first items are used. For benchmarks, `chosen` gives this limit.
    fewshot: number of examples in a prompt, for tasks that do not fix this number. For benchmarks, `chosen` gives this
        number.
    scorer: the code that computes log-likelihoods: kdp_core.score.fast or lm-eval. Both give the same values up to
        rounding. lm-eval generates text in either case.
    batch_size: number of sequences in a forward pass; on CPU the fast scorer chooses this number itself.
    max_length: largest number of tokens of a sequence; None means the largest number that the model allows.
    samples_folder: folder for JSONL files, one for each task. Each line has the id, target, responses and metrics of an
        item.
    records_folder: folder for records, one for each task. A task that has a record is not scored again.
    kept_only: whether scores are only read from records; a missing record then raises EvaluationError.
    code: further data on which the records depend, such as a hash of this library's code.
    seed: seed for drawing examples, and for random numbers in the tasks' code.
    The value and the standard error of a score have the same unit. The standard error is over the items of the task. A
    task within a group is named `group/task`. If every task has a record, the model is not loaded. Before the model is
    loaded, OptionError is raised for a value out of range. EvaluationError is raised for an unknown task, for missing
    data, and for a task that runs programs without permission.
    """
    started = time.perf_counter()
    options.check(evaluate, locals())
    _check_names(tasks, chosen)
    names = [*tasks, *(chosen.tasks if chosen else ())]
    settings = {"dtype": dtype, "device": device.split(":")[0], "scorer": scorer, "batch_size": batch_size,
                "max_length": max_length, "seed": seed, "code": code}
    if records_folder is not None:
        settings["checkpoint"] = assets.sha256_of(folder, without=provenance.ABOUT)
    with _quiet(), benchmarks.task_folder(chosen) as made:
        manager = _task_manager(names, [*made, *map(Path, task_folders)], folder)
        loaded = _load_tasks(manager, names, seed)
        _check_code(loaded["tasks"], chosen)
        _prepare(loaded["tasks"], chosen, fewshot, seed)
        jobs = _jobs(loaded["tasks"], chosen, limit, records_folder, settings)
        if kept_only:
            _check_kept(jobs, records_folder)
        found = _records(jobs, lambda: JUDGES[scorer](checkpoints.load_model(folder, device=device, dtype=dtype),
                                                      checkpoints.load_tokenizer(folder), batch_size=batch_size,
                                                      max_length=max_length), seed)
    scores = all_scores(found, loaded.get("groups") or {})
    if samples_folder is not None:
        for record in found:
            store.write_text(Path(samples_folder) / f"{record.task}.jsonl", "".join(record.samples))
    seconds = sum(record.seconds for record in found)
    logger.info("%d scores of %s in %.1f s", len(scores), folder, time.perf_counter() - started)
    return Scores(scores, seconds, task_records.versions(found))


def requests(folder: str | Path, chosen: Chosen, seed: int = 0) -> Mapping[str, Any]:
    """lm-eval's tasks of the chosen benchmarks. Each task has the requests that `evaluate` sends to the checkpoint."""
    with _quiet(), benchmarks.task_folder(chosen) as made:
        loaded = _load_tasks(_task_manager(chosen.tasks, made, folder), chosen.tasks, seed)["tasks"]
        _prepare(loaded, chosen, None, seed)
        _jobs(loaded, chosen, None, None, {"seed": seed})
    return loaded


def _check_names(tasks: Sequence[str], chosen: Chosen | None) -> None:
    if isinstance(tasks, str) or not (tasks or (chosen and chosen.tasks)):
        raise EvaluationError(f"tasks {tasks!r} is no list of task names; name at least one, such as ['hellaswag']")
    if twice := set(tasks) & set(chosen.tasks if chosen else ()):
        raise EvaluationError(f"{sorted(twice)[0]!r} is named as task and as benchmark; name it once")


def _check_code(tasks: Mapping[str, Any], chosen: Chosen | None) -> None:
    """Raise EvaluationError for tasks of lm-eval or of the user's folders that run programs without permission.

    Benchmarks are checked by `benchmarks.check`.
    """
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not (chosen and chosen.allow_code):
            raise EvaluationError(f"task {name!r} runs programs that the model writes; set evaluate.benchmarks."
                                  "allow_code to true to run it, or leave it out")


def _task_manager(tasks: Sequence[str], folders: list[Path], model_folder: str | Path) -> TaskManager:
    """A task manager of lm-eval that finds all `tasks`.

    lm-eval's index of its own tasks takes seconds to read, so it is read only if the folders lack a task.
    """
    for path in folders:
        if not path.is_dir():
            raise EvaluationError(f"task folder {path} does not exist; make it with kdp_core.score.tasks.write_tasks "
                                  "or correct the path")
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
    """The tasks and groups, together with their data. The random generators are seeded again before each task is
    loaded."""
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
    """Set the number of examples of each task, and the seed with which examples are drawn. As in lm-eval's
    `simple_evaluate`, a task that fixes 0 examples keeps 0."""
    for name, task in tasks.items():
        fixed = task.get_config("num_fewshot")
        if chosen and name in chosen.tasks:
            task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, chosen.fewshot))
        elif fixed is None or (fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)


def _jobs(tasks: Mapping[str, Any], chosen: Chosen | None, limit: int | None, folder: str | Path | None,
          settings: Mapping[str, Any]) -> list[_Job]:
    """All single tasks in order. Each task has its requests, its limit and the path of its record (None without a
    folder)."""
    jobs = []
    for name, task in tasks.items():
        mine = chosen.limits.get(name, chosen.limit) if chosen and name in chosen.tasks else limit
        _sow(settings["seed"])
        task.build_all_requests(limit=mine)
        path = None if folder is None else task_records.path_of(folder, task, name, settings)
        jobs.append(_Job(name, task, mine, path))
    return jobs


def _check_kept(jobs: Sequence[_Job], folder: str | Path | None) -> None:
    for job in jobs:
        if job.path is None or not job.path.exists():
            raise EvaluationError(f"task {job.name!r}: no record in {folder} holds what would be scored now; delete "
                                  "the folder, so that every task is scored again")


def _records(jobs: Sequence[_Job], load: Callable[[], Judge], seed: int) -> list[Record]:
    """The results of all tasks. A task that has a record is not scored; its result is read from the record.

    `load` is called for the first task without a record.
    """
    judge, found = None, []
    for place, job in enumerate(jobs, start=1):
        record = task_records.read(job.path)
        if record is None:
            judge = judge or load()
            record = _run(job, judge, f"{job.name}, task {place} of {len(jobs)}", seed)
            if job.path is not None:
                task_records.write(job.path, record)
        else:
            logger.info("%s, task %d of %d: kept from an earlier run", job.name, place, len(jobs))
        found.append(record)
    return found


def _run(job: _Job, judge: Judge, label: str, seed: int) -> Record:
    """Score one task."""
    started = time.perf_counter()
    logger.info("%s: %d items", label, len({one.doc_id for one in job.task.instances}))
    # lm-eval builds the requests again, and examples and answers are drawn as if this were the only task
    job.task.set_fewshot_seed(seed=seed)
    _sow(seed)
    judge.watch(Progress(label, len(job.task.instances)))
    results = evaluator.evaluate(judge, {"tasks": {job.name: job.task}}, limit=job.limit,
                                 bootstrap_iters=BOOTSTRAP_DRAWS, confirm_run_unsafe_code=True)
    metrics, better = results["results"][job.name], results["higher_is_better"].get(job.name, {})
    samples = results["samples"][job.name]
    seconds = time.perf_counter() - started
    logger.info("%s: done in %.1f s", label, seconds)
    return Record(job.name, task_scores(job.name, metrics, better, samples), metrics, better,
                  str(results["versions"][job.name]), task_records.data_hash(job.task), seconds,
                  task_records.sample_lines(samples))


def _sow(seed: int) -> None:
    """Seed the global generators.

    The code of some tasks draws random numbers from the global generators, in some cases already while the task is
    loaded.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


class _Lines(io.TextIOBase):
    """A text stream that logs each line at DEBUG. Each update of a progress bar counts as a line."""

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(None, map(str.strip, lines)):
            logger.debug("%s", line)
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the output of lm-eval and transformers to the log. If there is no terminal, the progress bars are sent to
    the log as well.

    lm-eval's bootstrap runs in this process, because each process of lm-eval's pool would load all libraries again.
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
