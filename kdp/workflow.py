"""Calls two parts of the workflow for the command line: the check of a configuration, and the plan of its grid.

The workflow's planning is part of a checkout, in the folder workflow_scripts next to this package. The workflow is
imported only by commands that need it, so that all other commands run without a checkout.
"""
import sys
from pathlib import Path
from typing import Any

import yaml

from kdp_core.base.records import ModelFacts
from kdp_core.study import planner

ROOT = Path(__file__).resolve().parents[1]


class WorkflowError(ValueError):
    """The command cannot use the workflow: files of the workflow are missing, or a configuration cannot be read."""


def checked(path: Path) -> dict[str, Any]:
    """The checked configuration: the file `path` is merged over config.yaml as Snakemake does. A calibration set with
    several seeds becomes one set for each seed.

    Raises WorkflowError for a file that is not a configuration, and ConfigError for a configuration that cannot be run.
    """
    own = _read(path)
    if not (ROOT / "workflow_scripts").is_dir():
        raise WorkflowError("the workflow is not here; run `python -m kdp` in a checkout of kdp")
    if (scripts := str(ROOT / "workflow_scripts")) not in sys.path:
        sys.path.append(scripts)
    from planning import grid
    from planning.config import check

    found: dict[str, Any] = grid.with_seeds_apart(check(merged(_read(ROOT / "config.yaml"), own)))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read as a configuration ({error.strerror}); name a file, such as the "
                            "one that `kdp init` writes") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkflowError(f"{path} cannot be read as a configuration: {error}; correct it there") from error
    if not isinstance(found, dict):
        raise WorkflowError(f"{path} contains no configuration; `kdp init` writes one")
    return found


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` merged over `base`, key by key at every depth."""
    return base | {key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict)
                   else value for key, value in own.items()}


def plan(path: Path) -> tuple[str, list[str]]:
    """The jobs, hours and disk of a configuration's grid, as the target `plan` of the workflow prints them.

    The second value has a line for each local model or text that is missing on this machine. The jobs may run on
    another machine, so this is no error.
    """
    config = checked(path)
    from planning import resources, sources

    work = resources.workload(config)
    facts = {name: _facts(config, name) for name in dict.fromkeys(point["model"] for point in work["points"])}
    sweep = planner.plan(work, facts, **config.get("plan", {}))
    return planner.table(sweep), sources.absent(config, sources.unfetched(config))


def _facts(config: dict[str, Any], name: str) -> ModelFacts:
    """The sizes of a model. Raises WorkflowError for a local model that is missing, PlanError for another unknown."""
    from planning import sources

    try:
        return planner.facts_of(config["models"][name]["source"], Path("results", name, "dense"))
    except planner.PlanError:
        if lines := sources.absent(config, [("models", name)]):
            raise WorkflowError(lines[0]) from None
        raise
