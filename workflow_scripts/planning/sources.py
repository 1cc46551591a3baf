"""Checks the sources that the configuration names: their form, and whether local files and folders exist.

The module also computes the sizes of local models. It imports no heavy modules.
"""
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planning import grid
from planning.messages import ConfigError
from planning.schema import ROOT

# the library is imported from the folder next to the Snakefile, whether it is installed or not
sys.path.append(str(ROOT))

from kdp_core.model import intake
from kdp_core.model.families import FamilyError
from kdp_core.model.sizes import learns_positions, params_of, positions_of, shape_of

__all__ = ["FamilyError", "absent", "absent_folders", "check_folders", "check_forms", "learns_positions", "params_of",
           "positions_of", "shape_of", "unfetched"]

OF_THE_OTHER = {"models": ("hf-data", "a model of the hub is hf:org/name@revision"),
                "texts": ("hf", "a text of the hub is hf-data:org/name@revision")}
"""For each section, the form of sources that belongs to the other section, and the form that is meant."""

Named = tuple[str, str]
"""A source by its section and its name there, such as texts and news."""


def check_forms(config: dict[str, Any]) -> None:
    """Raise ConfigError for a source that has none of the accepted forms, or the form of the other section."""
    # imported here, because jobs read the grid and no source
    from kdp_core.model import assets

    for section, (wrong, remedy) in OF_THE_OTHER.items():
        for name, own in config[section].items():
            try:
                parts = assets.parse_parts(own["source"])
            except assets.SourceError as error:
                raise ConfigError(f"config: {section}.{name}: {error}") from None
            if parts[0].kind == wrong:
                raise ConfigError(f"config: {section}.{name}.source is {own['source']!r}; {remedy}")
            _path(config, (section, name))


def check_folders(config: dict[str, Any]) -> None:
    """Raise ConfigError for a model of the grid whose local folder cannot be used.

    Models that are already converted are not checked.
    """
    for name in config["grid"]["models"]:
        folder = _path(config, ("models", name))
        if folder and os.path.isdir(folder) and not _fetched(("models", name)).is_file():
            try:
                intake.check_folder(folder)
            except intake.ModelError as error:
                raise ConfigError(f"config: models.{name}: {error}") from None


def unfetched(config: dict[str, Any]) -> list[Named]:
    """The models and texts of the grid that no job has fetched yet."""
    calibrations = [*config["grid"]["calibrations"], *(point["calib"] for point in grid.points(config))]
    texts = [*(text for name in calibrations for text in config["calibrations"][name]["mix"]),
             config["evaluate"]["text"]]
    named = [*(("models", name) for name in config["grid"]["models"]), *(("texts", name) for name in texts)]
    return [one for one in dict.fromkeys(named) if not _fetched(one).is_file()]


def absent(config: dict[str, Any], named: Iterable[Named]) -> list[str]:
    """A line for each of these sources that is a local path and cannot be read on this machine."""
    return [line for one in named if (line := _absence(config, one))]


def absent_folders(config: dict[str, Any]) -> list[str]:
    """A line for each folder of `evaluate.task_folders` that is not on this machine."""
    return [f"config: evaluate.task_folders names {folder!r}, which is no folder on this machine; correct the path, or "
            "make the folder" for folder in config["evaluate"].get("task_folders", [])
            if not os.path.isdir(folder)]


def _absence(config: dict[str, Any], named: Named) -> str:
    path, (section, name) = _path(config, named), named
    given = f"config: {section}.{name}.source is {config[section][name]['source'].strip()!r}"
    if path is None:
        return ""
    if not os.path.exists(path):
        start = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
        return (f"{given}, and no such file or folder is on this machine{start}; correct the path, or name a source "
                "such as hf:org/name@revision or pypi:package==version/path")
    if section == "texts" and not os.path.isfile(path):
        return f"{given}, which is a folder; name one file"
    if section == "texts" and not os.path.getsize(path):
        return f"{given}, which is an empty file; name a file with text"
    return ""


def _path(config: dict[str, Any], named: Named) -> Path | None:
    """The path of a local source; None for a source of another kind."""
    from kdp_core.model import assets

    section, name = named
    parts = assets.parse_parts(config[section][name]["source"])
    try:
        return Path(parts[0].path).expanduser() if parts[0].kind == "local" else None
    except RuntimeError as error:
        raise ConfigError(f"config: {section}.{name}.source is {config[section][name]['source']!r}: {error}; write "
                          "the whole path") from None


def _fetched(named: Named) -> Path:
    """The file that exists when a source has been fetched."""
    section, name = named
    return Path("results", name, "facts.json") if section == "models" else Path("results", "texts", f"{name}.jsonl")
