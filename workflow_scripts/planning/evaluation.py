"""The section `evaluate` of the configuration: tasks, benchmarks and their files."""
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from planning.schema import ROOT, schema

TASK_FILES = ROOT / "kdp_core" / "score" / "task_files"


def evaluated(config: dict[str, Any]) -> list[str]:
    """The tasks of an evaluation by their names in the configuration; a group of lm-eval is one of them."""
    return [*config["evaluate"]["tasks"], *config["evaluate"].get("benchmarks", {}).get("tasks", [])]


def one_task(evaluate: dict[str, Any], name: str) -> dict[str, Any]:
    """The section `evaluate` with a single task; what it says about other tasks is removed."""
    made = evaluate | {"tasks": [task for task in evaluate["tasks"] if task == name]}
    if chosen := evaluate.get("benchmarks"):
        limits = {task: limit for task, limit in chosen.get("limits", {}).items() if task == name}
        made["benchmarks"] = chosen | {"tasks": [task for task in chosen.get("tasks", []) if task == name],
                                       "limits": limits}
    return made


def benchmark_files(evaluate: dict[str, Any]) -> list[str]:
    """The local data files of the chosen benchmarks and of their examples; none if the data come from the hub."""
    chosen = evaluate.get("benchmarks", {})
    if chosen.get("data", "hub") == "hub":
        return []
    found = []
    for benchmark in (schema()["x-benchmarks"][name] for name in chosen.get("tasks", [])):
        shots = benchmark["fewshot"] if benchmark["fixed"] else chosen.get("fewshot", benchmark["fewshot"])
        found += [benchmark["local"], *([benchmark["shots"]] if benchmark["shots"] and shots else [])]
    return [str(Path(chosen["data"]) / file) for file in found]


def choices(config: dict[str, Any]) -> dict[str, Any]:
    """The benchmarks that `choices` reads: the first of the items that are scored, at most `limit` of a task."""
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
    """Hash of the files that define tasks; no script imports them."""
    files = sorted(path for path in TASK_FILES.iterdir() if path.suffix in (".yaml", ".py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
