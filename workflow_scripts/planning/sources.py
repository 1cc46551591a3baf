"""Checks models in local folders before any job, and computes the sizes of these models.

This module imports no heavy modules.
"""
import sys
from pathlib import Path
from typing import Any

from planning.messages import ConfigError
from planning.schema import ROOT

# the library is imported from the folder next to the Snakefile, whether it is installed or not
sys.path.append(str(ROOT))

from kdp_core.model import intake
from kdp_core.model.families import FamilyError
from kdp_core.model.sizes import learns_positions, params_of, positions_of, shape_of

__all__ = ["FamilyError", "check_folders", "learns_positions", "params_of", "positions_of", "shape_of"]


def check_folders(config: dict[str, Any]) -> None:
    """Raise ConfigError for a model of the grid whose local folder cannot be used.

    Models that are already converted are not checked.
    """
    for name in config["grid"]["models"]:
        try:
            folder = Path(config["models"][name]["source"].strip()).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"config: models.{name}.source is {config['models'][name]['source']!r}: {error}; write "
                              "the whole path") from None
        if folder.is_dir() and not Path(f"results/{name}/facts.json").is_file():
            try:
                intake.check_folder(folder)
            except intake.ModelError as error:
                raise ConfigError(f"config: models.{name}: {error}") from None
