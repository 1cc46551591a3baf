"""The numbers of a results folder, and how two such folders differ: `python -m tests.workflow.numbers BEFORE AFTER`.

A change that means to leave every number as it is shows so by this command, run on the results of the same
configuration before and after. Left out is what no computation decides: measured times and memory, logs, pictures and
the report's page, and the code that travels with a checkpoint.
"""
import argparse
import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

LEFT_OUT = re.compile(r"(^|/)(logs|benchmarks|resume|scored|scores)/|\.(png|pdf|html|py|tmp)$|snakemake_timestamp"
                      r"|efficiency\.json$")
"""Paths in the results folder that hold no computed number."""
MEASURED = re.compile(
    r"second|latency|speedup|memory|_ms$|_gib$|peak|time|stamp|path|folder|version|commit|sha256|code|^git$|^inputs$")
"""Names of fields that are measured, or that name a place or a version.

The hash of an input is left out too, because it covers the times that are measured in the input.
"""


def numbers(results: Path) -> dict[str, Any]:
    """Every value of a results folder by `file#field`; a tensor gives its shape, sum, sum of sizes, and a hash."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = path.relative_to(results).as_posix()
        if path.is_file() and not LEFT_OUT.search(name):
            found |= {f"{name}#{field}": value for field, value in _read(path)}
    return found


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        yield from _tensors(path)
    elif path.suffix == ".csv":
        yield from _table(path)
    elif path.suffix == ".json" and ".zarr" not in path.as_posix():
        yield from _fields("", json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix not in (".md", ".tex"):
        yield "hash", hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    with safe_open(path, framework="np") as file:
        for name in sorted(file.keys()):
            value = np.asarray(file.get_tensor(name), dtype=np.float64)
            yield f"{name}.shape", str(value.shape)
            yield f"{name}.sum", float(value.sum())
            yield f"{name}.size", float(np.abs(value).sum())
            yield f"{name}.hash", hashlib.sha256(np.ascontiguousarray(file.get_tensor(name)).tobytes()).hexdigest()
        for name, text in sorted((file.metadata() or {}).items()):
            try:
                yield from _fields(name, json.loads(text))
            except json.JSONDecodeError:
                yield from _fields(name, text)


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for place, row in enumerate(csv.DictReader(file)):
            yield from _fields(f"row {place}", row)


def _fields(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, those measured left out; numbers in text are numbers."""
    if MEASURED.search(name.rsplit(".", 1)[-1]):
        return
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _fields(f"{name}.{key}" if name else str(key), part)
    else:
        yield name, _number(value)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def differences(before: dict[str, Any], after: dict[str, Any], relative: float = 0.0) -> list[str]:
    """What two sets of numbers do not share: a line each. Hashes are compared where `relative` is 0 only."""
    lines = [f"only before: {name}" for name in sorted(set(before) - set(after))]
    lines += [f"only after: {name}" for name in sorted(set(after) - set(before))]
    for name in sorted(set(before) & set(after)):
        one, other = before[name], after[name]
        if relative and name.endswith("hash"):
            continue
        if not _same(one, other, relative):
            lines.append(f"{name}: {one} before, {other} after")
    return lines


def _same(one: Any, other: Any, relative: float) -> bool:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    if not numeric:
        return one == other
    return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=relative, abs_tol=relative)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, help="a results folder")
    parser.add_argument("after", type=Path, help="the results folder of the same configuration after the change")
    chosen = parser.parse_args()
    old, new = numbers(chosen.before), numbers(chosen.after)
    found = differences(old, new)
    print("\n".join([*found, f"{len(set(old) & set(new))} values in both folders, {len(found)} differences"]))
    sys.exit(bool(found))
