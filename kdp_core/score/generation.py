"""Greedy text of a model, and measures that compare it with the text of the dense model.

    agreement         share of positions at which two continuations have the same token
    divergence        number of tokens before the first one that differs, at most the length of the continuation
    distinct_n        |distinct n-grams| / |n-grams| of a continuation (Li et al. 2016)
    repetition_n      1 - distinct_n (seq-rep-n, Welleck et al. 2020): the share of n-grams that occurred before
    rouge1            ROUGE-1 of the first line after a news story and "TL;DR:", as kdp_core.score scores XSum
    lambada           share of passages for which the greedy text begins with the last word
Every measure is a mean over prompts. All prompts of a call have the same length, so no padding is needed. Only the
first tokens of a story are used, because the beginning of a news story has most of its summary.
The losses compare a pruned model with the dense model. A loss of 0 means that the pruned model is as good as the dense
model. A loss of 1 means that nothing of the quality is kept.
Axes: B prompts, T tokens of a prompt, G decoded tokens, N n-grams.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from torch import Tensor, nn

from kdp_core.score.benchmark_scores import score_xsum
from kdp_core.score.fast import FastJudge

PROMPT = "\n\nTL;DR:"
"""The text that is added after a story, as in task_files/xsum.yaml."""
GRAMS = 4
"""The length of the n-grams in the loss `repetition`."""
SCORES = ("lambada", "rouge1", "gsm8k")
"""Measures that compare the text with a correct answer."""


class GenerationError(ValueError):
    """The prompts or continuations are too few or too short to be measured."""


class Stories(NamedTuple):
    """Prompts made of news stories, and the stories' summaries by people."""
    prompt_BT: Tensor
    summaries: list[str]


@torch.inference_mode()
def greedy(model: nn.Module, prompt_BT: Tensor, steps: int) -> Tensor:
    """The continuation id_BG of each prompt. The most likely next token is added `steps` times.

    If several tokens are equally likely, the lowest id is used. Decoding does not stop at an end-of-text token.
    """
    output = model(prompt_BT.to(model.device), use_cache=True)
    said = [output.logits[:, -1].argmax(dim=-1)]
    while len(said) < steps:
        output = model(said[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        said.append(output.logits[:, -1].argmax(dim=-1))
    return torch.stack(said, dim=1).cpu()


def agreement(said_BG: Tensor, other_BG: Tensor) -> float:
    """Share of positions at which both continuations have the same token."""
    return (said_BG == other_BG).double().mean().item()


def divergence(said_BG: Tensor, other_BG: Tensor) -> float:
    """Mean number of tokens before the first difference."""
    # sum over g of [all tokens up to g are equal]
    return (said_BG == other_BG).long().cumprod(dim=1).sum(dim=1).double().mean().item()


def distinct(said_BG: Tensor, n: int) -> float:
    """Mean share of distinct n-grams in a continuation. Raises GenerationError if the continuations have fewer than n
    tokens."""
    if said_BG.shape[1] < n:
        raise GenerationError(f"continuations have {said_BG.shape[1]} tokens and no group of {n}; decode at least {n}")
    grams_BNn = said_BG.unfold(1, n, 1)
    shares = [len(grams_Nn.unique(dim=0)) / len(grams_Nn) for grams_Nn in grams_BNn]
    return sum(shares) / len(shares)


def text_measures(said_BG: Tensor, dense_BG: Tensor) -> dict[str, float]:
    """All measures of continuations that need no correct answer. `dense_BG` has the continuations of the dense
    model."""
    return {"agreement": agreement(dense_BG, said_BG), "divergence": divergence(dense_BG, said_BG),
            "distinct_1": distinct(said_BG, 1), "distinct_2": distinct(said_BG, 2),
            "repetition": 1 - distinct(said_BG, GRAMS)}


def stories(items: Sequence[Mapping[str, Any]], tokenizer: Any, *, count: int, tokens: int) -> Stories:
    """Prompts made of the first `count` items {document, summary} whose document has at least `tokens` tokens.

    A prompt is the first `tokens` tokens of the document, followed by PROMPT.

    Raises GenerationError if fewer than `count` items are long enough.
    """
    ask, kept = tokenizer(PROMPT, add_special_tokens=False)["input_ids"], []
    for item in items:
        if len(kept) == count:
            break
        ids = tokenizer(item["document"])["input_ids"]
        if len(ids) >= tokens:
            kept.append(([*ids[:tokens], *ask], item["summary"]))
    if len(kept) < count:
        raise GenerationError(f"{len(kept)} of {len(items)} stories have {tokens} tokens, and {count} are asked for; "
                              "ask for fewer or shorter ones")
    return Stories(torch.tensor([ids for ids, _ in kept]), [summary for _, summary in kept])


def rouge1(model: nn.Module, tokenizer: Any, asked: Stories, steps: int) -> float:
    """Mean ROUGE-1 (F1) of the greedy summaries of `steps` tokens."""
    said = tokenizer.batch_decode(greedy(model, asked.prompt_BT, steps), skip_special_tokens=True)
    scores = [score_xsum({"summary": summary}, [text])["rouge1"]
              for summary, text in zip(asked.summaries, said, strict=True)]
    return sum(scores) / len(scores)


def lambada(model: nn.Module, tokenizer: Any, passages: Sequence[str]) -> float:
    """Share of passages whose last word greedy decoding produces from the words before it.

    Greedy decoding produces the word if and only if each of its tokens is the most likely one. Therefore one forward
    pass shows whether greedy decoding produces the word.
    """
    judge, asked = FastJudge(model, tokenizer), []
    for number, passage in enumerate(passages):
        context, space, word = passage.rpartition(" ")
        if not space:
            raise GenerationError(f"passage {number} is a single word; give passages of at least two")
        asked.append(Instance("loglikelihood", {}, (context, f" {word}"), number))
    return sum(hit for _, hit in judge.loglikelihood(asked, disable_tqdm=True)) / len(asked)


def losses(measured: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """The loss of each measure, between 0 and 1, and their mean `quality`.

    agreement: 1 - share of equal tokens.
    lambada, rouge1, gsm8k: 1 - score / dense score. Each of these losses is left out if its score was not measured, or
        if the dense score is 0.
    repetition: the rise above the dense model's repetition, relative to the largest possible rise.
    If a pruned model is better than the dense model in a measure, the loss of this measure is 0.
    """
    found = {"agreement": 1 - measured["agreement"]}
    for name in SCORES:
        if measured.get(name) is not None and dense.get(name):
            found[name] = 1 - measured[name] / dense[name]
    if dense["repetition"] < 1:
        found["repetition"] = (measured["repetition"] - dense["repetition"]) / (1 - dense["repetition"])
    found = {name: min(max(value, 0.0), 1.0) for name, value in found.items()}
    return {**found, "quality": sum(found.values()) / len(found)}
