"""Converts lm-eval's figures of tasks and groups to scores with units and standard errors.

Most standard errors are computed by lm-eval: the closed form of a mean, or a bootstrap. The errors of perplexities,
bits per byte and areas under the curve come from kdp_core.score.standard_errors, over the items.
"""
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

from kdp_core.base.measurements import Score
from kdp_core.score import standard_errors
from kdp_core.score.metrics import PERPLEXITIES, PPL_CEILING, unit_of
from kdp_core.score.task_records import Record

logger = logging.getLogger(__name__)


def all_scores(found: Sequence[Record], groups: Mapping[str, Any]) -> list[Score]:
    """Scores of all tasks, and of all groups that have scores, sorted by name.

    The name of a member of a group is `group/task`.
    """
    paths = _paths(groups)
    made = {record.task: record.scores for record in found}
    if groups:
        better = {metric: value for record in found for metric, value in record.higher_is_better.items()}
        whole = aggregate_groups(EvalAcc(metrics={record.task: record.metrics for record in found},
                                         groups=dict(groups)))
        made |= {name: task_scores(name, whole.metrics[name], better, []) for name in groups}
    return [score._replace(task=paths.get(name, name))
            for name in sorted(made, key=lambda name: paths.get(name, name)) for score in made[name]]


def task_scores(name: str, values: Mapping[str, Any], better: Mapping[str, bool],
                samples: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The scores of a task or group. `values` has lm-eval's figures with the keys `metric,filter`; `samples` has the
    items."""
    found, seen = [], set()
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        # lm-eval's filters extract answers: the first filter gives `metric`, further filters give `metric,filter`
        label = metric if metric not in seen else key
        seen.add(metric)
        items = [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]
        found.append(_score(name, metric, value, values.get(f"{metric}_stderr,{chosen}"), items,
                            int(values["sample_len"]), better.get(metric) is not False)._replace(metric=label))
    return found


def _score(task: str, metric: str, value: float, stderr: Any, items: list[Any], count: int, better: bool) -> Score:
    error = float(stderr) if isinstance(stderr, float | int) else None
    if metric in PERPLEXITIES:
        error = standard_errors.perplexity(items) if items else None
        if not value <= PPL_CEILING:  # this is also true for NaN
            logger.warning("%s: %s is %s, recorded as %g", task, metric, value, PPL_CEILING)
            value, error = PPL_CEILING, None
    elif metric == "bits_per_byte":
        nats = standard_errors.nats(items) if items else None
        error = None if nats is None else nats / math.log(2)
    elif metric == "auc" and items:
        error = standard_errors.auc(items)
    return Score(task, metric, float(value), error, count, better, unit_of(metric))


def _paths(groups: Mapping[str, Any]) -> dict[str, str]:
    """The name `group/.../task` of every member of a group. Tasks outside groups are left out."""
    parents = {child: name for name, group in groups.items() for child in group.child_names}

    def path(name: str) -> str:
        return f"{path(parents[name])}/{name}" if name in parents else name

    return {name: path(name) for name in parents}
