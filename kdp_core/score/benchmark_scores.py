"""Scores of answers to the benchmarks whose scores lm-eval does not compute. The task files name the functions of this
module, and lm-eval calls them.

Each function reads an item and lm-eval's results for this item, and returns the item's value of each metric.
"""
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kdp_core.score import sandbox
from kdp_core.score.benchmark_data import coqa_answers


def score_xsum(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-1 (F1, stemmed; Lin 2004) of the answer's first non-empty line."""
    lines = [line for line in results[0].split("\n") if line.strip()]
    return {"rouge1": _rouge().score(item["summary"], lines[0] if lines else "")["rouge1"].fmeasure}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rouge1"], use_stemmer=True)


def score_coqa(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of the answer's first line, computed as CoQA's authors compute them for human answers (Reddy
    et al. 2019).

    If there are several correct answers, the best match is computed several times, each time without one of them. The
    result is the mean of the best matches.
    """
    said, right = _words(results[0].strip().split("\n")[0]), [_words(answer) for answer in coqa_answers(item)]
    turns = [right[:i] + right[i + 1:] for i in range(len(right))] if len(right) > 1 else [right]
    return {name: sum(max(score(answer, said) for answer in others) for others in turns) / len(turns)
            for name, score in (("em", lambda one, other: float(one == other)), ("f1", _overlap))}


def _words(text: str) -> list[str]:
    """The words in lower case, without punctuation and articles, as SQuAD's score compares them."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _overlap(right: list[str], said: list[str]) -> float:
    if not right or not said:
        return float(right == said)
    # F1 = 2 |common| / (|right| + |said|)
    return 2 * (Counter(right) & Counter(said)).total() / (len(right) + len(said))


def score_sst2(item: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The accuracy, and the pair (margin, label) for the area under the curve. The margin is the log-likelihood of
    `positive` minus that of `negative`, in nats."""
    margin = results[1][0] - results[0][0]
    return {"acc": float((margin > 0) == bool(item["label"])), "auc": (margin, item["label"])}


def score_humaneval(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the completed function passes the item's tests."""
    program = f"{item['prompt']}{results[0]}\n{item['test']}\ncheck({item['entry_point']})\n"
    return {"pass@1": float(sandbox.passes(program))}


def score_mbpp(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the written function passes the item's tests."""
    program = "\n".join([results[0], item.get("test_setup_code") or "", *item["test_list"]])
    return {"pass@1": float(sandbox.passes(program))}
