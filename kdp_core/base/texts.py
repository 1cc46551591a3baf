"""Documents, calibration mixes and packed sequences.

Packing: the documents are joined by newlines, tokenised without special tokens, and cut into windows of equal length.
There is no padding and no special token at the start of a window. The first token of a window therefore becomes the
attention sink. Some families need a special first token (`families.first_token`). For these families, every window
begins with the special token, which occurs nowhere else in the window. A text made with a chat template may contain the
special token, which is then removed before the text is cut into windows. A mix selects a fixed number of windows from
each part. In the same way, the KDP paper (section 3.1) uses 500 samples of at most 128 tokens from each of its data
sets. The paper does not say whether samples are packed, cut or padded; here they are packed. The documents of a part
are shuffled in an order that SHA-256 derives from the seed and the name of the part. If a part is added, the windows of
the other parts therefore do not change.
Axes: S sequences, T tokens of a sequence, N tokens of a text.
"""
import hashlib
import json
import logging
import re
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.records import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATOR = "\n"
"""The text between two documents."""
MARGIN = 64
"""Number of extra tokens that are made and then discarded, because a cut in a text changes only the tokens near the
cut."""
CHARACTERS_PER_TOKEN = 6
"""First guess of the number of characters for each token. English text has 4 to 5 characters for each token. If a text
has more characters for each token, the tokenised prefix is too short, and a longer prefix is tokenised."""

_SLOT = re.compile(r"\{(\w+)\}")


class TextError(ValueError):
    """A text cannot be read, or it is too short for the requested number of sequences."""


class Part(NamedTuple):
    """One text of a mix."""
    name: str
    documents: list[str]
    sequences: int
    """Number of windows that the mix selects from this text."""


def read_documents(path: str | Path, *, format: Literal["lines", "text", "jsonl"], encoding: str = "utf-8",
                   field: str = "text") -> list[str]:
    """The documents of a file, in the order of the file. Empty documents are omitted.

    format: lines (every line is a document), text (the file is one document), or jsonl (every line is an object).
    encoding: encoding of the file, such as utf-8 or latin-1.
    field: for jsonl, the field that holds the text, or a template of several fields such as `{question} {answer}`.
    Raises OptionError for an unknown format, and TextError with the file and line for a text that cannot be read.
    """
    options.check(read_documents, locals())
    try:
        text = Path(path).read_text(encoding=encoding)
    except (OSError, LookupError) as error:
        raise TextError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not {encoding} ({error.reason} at byte {error.start}); "
                        "set the text's encoding, such as latin-1") from error
    # splitlines() is not used: it also cuts at \x85 and \u2028, which are characters of a line here
    lines = [text] if format == "text" else text.split("\n")
    if format == "jsonl":
        lines = [_field(line, field, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return _not_empty(lines, str(path))


def read_hub_documents(name: str, *, revision: str, config: str | None, split: str, field: str,
                       cache: str | Path | None = None, limit: int | None = None) -> list[str]:
    """The first `limit` documents of a hub data set (None: all documents). The documents are streamed in the order of
    the data set, and empty documents are omitted.

    config: the data set's configuration, such as `wikitext-2-raw-v1`.
    field: as in `read_documents`.
    cache: folder in which the data set is cached; None means the default folder of the library `datasets`.
    Raises TextError for a data set or document that cannot be read.
    """
    import datasets  # takes seconds to import, and only hub texts need it
    where = f"hf-data:{name}@{revision}, split {split}"
    try:
        items = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True,
                                      cache_dir=None if cache is None else str(cache))
        taken = [_pick(item, field, f"{where}, item {n}") for n, item in enumerate(islice(items, limit))]
    except TextError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise TextError(f"{where} cannot be read: {shorten(str(error), 300)}; check name, configuration, "
                        "split and network, or name a local file") from error
    return _not_empty(taken, where)


def pack(tokenizer: "PreTrainedTokenizerBase", parts: list[Part], *, length: int, seed: int,
         vocabulary: int | None = None, start: int | None = None) -> Tokens:
    """A calibration mix: `part.sequences` windows of `length` tokens from every part, shuffled together.

    The documents of a part are shuffled and joined to one text. The first windows of this text are the windows of the
    part. The ids are int64 (S, T). `vocabulary` is the number of embedding rows. All ids must be smaller than
    `vocabulary`; if it is None, the ids are not checked. `start` is the id with which every window begins; it replaces
    one token of the text. Raises TextError for a part that is too short, or for ids that are too large.
    """
    _check_parts(parts, length)
    ids, sources = [], []
    for part in parts:
        order = torch.randperm(len(part.documents), generator=_generator(seed, part.name)).tolist()
        text = SEPARATOR.join(part.documents[i] for i in order)
        ids.append(_started(_first_windows(tokenizer, text, _own(length, start), part, start), start))
        sources += [part.name] * part.sequences
    order = torch.randperm(len(sources), generator=_generator(seed, "/windows"))
    ids_ST = torch.cat(ids)[order]
    _check_vocabulary(ids_ST, vocabulary)
    logger.info("packed %d sequences of %d tokens from %d texts", *ids_ST.shape, len(parts))
    kept = {part.name: {"documents": len(part.documents), "sequences": part.sequences} for part in parts}
    return Tokens(ids_ST, [sources[i] for i in order.tolist()],
                  {"length": length, "seed": seed, "separator": SEPARATOR, "parts": kept,
                   "sha256": hashlib.sha256(ids_ST.numpy().tobytes()).hexdigest()})


def windows(tokenizer: "PreTrainedTokenizerBase", documents: list[str], *, length: int,
            vocabulary: int | None = None, start: int | None = None) -> Tensor:
    """All windows of the documents, in the order of the documents, for held-out perplexity: int64 (S, T).

    Tokens at the end that do not fill a window are omitted. `vocabulary` and `start` have the same meaning as in
    `pack`. Raises TextError for a text shorter than one window, or for ids that are too large.
    """
    if length < 1:
        raise TextError(f"a window of {length} tokens is not possible; give a length of at least 1 token")
    ids_N = _tokenise(tokenizer, SEPARATOR.join(documents), start)
    if len(ids_N) < _own(length, start):
        raise TextError(f"the text gives {len(ids_N)} tokens, less than one window of {length}; "
                        "give more text or shorter windows")
    ids_ST = _started(_cut(ids_N, _own(length, start)), start)
    _check_vocabulary(ids_ST, vocabulary)
    return ids_ST


def _first_windows(tokenizer: "PreTrainedTokenizerBase", text: str, length: int, part: Part,
                   start: int | None) -> Tensor:
    """The windows from the start of the text, as many as the part needs. Only a prefix of the text is tokenised. The
    length of the prefix is doubled until the prefix has enough tokens."""
    need = part.sequences * length
    size = CHARACTERS_PER_TOKEN * (need + MARGIN)
    ids_N = _tokenise(tokenizer, text[:size], start)
    while len(ids_N) < need + MARGIN and size < len(text):
        size *= 2
        ids_N = _tokenise(tokenizer, text[:size], start)
    if len(ids_N) < need:
        raise TextError(f"text {part.name!r} gives {len(ids_N) // length} sequences of {length} tokens "
                        f"({len(ids_N)} tokens), but {part.sequences} are asked for; ask for fewer or add text")
    return _cut(ids_N[:need], length)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, templated: bool = False,
               start: int | None = None) -> Tensor:
    """The token ids of a prompt, int64 (1, N), with the special tokens that the tokenizer adds.

    templated: whether a chat template made the text, which then already contains all special tokens.
    start: the id with which every sequence of the family must begin. If the text already begins with this id, the id is
        not added a second time.
    """
    given = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    found = tokenizer(text, add_special_tokens=not (templated or given))["input_ids"]
    if start is not None and found[:1] != [start]:
        found = [start, *found]
    return torch.tensor([found], dtype=torch.int64)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", text: str, start: int | None) -> Tensor:
    """Token ids, int64 (N,), without special tokens and without `start`, the id with which every window begins."""
    found = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids_N = torch.tensor(found, dtype=torch.int64)
    return ids_N if start is None else ids_N[ids_N != start]


def _cut(ids_N: Tensor, length: int) -> Tensor:
    """All complete windows (S, T); tokens at the end that do not fill a window are omitted."""
    count = len(ids_N) // length
    return ids_N[:count * length].view(count, length)


def _own(length: int, start: int | None) -> int:
    """Number of tokens of a window that come from the text. Raises TextError if this number is not positive."""
    own = length if start is None else length - 1
    if own < 1:
        raise TextError(f"a window of {length} tokens holds no text beside its first token; give longer windows")
    return own


def _started(ids_ST: Tensor, start: int | None) -> Tensor:
    """The windows with the id `start` before their tokens. If `start` is None, the windows are unchanged."""
    return ids_ST if start is None else torch.nn.functional.pad(ids_ST, (1, 0), value=start)


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator for (seed, name) that is the same in every process. Python's hash() would give a different generator
    in each process."""
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


def _field(line: str, field: str, where: str) -> str:
    try:
        return _pick(json.loads(line), field, where)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: not JSON ({error.msg}); every line must be one object") from error


def _pick(item: Any, field: str, where: str) -> str:
    """The text of an item: one field, or several fields in a template such as `{question} {answer}`."""
    names = _SLOT.findall(field) or [field]
    found = {name: _text(item.get(name)) for name in names} if isinstance(item, dict) else {}
    for name in names:
        if found.get(name) is None:
            has = ", ".join(sorted(item)) if isinstance(item, dict) else type(item).__name__
            raise TextError(f"{where}: no text in field {name!r}, it has {has}; set the text's field")
    return _SLOT.sub(lambda slot: found[slot[1]], field) if _SLOT.search(field) else found[field]


def _text(value: Any) -> str | None:
    """A string, or a list of strings (answers, turns of a dialogue) joined by spaces; None for any other value."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return value if isinstance(value, str) else None


def _not_empty(documents: list[str], where: str) -> list[str]:
    found = [document for document in documents if document.strip()]
    if not found:
        raise TextError(f"{where} holds no text; name a file with at least one non-empty document")
    return found
