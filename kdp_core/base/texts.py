"""Documents, calibration mixes and packed sequences.

Packing: documents joined by a separator, tokenised without special tokens, cut into windows of equal length. There is
no padding and no token at the start of a window, so a window's first token takes the part of the attention sink.
A mix takes a fixed number of windows from each part, as the KDP paper (section 3.1) takes 500 samples from each of its
data sets with at most 128 tokens; it does not say whether samples are packed, cut or padded. Here they are packed.
Orders come from (seed, name of the part) through SHA-256: adding a part leaves the others' windows as they were.
"""
import hashlib
import json
import logging
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.records import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMATS = ("lines", "text", "jsonl")
MARGIN = 64
"""Tokens beyond those needed: cutting a text changes tokens only near the cut, and these are thrown away."""
CHARACTERS_PER_TOKEN = 6
"""First guess of the text needed, above the 4 to 5 of English; a wrong guess costs a second tokenisation."""


_SLOT = re.compile(r"\{(\w+)\}")


class TextError(ValueError):
    """A text cannot be read, or does not give the sequences asked for."""


class Part(NamedTuple):
    """One text of a mix."""
    name: str
    documents: list[str]
    sequences: int
    """Windows to take."""


def read_documents(path: str | Path, *, format: str, encoding: str = "utf-8", field: str = "text") -> list[str]:
    """Documents of a file, in its order; empty ones are left out.

    `lines`: every line is a document; `text`: the file is one; `jsonl`: `field` of the object on every line, or a
    template of several fields such as `{question} {answer}`. Raises TextError naming the file and line where it cannot.
    """
    if format not in FORMATS:
        raise TextError(f"format {format!r} of {path} is unknown; choose one of {', '.join(FORMATS)}")
    try:
        text = Path(path).read_text(encoding=encoding)
    except (OSError, LookupError) as error:
        raise TextError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not {encoding} ({error.reason} at byte {error.start}); "
                        "set the text's encoding, such as latin-1") from error
    # not splitlines(): it also cuts at \x85 and \u2028, which are characters of a line here
    rows = [text] if format == "text" else text.split("\n")
    if format == "jsonl":
        rows = [_field(row, field, f"{path}, line {n}") for n, row in enumerate(rows, start=1) if row.strip()]
    return _not_empty(rows, str(path))


def read_hub_documents(name: str, *, revision: str, config: str | None, split: str, field: str,
                       cache: str | Path | None = None, limit: int | None = None) -> list[str]:
    """The first `limit` documents (None: all) of a hub data set, streamed in its own order; empty ones are left out.

    `config` is the data set's configuration, such as `wikitext-2-raw-v1`; `field` as in `read_documents`. Raises
    TextError.
    """
    import datasets  # takes seconds to import, and only hub texts need it
    where = f"hf-data:{name}@{revision}, split {split}"
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True,
                                     cache_dir=None if cache is None else str(cache))
        taken = [_pick(row, field, f"{where}, row {n}") for n, row in enumerate(islice(rows, limit))]
    except TextError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise TextError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}; check name, configuration, "
                        "split and network, or name a local file") from error
    return _not_empty(taken, where)


def pack(tokenizer: "PreTrainedTokenizerBase", parts: list[Part], *, length: int, seed: int, separator: str = "\n",
         vocabulary: int | None = None) -> Tokens:
    """A calibration mix: `part.sequences` windows of `length` tokens from every part, shuffled together.

    The documents of a part are shuffled, joined by `separator`, and give their first windows. `vocabulary` is the
    number of embedding rows that all ids must fit. Raises TextError where a part is too short or ids do not fit.
    """
    _check_parts(parts, length)
    ids, sources = [], []
    for part in parts:
        order = torch.randperm(len(part.documents), generator=_generator(seed, part.name)).tolist()
        text = separator.join(part.documents[i] for i in order)
        ids.append(_first_windows(tokenizer, text, length, part))
        sources += [part.name] * part.sequences
    order = torch.randperm(len(sources), generator=_generator(seed, "/windows"))
    ids_ST = torch.cat(ids)[order]
    _check_vocabulary(ids_ST, vocabulary)
    logger.info("packed %d sequences of %d tokens from %d texts", *ids_ST.shape, len(parts))
    kept = {part.name: {"documents": len(part.documents), "sequences": part.sequences} for part in parts}
    return Tokens(ids_ST, [sources[i] for i in order.tolist()],
                  {"length": length, "seed": seed, "separator": separator, "parts": kept,
                   "sha256": hashlib.sha256(ids_ST.numpy().tobytes()).hexdigest()})


def windows(tokenizer: "PreTrainedTokenizerBase", documents: list[str], *, length: int, separator: str = "\n",
            vocabulary: int | None = None) -> Tensor:
    """ids_ST: all windows of the documents in their order, for held-out perplexity; a remainder is dropped."""
    if length < 1:
        raise TextError(f"length {length} is no window length; it must be at least 1 token")
    ids_N = _tokenise(tokenizer, separator.join(documents))
    if len(ids_N) < length:
        raise TextError(f"the text gives {len(ids_N)} tokens, less than one window of {length}; "
                        "give more text or shorter windows")
    ids_ST = _cut(ids_N, length)
    _check_vocabulary(ids_ST, vocabulary)
    return ids_ST


def _first_windows(tokenizer: "PreTrainedTokenizerBase", text: str, length: int, part: Part) -> Tensor:
    """First windows of the text's tokens; only a prefix of the text is tokenised, doubled until it is enough."""
    need = part.sequences * length
    size = CHARACTERS_PER_TOKEN * (need + MARGIN)
    ids_N = _tokenise(tokenizer, text[:size])
    while len(ids_N) < need + MARGIN and size < len(text):
        size *= 2
        ids_N = _tokenise(tokenizer, text[:size])
    if len(ids_N) < need:
        raise TextError(f"text {part.name!r} gives {len(ids_N) // length} sequences of {length} tokens "
                        f"({len(ids_N)} tokens), but {part.sequences} are asked for; ask for fewer or add text")
    return _cut(ids_N[:need], length)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    found = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)


def _cut(ids_N: Tensor, length: int) -> Tensor:
    count = len(ids_N) // length
    return ids_N[:count * length].view(count, length)


def _generator(seed: int, name: str) -> torch.Generator:
    """The same numbers for (seed, name) in every process, unlike hash()."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _check_parts(parts: list[Part], length: int) -> None:
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise TextError(f"a mix needs at least one text and a name of its own for each; it has {names}")
    for part in parts:
        if part.sequences < 1 or length < 1:
            raise TextError(f"text {part.name!r}: {part.sequences} sequences of {length} tokens; "
                            "both must be at least 1")


def _check_vocabulary(ids_ST: Tensor, vocabulary: int | None) -> None:
    largest = int(ids_ST.max())
    if vocabulary is not None and largest >= vocabulary:
        raise TextError(f"vocabulary mismatch: the tokenizer gives id {largest}, but the model has {vocabulary} "
                        "embedding rows; use the model's own tokenizer")


def _field(row: str, field: str, where: str) -> str:
    try:
        return _pick(json.loads(row), field, where)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: not JSON ({error.msg}); every line must be one object") from error


def _pick(row: Any, field: str, where: str) -> str:
    """The text of a row: of one field, or of several put into a template such as `{question} {answer}`."""
    names = _SLOT.findall(field) or [field]
    found = {name: _text(row.get(name)) for name in names} if isinstance(row, dict) else {}
    for name in names:
        if found.get(name) is None:
            has = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise TextError(f"{where}: no text in field {name!r}, it has {has}; set the text's field")
    return _SLOT.sub(lambda slot: found[slot[1]], field) if _SLOT.search(field) else found[field]


def _text(value: Any) -> str | None:
    """A string, or a list of strings (answers, turns of a dialogue) joined by spaces; None for anything else."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return value if isinstance(value, str) else None


def _not_empty(documents: list[str], where: str) -> list[str]:
    found = [document for document in documents if document.strip()]
    if not found:
        raise TextError(f"{where} holds no text; name a file with at least one non-empty document")
    return found
