"""The text of the comparisons on real tasks: the calibration mix of eight sources, and the held-out texts.

The calibration mix has no news, so held-out news are text of another kind. The data are real sets in a local folder.
Its subfolder calib/ has the calibration files, and eval/ has held-out encyclopedia and web text. The news are those of
the embedded default.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import torch

from kdp_core.base import texts
from kdp_core.base.records import Tokens
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token

LENGTH = 128  # tokens of a calibration sequence and of a window of held-out text


class Source(NamedTuple):
    """One source of the calibration mix."""
    files: tuple[tuple[str, str], ...]
    """Pairs: a file in calib/, and the name of its text field or a template of several fields."""
    share: int
    """Sequences in every 34."""
    most: int | None = None
    """Largest number of sequences; None if its text is enough for the share in a mix of 8,000 sequences."""


MIX = {
    "web": Source((("c4_demo", "text"), ("c4_sample_rest", "text")), 8),
    "wiki": Source((("wikipedia_demo", "text"), ("wikitext2_valid", "page")), 8),
    "race_high": Source((("race_high_train", "article"),), 4),
    "race_middle": Source((("race_middle_train", "article"),), 4),
    "mnli": Source((("mnli_train_few", "{premise} {hypothesis}"),), 1, most=142),
    "piqa": Source((("piqa_test_unlabelled", "{goal} {sol1}"),), 3, most=495),
    "boolq": Source((("boolq_val_rest", "{passage} {question}"),), 4),
    "mmlu": Source((("mmlu_val", "{question} {choices}"),), 2),
}
"""The paper's eight sources are PIQA, CMMLU, BoolQ, C3, MNLI, RACE (high and middle) and SlimPajama, 500 sequences of
each. Here C4 and encyclopedia articles replace SlimPajama, and MMLU replaces the Chinese sets, which the models cannot
read. MNLI and PIQA have little text, so a mix of 8,000 sequences has only 7,694."""
HELDOUT = {"news": 64, "wiki": 64, "web": 64}
"""Held-out text -> windows."""


def calibration(dense: Path, data: Path, sequences: int, seed: int, vocabulary: int) -> Tokens:
    """The calibration sequences: `sequences` in total, divided among the sources, or fewer for lack of text."""
    total, parts = sum(source.share for source in MIX.values()), []
    for name, source in MIX.items():
        documents = [one for file, field in source.files
                     for one in texts.read_documents(data / f"calib/{file}.jsonl", format="jsonl", field=field)]
        count = min(source.most or sequences, max(1, sequences * source.share // total))
        parts.append(texts.Part(name, documents, count))
    return texts.pack(checkpoints.load_tokenizer(dense), parts, length=LENGTH, seed=seed, vocabulary=vocabulary,
                      start=first_token(checkpoints.config_of(dense)))


def heldout(dense: Path, data: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Windows of each held-out text. The windows have equal distances in the text."""
    documents = {"news": embedded.documents("lee", config),
                 "wiki": texts.read_documents(data / "eval/wikitext2_test.jsonl", format="jsonl", field="page"),
                 "web": texts.read_documents(data / "eval/c4_sample.jsonl", format="jsonl", field="text")}
    found = {}
    for name, own in documents.items():
        ids_ST = texts.windows(checkpoints.load_tokenizer(dense), own, length=LENGTH,
                               start=first_token(checkpoints.config_of(dense)))
        found[name] = ids_ST[torch.linspace(0, len(ids_ST) - 1, min(HELDOUT[name], len(ids_ST))).long()]
    return found
