"""Evaluation tasks made from held-out text, in a folder that lm-eval reads (`TaskManager(include_path=folder)`).

    heldout_ppl           perplexity per token over disjoint windows without a BOS, each predicting its tokens 2 to end
    heldout_lastword      the last word of a passage, greedily: the form of LAMBADA (Paperno et al. 2016)
    heldout_continuation  the true one of four continuations: the form of HellaSwag (Zellers et al. 2019)

These tasks replace the paper's benchmarks if the benchmarks are not available. Scores on these tasks compare models
only on the held-out text from which the tasks are made. LAMBADA selects passages whose last word needs the wide
context; here passages are not selected. HellaSwag's wrong continuations are machine-written; here they are real text of
other articles, which is easier to recognise. The folder has the items as JSONL files, a YAML file for each task, and
`heldout.py`. `heldout.py` finds the items in its own folder, so the folder may be moved.
"""
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from datasets import Dataset

from kdp_core.base import options, store, texts
from kdp_core.base.options import Count, Natural
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token

FILES = Path(__file__).parent / "task_files"
NAMES = ("heldout_ppl", "heldout_lastword", "heldout_continuation")
LASTWORD_CONTEXT = (30, 70)
"""Smallest and largest number of words of the context before a last word."""
CONTINUATION_CONTEXT = (20, 30)
CONTINUATION_WORDS = (12, 16)
CHOICES = 4
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
LAST_WORD = re.compile(r"^([^\W\d_]{4,})[.!?][\"')\]]*$")


class TaskError(ValueError):
    """The text has too few items, or a task folder is incomplete."""


def write_tasks(documents: list[str], folder: str | Path, *, window: Annotated[int, Ge(2)] = 128,
                lastword_items: Count = 64, continuation_items: Count = 32, seed: Natural = 0) -> dict[str, Any]:
    """Write the three tasks to `folder` and return the facts in `heldout.json`. The folder is written atomically, and
    an old folder is replaced.

    window: number of tokens of a window of heldout_ppl, at least 2. The evaluated model's tokenizer makes the tokens,
        so the windows are cut when the task is read.
    lastword_items: number of items of heldout_lastword.
    continuation_items: number of items of heldout_continuation.
    seed: seed for the choice of items.
    Two errors are raised before anything is written: OptionError for a value out of range, and TaskError for documents
    that give too few items.
    """
    options.check(write_tasks, locals())
    items = {"heldout_ppl": [{"documents": documents, "window": window}],
             "heldout_lastword": last_words(documents, items=lastword_items, seed=seed),
             "heldout_continuation": continuations(documents, items=continuation_items, seed=seed)}
    facts = {"documents": len(documents), "window": window, "lastword_items": lastword_items,
             "continuation_items": continuation_items, "seed": seed,
             "sha256": hashlib.sha256("\n".join(documents).encode()).hexdigest()}
    with store.atomic(folder) as temporary:
        temporary.mkdir()
        for name in NAMES:
            shutil.copyfile(FILES / f"{name}.yaml", temporary / f"{name}.yaml")
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items[name]]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        shutil.copyfile(FILES / "heldout.py", temporary / "heldout.py")
        store.write_json(temporary / "heldout.json", facts)
    return facts


def last_words(documents: list[str], *, items: int, seed: int) -> list[dict[str, Any]]:
    """Passages {context, target, document}, `items` in number. The target is the last word of a sentence and has at
    least 4 letters.

    The context begins at the beginning of a sentence and ends before the target. Of all such contexts with 30 to 70
    words, the shortest one is used. Several white-space characters in a row become one space. Passages are drawn
    without replacement and stay in the order of the text. Raises TaskError if the text has too few passages.
    """
    found = []
    for number, words in enumerate(_words(documents)):
        starts = _sentence_starts(words)
        for end, word in enumerate(words):
            match = LAST_WORD.match(word)
            fitting = [start for start in starts if LASTWORD_CONTEXT[0] <= end - start <= LASTWORD_CONTEXT[1]]
            if match and end + 1 in {*starts, len(words)} and fitting:
                context = " ".join(words[fitting[-1]:end])
                found.append({"context": context, "target": match[1], "document": number})
    return _draw(found, items, "heldout_lastword", random.Random(f"{seed}:lastword"))


def continuations(documents: list[str], *, items: int, seed: int) -> list[dict[str, Any]]:
    """Items {context, choices, gold, document}, `items` in number. The three wrong choices come from three other
    documents.

    A context is the beginning of a sentence and has 20 to 30 words. All choices of an item have the same number of
    words, 12 to 16. Each choice begins inside a sentence, with a lower-case word. So neither the length nor a capital
    letter shows which choice is true. The index of the true choice, `gold`, is drawn uniformly. Raises TaskError if the
    text has too few items, or fewer than three other documents.
    """
    rng = random.Random(f"{seed}:continuation")
    words_by_document = _words(documents)
    inside = [_inside(words) for words in words_by_document]
    found = []
    for number, words in enumerate(words_by_document):
        for start in _sentence_starts(words):
            length = rng.randint(*CONTINUATION_WORDS)
            cuts = [cut for cut in inside[number] if CONTINUATION_CONTEXT[0] <= cut - start <= CONTINUATION_CONTEXT[1]
                    and cut + length <= len(words)]
            if cuts:
                found.append((number, start, rng.choice(cuts), length))
    drawn = _draw(found, items, "heldout_continuation", rng)
    return [_continuation(words_by_document, inside, place, rng) for place in drawn]


def read_windows(path: str | Path, *, tokenizer: str, **_: Any) -> dict[str, Dataset]:
    """Items {ids, text, bytes} of `heldout_ppl` in memory, one for each window. `tokenizer` is the folder of a model.

    The documents are joined by newlines, and a window may contain the end of one document and the beginning of the
    next. Tokens after the last full window are left out. `bytes` is the number of UTF-8 bytes of the predicted tokens,
    which are tokens 2 to end.
    """
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    reader, start = checkpoints.load_tokenizer(tokenizer), first_token(checkpoints.config_of(tokenizer))
    items = []
    for ids in texts.windows(reader, given["documents"], length=given["window"], start=start).tolist():
        predicted = reader.decode(ids[1:], clean_up_tokenization_spaces=False)
        own = ids if start is None else ids[1:]
        items.append({"ids": ids, "text": reader.decode(own, clean_up_tokenization_spaces=False),
                      "bytes": len(predicted.encode())})
    return {"test": Dataset.from_list(items)}


def read_items(path: str | Path) -> dict[str, Dataset]:
    """The items of a JSONL file in memory, as the test split that lm-eval reads."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}


def score_window(item: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """The window's log-likelihood (nats), paired with its number of tokens and with its number of bytes. The task file
    of heldout_ppl names this function as `process_results`."""
    return {"ppl": (results[0], len(item["ids"]) - 1), "bits_per_byte": (results[0], item["bytes"])}


def score_lastword(item: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The word's log-likelihood (nats), and whether greedy decoding produces the word. The task file names this
    function as `process_results`."""
    return {"acc": float(results[0][1]), "perplexity": results[0][0]}


def _words(documents: list[str]) -> list[list[str]]:
    return [document.split() for document in documents]


def _sentence_starts(words: list[str]) -> list[int]:
    """Indices of the words that begin a sentence. A sentence begins at the first word, and at every word that follows
    an end mark and is not in lower case."""
    return [i for i, word in enumerate(words)
            if i == 0 or (SENTENCE_END.search(words[i - 1]) and not word[0].islower())]


def _inside(words: list[str]) -> list[int]:
    """Indices of the words inside a sentence that begin with a lower-case letter."""
    return [i for i, word in enumerate(words)
            if i > 0 and word[0].islower() and not SENTENCE_END.search(words[i - 1])]


def _draw(found: list[Any], items: int, name: str, rng: random.Random) -> list[Any]:
    """Draw `items` elements of `found` without replacement. The drawn elements stay in the order of `found`."""
    if not 1 <= items <= len(found):
        raise TaskError(f"{name}: the text gives {len(found)} items, {items} were asked for; "
                        f"ask for 1 to {len(found)} or give more text")
    return [found[i] for i in sorted(rng.sample(range(len(found)), items))]


def _continuation(words: list[list[str]], inside: list[list[int]], place: tuple[int, int, int, int],
                  rng: random.Random) -> dict[str, Any]:
    """The item at `place`, which is (document, start, cut, length). The wrong choices are drawn from other
    documents."""
    number, start, cut, length = place
    starts_of = {other: [i for i in inside[other] if i + length <= len(words[other])]
                 for other in range(len(words)) if other != number}
    others = [other for other, starts in starts_of.items() if starts]
    if len(others) < CHOICES - 1:
        raise TaskError(f"heldout_continuation: {len(others)} other documents are long enough to draw wrong "
                        f"continuations from, and {CHOICES - 1} are needed; give more documents")
    choices = []
    for other in rng.sample(others, CHOICES - 1):
        first = rng.choice(starts_of[other])
        choices.append(" ".join(words[other][first:first + length]))
    gold = rng.randrange(CHOICES)
    choices.insert(gold, " ".join(words[number][cut:cut + length]))
    return {"context": " ".join(words[number][start:cut]), "choices": choices, "gold": gold, "document": number}
