"""Checks whether a model can be pruned, by its configuration and the names of its files, before any weight is read.

This module imports neither torch nor transformers, so a workflow can quickly check local folders before its first job.
"""
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdp_core.model.families import FAMILIES, family_of, is_known, type_of

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Entries of a configuration that contain the number of experts of a layer."""
TAKE_OUT = ("AutoModelForCausalLM.from_pretrained(path, config=AutoConfig.from_pretrained(path).text_config, "
            "key_mapping={'^language_model.model': 'model', '^model.language_model': 'model'})"
            ".save_pretrained(folder, save_original_format=False)")
"""Python code that saves only the text model of a larger checkpoint, such as Gemma 3. An error message shows this code
to the user."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
"""A folder needs only one of these files for a tokenizer, but vocab.json also needs merges.txt."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files with licence texts, which are copied to every checkpoint that is made from a model."""
PICKLED = "pytorch_model*.bin"
"""Weight files in PyTorch's format from before safetensors; only tensors are read from these files."""


class ModelError(ValueError):
    """The checkpoint cannot be used as a dense model."""


def check_folder(folder: str | Path) -> None:
    """Raise ModelError for a checkpoint folder whose configuration or tokenizer cannot be used; no weight is read."""
    folder = Path(folder)
    check_config(read_config(folder), folder)
    check_tokenizer_files(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of a folder's config.json. Raises ModelError for a file that is missing or holds no entries."""
    described = folder / "config.json"
    if not described.is_file():
        raise ModelError(f"{folder} has no config.json; name the folder that holds config.json, weights and tokenizer")
    try:
        config = json.loads(described.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{described} is not JSON ({error}); get the checkpoint again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{described} names no model_type, so it describes no model; get the checkpoint again")
    return config


def check_config(config: Mapping[str, Any], place: str | Path) -> None:
    """Raise ModelError for an architecture that cannot be pruned, or for quantised weights.

    config: the entries of a config.json; the error message names `place`.
    """
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{place}: {type_of(config)} is an encoder-decoder model; choose a decoder-only one, as "
                         "layers are removed from one stack here")
    text = config.get("text_config") or {}
    entries = {**text, **config}
    if experts := next((name for name in EXPERTS if (entries.get(name) or 0) > 1), ""):
        raise ModelError(f"{place}: {type_of(config)} is a mixture of experts ({experts} is {entries[experts]}), which "
                         "is not supported; choose a dense model")
    if is_known(text) and not is_known(config):
        raise ModelError(f"{place}: {type_of(config)} holds more than text; take its {type_of(text)} model out: "
                         f"{TAKE_OUT}, and copy the tokenizer's files")
    if not is_known(config):
        raise ModelError(f"{place}: family {type_of(config)!r} is not supported; choose one of {', '.join(FAMILIES)}")
    family = family_of(config)
    if wrong := [name for name, value in family.only.items() if config.get(name, value) != value]:
        raise ModelError(f"{place}: {wrong[0]} is {config[wrong[0]]} in this {family.name} model, and only "
                         f"{family.only[wrong[0]]} is supported; choose another model")
    if family.pre_norm and not config.get(family.pre_norm, True):
        raise ModelError(f"{place}: the norms of this {family.name} model follow the sum ({family.pre_norm} is false, "
                         "as in OPT-350M), so it has no residual stream; choose another size")
    if config.get("quantization_config") is not None:
        raise ModelError(f"{place} is quantised; only GGUF is dequantised here, so choose the full-precision "
                         "checkpoint")


def check_tokenizer_files(folder: Path) -> None:
    """Raise ModelError if a folder lacks the files of a tokenizer. The message states the missing files."""
    if (folder / "vocab.json").is_file() and not _any(folder, ["merges.txt", "tokenizer.json"]):
        raise ModelError(f"{folder} has vocab.json and no merges.txt; copy merges.txt, or tokenizer.json, from the "
                         "model's repository into it")
    # a tokenizer may be defined by Python code in the folder
    if not _any(folder, TOKENIZER_FILES) and not any(folder.glob("tokenization*.py")):
        raise ModelError(f"{folder} has no tokenizer.json (nor {', '.join(TOKENIZER_FILES[1:])}); copy tokenizer.json "
                         "and tokenizer_config.json from the model's repository into it")


def licence_of(folder: Path) -> str:
    """The licence that the model card in a checkpoint folder states, such as `apache-2.0`; empty if the card states no
    licence."""
    card = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL) \
        if card.is_file() else None
    named = dict(re.findall(r"^(license|license_name): *[\"']?([\w.+-]+)", head[1], re.MULTILINE)) if head else {}
    # if the licence is `other`, the entry license_name contains the name of the licence
    return named.get("license_name") or named.get("license", "")


def licence_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that state its licence."""
    return sorted(path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file())


def check_weight_files(folder: Path) -> None:
    """Raise ModelError for a folder without weights in a form that this library reads."""
    if not has_weights(folder):
        raise ModelError(f"{folder} has no weights (*.safetensors or {PICKLED}); other forms run code when they are "
                         "read and are refused: convert to safetensors, or use a revision with safetensors")


def has_weights(folder: Path) -> bool:
    """Whether a folder contains weights in a format that this library can read."""
    return any(folder.glob("*.safetensors")) or is_pickled(folder)


def is_pickled(folder: Path) -> bool:
    """Whether a folder contains weights only in PyTorch's older, pickled format."""
    return not any(folder.glob("*.safetensors")) and any(folder.glob(PICKLED))


def _any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)
