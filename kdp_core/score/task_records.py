"""Records of scored tasks on disk: the results of one task for one checkpoint, in a JSONL file of their own.

The first line contains the scores, and each further line contains one item (`sample_lines`). The name of a file ends in
a hash of everything on which the scores depend (`key`). So if a record with the right name exists, a new evaluation
would give the same scores. Several evaluations of one checkpoint may share a folder at the same time.
"""
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from kdp_core.base import store
from kdp_core.base.measurements import Score
from kdp_core.model import assets

PACKAGES = ("lm-eval", "torch", "transformers", "datasets", "tokenizers")


ITEM_FIELDS = {"doc_id", "target", "responses", "filter", "doc_hash", "prompt_hash"}
"""Fields of an item's line that are not metrics."""


class Record(NamedTuple):
    """The results of one task, as its file stores them."""
    task: str
    scores: list[Score]
    metrics: dict[str, Any]
    """lm-eval's figures of the task, from which the figures of groups are computed."""
    higher_is_better: dict[str, bool]
    version: str
    data: str
    """Hash of the scored items."""
    seconds: float
    samples: list[str]
    """One line of JSON for each item, as `sample_lines` makes them."""


def path_of(folder: str | Path, task: Any, name: str, settings: Mapping[str, Any]) -> Path:
    """The path of the record of lm-eval's `task`. The requests of the task must have been built. `settings` has the
    same meaning as in `key`."""
    return Path(folder) / f"{_file_name(name)}-{key(task, settings)}.jsonl"


def write(path: Path, record: Record) -> None:
    """Write a record, then remove the other records of the same task."""
    head = record._replace(scores=[score._asdict() for score in record.scores], samples=[])._asdict()
    store.write_text(path, "".join([json.dumps(head, ensure_ascii=False, default=float) + "\n", *record.samples]))
    for stale in path.parent.glob(f"{_file_name(record.task)}-{'[0-9a-f]' * 16}.jsonl"):
        if stale != path:
            stale.unlink(missing_ok=True)


def read(path: Path | None) -> Record | None:
    """The record in a file; None if the file does not exist."""
    if path is None or not path.exists():
        return None
    with path.open(encoding="utf-8", newline="\n") as file:
        head, samples = json.loads(file.readline()), list(file)
    return Record(**head | {"scores": [Score(**score) for score in head["scores"]], "samples": samples})


def item_values(record: Record) -> dict[str, dict[str, Any]]:
    """The value of each item for each metric, for paired tests. If several of lm-eval's filters have a metric, the
    first one is used.

    The name of an item consists of task, number and hash, so an item has the same name for every model. For a
    perplexity, an item's value is (log-likelihood in nats, weight). For AUC, an item's value is (margin in nats,
    label).
    """
    found: dict[str, dict[str, Any]] = {}
    for sample in map(json.loads, record.samples):
        name = f"{record.task}:{sample['doc_id']}:{sample['doc_hash']}"
        for metric in sample.keys() - ITEM_FIELDS:
            found.setdefault(metric, {}).setdefault(name, sample[metric])
    return found


def _file_name(task: str) -> str:
    """A file name that differs for every task, so that `write` never removes the records of another task."""
    return quote(task, safe="")


def key(task: Any, settings: Mapping[str, Any]) -> str:
    """Hash of everything on which a task's scores depend, 16 hexadecimal digits.

    The hash covers the settings (the checkpoint's files, precision, device, batch, code) and the versions of the
    packages. The hash covers the items and every prompt as the model reads it. Items and prompts depend on the data,
    their revision, the limit and the examples. The hash also covers the definition of the task, the source of the
    functions in this definition, and the Python files that the task uses.
    """
    definition = {key: value for key, value in task.dump_config().items()
                  # these fields hold paths of this run, and the contents of the paths are in the items
                  if key not in ("metadata", "dataset_kwargs", "custom_dataset", "include")}
    parts = {"settings": settings, "definition": definition, "version": str(task.VERSION), "files": _sources(task),
             "packages": _packages(), "requests": [[one.request_type, one.arguments] for one in task.instances],
             "items": data_hash(task)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_named).encode()).hexdigest()[:16]


def data_hash(task: Any) -> str:
    """Hash of the scored items, 16 hexadecimal digits. The items are read from the requests of the task."""
    digest = hashlib.sha256()
    for one in task.instances:
        digest.update(json.dumps(one.doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def versions(found: Sequence[Record]) -> dict[str, str]:
    """Versions of the packages and of each task, and a hash of the items of each task."""
    ordered = sorted(found, key=lambda record: record.task)
    return (_packages() | {f"task:{record.task}": record.version for record in ordered}
            | {f"data:{record.task}": record.data for record in ordered})


def sample_lines(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of JSON for each pair of item and filter in lm-eval's samples.

    A line has the fields doc_id, target, responses, filter, the metrics, and hashes of the item and of its prompt.
    """
    return [_line({"doc_id": sample["doc_id"], "target": sample["target"], "responses": sample["filtered_resps"],
                   "filter": sample["filter"], **{metric: sample[metric] for metric in sample["metrics"]},
                   "doc_hash": sample["doc_hash"], "prompt_hash": sample["prompt_hash"]}) for sample in samples]


def _line(fields: dict[str, Any]) -> str:
    """Compact JSON in which NaN and infinities are null; json.dumps would print `NaN` and `Infinity`."""
    text = json.dumps(fields, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False) + "\n"


def _named(value: Any) -> Any:
    """Text for a value that JSON has no form for. Unlike the text that `str` returns, this text does not contain an
    address in memory."""
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', value)}"
    return vars(value) if hasattr(value, "__dict__") else str(value)


def _sources(task: Any) -> dict[str, str]:
    """Hashes of the Python files that a task uses: the file of its class, and all files in the folder of its
    definition."""
    beside = Path(task.config.metadata["config_source"]).parent.glob("*.py")
    files = {Path(inspect.getfile(type(task))), *beside}
    return {file.name: assets.sha256_of(file) for file in sorted(files)}


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
