"""The JSON schema of the configuration. Planning also reads the facts about the methods from the schema.

The schema is computed from the signatures of the library and is not committed. The first call after an edit of the
library builds the schema in a process of its own (signatures.py), which takes seconds. The file of the schema is stored
in .cache/schema/ and named by the hash of its sources; later calls read this file. `python
workflow_scripts/planning/schema.py` prints the schema, for example for an editor.
"""
import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "schema"
BESIDE = ("results",)
"""Folders of kdp_core on which the schema does not depend."""
KEPT = 8
"""Number of schemas that are kept in the cache; the newest schemas are kept."""


class SchemaError(RuntimeError):
    """The schema could not be built.

    The message of this error ends with the last lines that the building process printed.
    """


@cache
def schema() -> dict[str, Any]:
    """The schema of the whole configuration, of each method's options (`methods`), and of fine-tuning (`finetune`)."""
    return json.loads(schema_file().read_text(encoding="utf-8"))


def schema_file() -> Path:
    """The path of the schema's file in the cache. A missing file is built first. Raises SchemaError."""
    file = FOLDER / f"{sources()}.json"
    if not file.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        # several processes may build at the same time: each writes a file of its own, and the last renamed file remains
        made = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            _build(made)
            os.replace(made, file)
        finally:
            made.unlink(missing_ok=True)
        _remove_old()
    return file


def sources() -> str:
    """Hash of all files on which the schema may depend."""
    core = ROOT / "kdp_core"
    files = [path for path in sorted(core.rglob("*.py")) if path.relative_to(core).parts[0] not in BESIDE]
    files += [ROOT / "workflow_scripts" / "planning" / name for name in ("sections.py", "signatures.py")]
    made = hashlib.sha256()
    for path in files:
        made.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return made.hexdigest()[:16]


def _build(file: Path) -> None:
    paths = [str(ROOT), str(ROOT / "workflow_scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([sys.executable, "-m", "planning.signatures", str(file)], text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise SchemaError(f"the schema of the configuration could not be built with {sys.executable}; run `python "
                          f"workflow_scripts/planning/schema.py` with a Python that has the packages of kdp_core. "
                          f"It printed:\n{done.stdout[-2000:]}")


def _remove_old() -> None:
    files = sorted(FOLDER.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdout.write(schema_file().read_text(encoding="utf-8"))
