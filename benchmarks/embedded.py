"""Fetches, checks and converts the embedded model and its texts for all benchmarks.

This module is not a command. The module reads the entries of the default config.yaml.
"""
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from kdp_core.base import products, store, texts
from kdp_core.base.records import ModelFacts, Tokens
from kdp_core.model import assets, checkpoints

ROOT = Path(__file__).resolve().parents[1]


def set_threads(threads: int) -> None:
    """Use this number of threads, and the library of matrix products that the workflow uses."""
    torch.set_num_threads(threads)
    products.choose()


def default_config() -> dict[str, Any]:
    """The default configuration, which names the embedded model and texts."""
    return yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def fetch(entry: dict[str, Any], config: dict[str, Any]) -> Path:
    """The file or folder that an entry under `models:` or `texts:` names.

    A file that is not in the cache is downloaded.
    """
    return assets.fetch(entry["source"], sha256=entry["sha256"], cache=ROOT / config["cache"])


def dense_model(folder: Path, config: dict[str, Any]) -> tuple[Path, ModelFacts]:
    """The embedded model as a float32 checkpoint in `folder`, and its facts.

    The model is converted only in the first call.
    """
    checkpoint, facts = folder / "dense", folder / "facts.json"
    if not facts.exists():
        entry = next(iter(config["models"].values()))
        store.write(facts, checkpoints.convert(fetch(entry, config), checkpoint, dtype="float32",
                                               source=entry["source"]))
    return checkpoint, store.read(facts)


def documents(name: str, config: dict[str, Any]) -> list[str]:
    """The documents of one of the embedded texts."""
    entry = config["texts"][name]
    return texts.read_documents(fetch(entry, config), format=entry["format"], encoding=entry["encoding"])


def calibration_tokens(dense: Path, config: dict[str, Any], *, sequences: int | None = None,
                       seed: int | None = None, vocabulary: int | None = None) -> Tokens:
    """The sequences of the default calibration set. `sequences` replaces the number of sequences from each text, and
    `seed` replaces the seed of the set.

    Token ids are checked against `vocabulary` if it is given.
    """
    calibration = next(iter(config["calibrations"].values()))
    parts = [texts.Part(name, documents(name, config), count if sequences is None else sequences)
             for name, count in calibration["mix"].items()]
    return texts.pack(checkpoints.load_tokenizer(dense), parts, length=calibration["length"],
                      seed=calibration["seed"] if seed is None else seed, vocabulary=vocabulary)


def log_to_stderr() -> None:
    """Send the messages of the benchmark and the library to stderr; suppress the messages of other packages."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    for name in ("lm_eval", "httpx", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
