"""Records on disk: a record with tensors is a safetensors file, and a record without tensors is a JSON file.

A tensor field of a record becomes a tensor of the file. All other fields are stored as JSON in the file's metadata,
under one key, so that the same record always gives the same bytes. With several metadata keys the bytes could differ,
because safetensors does not write the keys in a fixed order. Every file is written under a temporary name in the same
folder and then renamed. If a process is killed, the old file therefore stays unchanged; if there was no old file, no
new file appears. The temporary file of a killed process may remain. Names of temporary files begin with a dot and end
in .tmp. You may delete a temporary file that remains.

torch is imported only in functions that read or write a tensor, because the code for tables and pages does not need
torch.
"""
from __future__ import annotations

import glob
import json
import math
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from kdp_core.base import measurements, records

if TYPE_CHECKING:
    from torch import Tensor

KEY = "kdp"
"""Metadata key of a record in a safetensors file."""
PAIRS = {"block", "context", "blocks", "drop", "parts"}
"""Names of the fields that contain blocks or (layer, part) pairs, which are tuples in memory and lists in JSON."""
RECORDS = {name: kind for module in (records, measurements) for name, kind in vars(module).items()
           if hasattr(kind, "_fields")}
"""The types of records by name."""


class StoreError(ValueError):
    """A file does not contain a readable record, or a record cannot be written to a file."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A context that gives a temporary path next to `path`. The code in the `with` block writes a file or folder to the
    temporary path. If this code raises no error, the file or folder is renamed to `path`.

    If `path` is an existing folder, the old folder is first renamed and then deleted. On NFS, a deleted file stays in
    its folder as long as a process has the file open, so the folder cannot be deleted at once. If `path` is a link to a
    folder, that folder is replaced and the link stays.
    """
    path = Path(path)
    if path.is_symlink() and path.is_dir():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary, old = _temporary(path), _temporary(path)
    try:
        yield temporary
        if path.is_dir():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        for left in (temporary, old):
            _delete(left)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def _delete(path: Path) -> None:
    """Delete a temporary file or folder. If the deletion fails, the hidden file or folder remains, and a later write to
    the same path deletes it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sweep(path: Path) -> None:
    """Delete the temporary files for `path` that killed processes of this machine did not delete."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(socket.gethostname())}-*-*.tmp"):
        pid = int(stale.name.rsplit("-", 2)[1])
        if not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            _delete(stale)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented by two spaces; NaN and infinity become null, because JSON has no such numbers."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write(path: str | Path, record: NamedTuple) -> None:
    """Write a record of base.records or base.measurements atomically. A .json file can store a record without tensors;
    a .safetensors file can store every record.

    Raises StoreError for any other suffix, and for a record with tensors if the suffix is .json.
    """
    tensors, plain = _split(record._asdict())
    head = {"record": type(record).__name__, "fields": _plain(plain)}
    if Path(path).suffix not in (".json", ".safetensors"):
        raise StoreError(f"{path}: a record is stored as .json or .safetensors; change the suffix")
    if Path(path).suffix == ".json":
        if tensors:
            raise StoreError(f"{path}: {head['record']} holds tensors ({', '.join(sorted(tensors))}); use .safetensors")
        write_json(path, head)
        return
    _save(path, tensors, json.dumps(head, ensure_ascii=False, allow_nan=False))


def read(path: str | Path) -> Any:
    """Read a record that `write` wrote. Raises StoreError if the file contains no record of this version."""
    try:
        if Path(path).suffix == ".json":
            return _join(path, read_json(path), {})
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if head else {}
        return _join(path, head, tensors)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run again") from error


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain values as safetensors. All bits of the numbers are kept."""
    tensors, plain = _split(state)
    _save(path, tensors, json.dumps(plain))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a state that `write_state` wrote; tuples are read as lists. Raises StoreError for any other file."""
    with safe_open(path, framework="pt") as file:
        plain = json.loads((file.metadata() or {}).get(KEY, "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if not isinstance(plain, dict):
        raise StoreError(f"{path} is no training state of kdp: another program wrote it; delete it and run again")
    return _fill(path, plain, tensors)


def remove(path: str | Path) -> None:
    """Delete a file if it exists. Also delete the temporary files that killed processes left when they wrote this
    file."""
    path = Path(path)
    for left in (path, *path.parent.glob(f".{glob.escape(path.name)}.*.tmp")):
        left.unlink(missing_ok=True)


def _save(path: str | Path, tensors: dict[str, Tensor], head: str) -> None:
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file(_apart(tensors), temporary, metadata={KEY: head})


def _is_tensor(value: Any) -> bool:
    # if torch is not imported, no value can be a tensor
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, sorted by name. If a tensor shares its storage with an earlier tensor, the later tensor is
    copied."""
    import torch

    seen: set[int] = set()
    made = {}
    for name, tensor in sorted(tensors.items()):
        storage = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    return made


def _split(fields: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Two results: all tensors by their dotted path, and the fields. In the fields, {"tensor": path} takes the place of
    each tensor."""
    if _is_tensor(fields):
        return {prefix: fields.detach().cpu()}, {"tensor": prefix}
    if hasattr(fields, "_asdict"):
        fields = {"record": type(fields).__name__, **fields._asdict()}
    if isinstance(fields, dict):
        parts = {str(key): _split(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in fields.items()}
        found = {name: tensor for tensors, _ in parts.values() for name, tensor in tensors.items()}
        return found, {key: rest for key, (_, rest) in parts.items()}
    if isinstance(fields, list | tuple):
        items = [_split(value, f"{prefix}.{index}") for index, value in enumerate(fields)]
        return {n: t for tensors, _ in items for n, t in tensors.items()}, [rest for _, rest in items]
    return {}, fields


def _fill(path: str | Path, value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`. Returns the fields, in which all tensors, records and blocks are restored."""
    if isinstance(value, list):
        return [_fill(path, item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"} and value["tensor"] in tensors:
        return tensors[value["tensor"]]
    filled = {key: _fill(path, item, tensors) for key, item in value.items()}
    for key in PAIRS & set(filled):
        filled[key] = _tuples(filled[key])
    name = value.get("record")
    return _build(path, name, filled) if isinstance(name, str) and name in RECORDS else filled


def _tuples(value: Any) -> Any:
    """Convert pairs that begin with a layer number from lists back into tuples, because JSON has only lists. `value` is
    one pair or a list of pairs."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], int):
        return tuple(value)
    return [_tuples(item) for item in value] if isinstance(value, list) else value


def _build(path: str | Path, name: str, fields: dict[str, Any]) -> Any:
    fields = {key: value for key, value in fields.items() if key != "record"}
    # a field with a default was added later, so older records lack it
    if not set(fields) <= set(RECORDS[name]._fields) <= set(fields) | set(RECORDS[name]._field_defaults):
        raise StoreError(f"{path}: the fields of {name} differ from those of this version; delete it and run again")
    return RECORDS[name](**fields)


def _join(path: str | Path, head: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(head, dict) or not {"record", "fields"} <= set(head) or not isinstance(head["fields"], dict):
        raise StoreError(f"{path} is no record of kdp: another program wrote it; delete it and run again")
    if not isinstance(head["record"], str) or head["record"] not in RECORDS:
        raise StoreError(f"{path} holds the unknown record {head['record']!r} of another version; "
                         "delete it and run again")
    return _build(path, head["record"], _fill(path, head["fields"], tensors))


def _plain(value: Any) -> Any:
    """The value in a form that JSON can store: NumPy and torch numbers become Python numbers, and infinity and NaN
    become None."""
    if hasattr(value, "_asdict"):
        return {"record": type(value).__name__, **_plain(value._asdict())}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if _is_tensor(value) or type(value).__module__ == "numpy":
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
