"""Scores of a checkpoint by lm-eval (EleutherAI's evaluation harness), each with its standard error.

`evaluate` loads the tasks, scores them one by one with kdp_core.score.judge, and returns the scores of all.
With a folder of records the scores of a task are kept as soon as it is done: an evaluation that was killed continues
with the task that it was in, and one that is asked for more scores what is new (kdp_core.score.task_records). Several
evaluations of one checkpoint, each of some of the tasks, may share a folder at the same time; an evaluation of all
tasks then takes what they kept.
Standard errors: means have lm-eval's closed form. Perplexities and bits per byte have the delta method over items, and
areas under the curve have DeLong's (kdp_core.score.standard_errors). Anything else has lm-eval's bootstrap.
The network is not used unless a task's own data are on a hub.
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

from kdp_core.base import options, store
from kdp_core.base.measurements import Scores
from kdp_core.base.options import Count, Natural
from kdp_core.model import assets, checkpoints
from kdp_core.score import benchmark_data, benchmark_scores, benchmarks, metrics, task_records
from kdp_core.score import tasks as heldout_tasks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.judge import Judge, Progress
from kdp_core.score.task_records import Record
from kdp_core.score.task_scores import all_scores, task_scores

logger = logging.getLogger(__name__)

BOOTSTRAP_DRAWS = 1000
"""Draws of lm-eval's bootstrap, in this process."""
CALLED_BY_NAME = (benchmark_data, benchmark_scores, heldout_tasks, metrics)
"""Modules whose functions lm-eval calls by the names in the task files. They are imported here so that the hash of the
library's code, which follows imports, covers them."""


class EvaluationError(ValueError):
    """An evaluation cannot be run as it was asked for."""


class _Job(NamedTuple):
    """One task of an evaluation."""
    name: str
    task: Any
    limit: int | None
    path: Path | None
    """Where its record is or will be."""


def evaluate(folder: str | Path, *, tasks: Sequence[str], chosen: Chosen | None = None,
             task_folders: Sequence[str | Path] = (), limit: Count | None = None, fewshot: Natural | None = None,
             batch_size: Count = 8, max_length: Count | None = None, device: str = "cpu", dtype: str = "float32",
             samples_folder: str | Path | None = None, records_folder: str | Path | None = None,
             kept_only: bool = False, code: str = "", seed: int = 0) -> Scores:
    """Score the checkpoint in `folder`, dense or pruned, on lm-eval tasks, groups or tags by name, and on benchmarks.

    chosen: benchmarks of kdp_core.score.benchmarks, scored beside the others in one load of the model.
    task_folders: folders with further task files.
    limit: most items of a task, the first ones; benchmarks have a limit of their own.
    fewshot: examples in a prompt, for tasks that do not fix the number; benchmarks have their own.
    batch_size: sequences of a forward pass.
    max_length: most tokens of a sequence, if fewer than the model's own.
    samples_folder: gets a JSONL file for each task, with a line an item: id, target, responses, metrics.
    records_folder: keeps what each task gave; a record that holds what would be scored again is taken as it is.
    kept_only: take records alone, without the model; a missing record raises EvaluationError.
    code: what else the records depend on, such as a hash of this library's code.
    seed: of the draws of examples, and of those that the tasks' own code makes.
    A score's value and standard error are in its unit, with the standard error over the task's items. A task within a
    group is named `group/task`. If every record is there, the model is not loaded. Before the model is loaded,
    OptionError is raised for a value that is out of range, and EvaluationError for an unknown task, missing data, or a
    task that runs programs without leave.
    """
    started = time.perf_counter()
    options.check(evaluate, locals())
    _check_names(tasks, chosen)
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
        found = _records(jobs, lambda: Judge(checkpoints.load_model(folder, device=device, dtype=dtype),
                                             checkpoints.load_tokenizer(folder), batch_size=batch_size,
                                             max_length=max_length), seed)
    scores = all_scores(found, loaded.get("groups") or {})
    if samples_folder is not None:
        for record in found:
            store.write_text(Path(samples_folder) / f"{record.task}.jsonl", "".join(record.samples))
    seconds = sum(record.seconds for record in found)
    logger.info("%d scores of %s in %.1f s", len(scores), folder, time.perf_counter() - started)
    return Scores(scores, seconds, task_records.versions(found))


def _check_names(tasks: Sequence[str], chosen: Chosen | None) -> None:
    if isinstance(tasks, str) or not (tasks or (chosen and chosen.tasks)):
        raise EvaluationError(f"tasks {tasks!r} is no list of task names; name at least one, such as ['hellaswag']")
    if twice := set(tasks) & set(chosen.tasks if chosen else ()):
        raise EvaluationError(f"{sorted(twice)[0]!r} is named as task and as benchmark; name it once")


def _check_code(tasks: Mapping[str, Any], chosen: Chosen | None) -> None:
    """Refuse tasks of lm-eval or of the user's folders that run programs, as benchmarks that do are refused."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not (chosen and chosen.allow_code):
            raise EvaluationError(f"task {name!r} runs programs that the model writes; set evaluate.benchmarks."
                                  "allow_code to true to run it, or leave it out")


def _task_manager(tasks: Sequence[str], folders: list[Path], model_folder: str | Path) -> TaskManager:
    """A manager that knows all `tasks`; lm-eval's own index takes seconds and is read only for tasks of no folder."""
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
    """The tasks and groups with their data, which lm-eval reads here; each task is read as if it were the only one."""
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
    """Set the number of examples as lm-eval's `simple_evaluate` does (a task that fixes 0 keeps it), and their seed."""
    for name, task in tasks.items():
        fixed = task.get_config("num_fewshot")
        if chosen and name in chosen.tasks:
            task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, chosen.fewshot))
        elif fixed is None or (fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)


def _jobs(tasks: Mapping[str, Any], chosen: Chosen | None, limit: int | None, folder: str | Path | None,
          settings: Mapping[str, Any]) -> list[_Job]:
    """All single tasks in order, each with its requests, its limit and the place of its record (None: no folder)."""
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
    """What each task gave, from its record where there is one; `load` is called once, for the first task without."""
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
    # lm-eval builds the requests again: examples and answers are drawn as if this were the only task
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
    """Seed the global generators, from which the tasks' own code draws, partly when a task is loaded."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


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
