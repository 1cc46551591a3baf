"""Names of tasks: those that are made of the held-out text, and those of lm-eval, whose index is read once and kept.

lm-eval takes seconds to read its index. It is asked only where a task of its own is named, and its answer is
kept for its version.
"""
import difflib
import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

from planning.evaluation import TASK_FILES
from planning.messages import ConfigError
from planning.schema import ROOT

CACHE = ROOT / ".cache" / "tasks"
ASK = ("import json, lm_eval.tasks, logging; logging.disable(); "
       "print(json.dumps(sorted(lm_eval.tasks.TaskManager().all_tasks)))")


def check_tasks(config: dict[str, Any]) -> None:
    """Raise ConfigError for the first of `evaluate.tasks` that is neither made of held-out text nor lm-eval's."""
    own = {path.stem for path in TASK_FILES.glob("heldout_*.yaml")}
    asked = [name for name in config["evaluate"]["tasks"] if name not in own]
    known = own | set(_of_lm_eval()) if asked else own
    # without an answer of lm-eval the job that scores says what is wrong
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
    """The tasks, groups and tags of the lm-eval that is installed; none where it cannot be asked."""
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
