"""Where a result comes from: versions of packages, state of the code, hashes of inputs, and sources without user paths.

In a checkpoint, the file MADE contains these versions, states, hashes and sources. The files MADE and CARD (the model
card) say how the checkpoint was made and which scores it has. No weight, token or score depends on MADE or CARD, so the
hash of a checkpoint does not cover these files (`ABOUT`).
"""
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
MADE = "kdp.json"
ABOUT = (CARD, MADE)
"""The files of a checkpoint that only describe it."""
PACKAGES = ("kdp", "torch", "transformers", "safetensors", "tokenizers", "numpy", "lm_eval")
"""The packages that results depend on."""
ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("/", "~", "\\", "./", "../")
"""A source that begins with one of these strings is a local path."""


def here() -> dict[str, Any]:
    """The versions of packages in this process, and the git commit of the code that it runs."""
    return {"versions": versions(), "git": git_state()}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of the given packages. Packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path = ROOT) -> dict[str, Any] | None:
    """The git commit of the code, and whether tracked files differ from this commit; None without a git checkout."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True,
                          timeout=30).stdout


def hashes(files: Mapping[str, str | Path]) -> dict[str, str]:
    """The SHA-256 of each file, under the name that `files` gives to the file."""
    found = {}
    for name, path in files.items():
        with Path(path).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def without_place(source: str) -> str:
    """A source as the configuration names it. If the source is a local path, only the last part of the path is kept, so
    that the result does not show the user's name."""
    return Path(source.replace("\\", "/")).name if source.startswith(LOCAL) or source[1:3] == ":\\" else source


def without_places(value: Any) -> Any:
    """A copy of a configuration, with `without_place` applied to every string."""
    if isinstance(value, Mapping):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    return without_place(value) if isinstance(value, str) else value
