"""The section `evaluate` of the configuration: tasks, benchmarks and their files.

lm-eval takes seconds to read its index of tasks. This index is read only if the configuration names a task of lm-eval.
The list of lm-eval's tasks is then stored for the installed version of lm-eval.
"""
import difflib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from planning.messages import ConfigError
from planning.schema import ROOT, schema

TASK_FILES = ROOT / "kdp_core" / "score" / "task_files"
CACHE = ROOT / ".cache" / "tasks"
ASK = ("import json, lm_eval.tasks, logging; logging.disable(); "
       "print(json.dumps(sorted(lm_eval.tasks.TaskManager().all_tasks)))")


def evaluated(config: dict[str, Any]) -> list[str]:
    """The tasks of an evaluation by their names in the configuration; a group of lm-eval counts as one task."""
    return [*config["evaluate"]["tasks"], *config["evaluate"].get("benchmarks", {}).get("tasks", [])]


def one_task(evaluate: dict[str, Any], name: str) -> dict[str, Any]:
    """The section `evaluate` with a single task; the settings of other tasks are removed."""
    made = evaluate | {"tasks": [task for task in evaluate["tasks"] if task == name]}
    if chosen := evaluate.get("benchmarks"):
        limits = {task: limit for task, limit in chosen.get("limits", {}).items() if task == name}
        made["benchmarks"] = chosen | {"tasks": [task for task in chosen.get("tasks", []) if task == name],
                                       "limits": limits}
    return made


def benchmark_files(evaluate: dict[str, Any]) -> list[str]:
    """The local data files of the chosen benchmarks and of the examples in their prompts.

    The list of files is empty if the data come from the hub.
    """
    chosen = evaluate.get("benchmarks", {})
    if chosen.get("data", "hub") == "hub":
        return []
    found = []
    for benchmark in (schema()["x-benchmarks"][name] for name in chosen.get("tasks", [])):
        shots = benchmark["fewshot"] if benchmark["fixed"] else chosen.get("fewshot", benchmark["fewshot"])
        found += [benchmark["local"], *([benchmark["shots"]] if benchmark["shots"] and shots else [])]
    return [str(Path(chosen["data"]) / file) for file in found]


def choices(config: dict[str, Any]) -> dict[str, Any]:
    """The section `evaluate.benchmarks`, reduced to the tasks of the section `choices`.

    Of each task, only the first `limit` of the scored items remain.
    """
    if "choices" not in config:
        return {}
    scored, own = config["evaluate"]["benchmarks"], config["choices"]
    found = {}
    for name in own["tasks"]:
        known = [own.get("limit"), scored.get("limits", {}).get(name, scored.get("limit"))]
        found |= {name: min(filter(None, known))} if any(known) else {}
    return {key: one for key, one in scored.items() if key != "limit"} | {"tasks": own["tasks"], "limits": found}


@cache
def task_files() -> str:
    """Hash of the files that define tasks; no script imports these files."""
    files = sorted(path for path in TASK_FILES.iterdir() if path.suffix in (".yaml", ".py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def check_tasks(config: dict[str, Any]) -> None:
    """Raise ConfigError for the first name in `evaluate.tasks` that neither kdp nor lm-eval defines."""
    # the names of the tasks of held-out text, and the tag of these tasks
    own = {"heldout", *(path.stem for path in TASK_FILES.glob("heldout_*.yaml"))}
    # folders of the user may define any task, so only the job that scores can check the name
    asked = [name for name in config["evaluate"]["tasks"]
             if name not in own and not config["evaluate"].get("task_folders")]
    known = own | set(_of_lm_eval()) if asked else own
    # if lm-eval cannot list its tasks, the job that scores prints the error
    if known == own:
        return
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(f"config: evaluate.tasks names {name!r}, which neither kdp nor lm-eval "
                              f"{importlib.metadata.version('lm_eval')} knows; " + (
                                  f"did you mean {' or '.join(map(repr, near))}?" if near else
                                  "name a task of lm-eval"))


def _of_lm_eval() -> list[str]:
    """The tasks, groups and tags of the installed lm-eval; empty if lm-eval cannot list them."""
    try:
        file = CACHE / f"{importlib.metadata.version('lm_eval')}.json"
    except importlib.metadata.PackageNotFoundError:
        return []
    if not file.is_file():
        done = subprocess.run([sys.executable, "-c", ASK], text=True, capture_output=True, check=False)
        if done.returncode:
            return []
        CACHE.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}.tmp")
        made.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
        os.replace(made, file)
    found: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return found
