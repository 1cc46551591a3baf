"""Why multiple choice survives pruning: changes of the probabilities of all tokens, beside changes among the candidates
of an item.

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026), Figure 8. The candidates in the
figure are the letters of MMLU. Here the candidates are the choices of the benchmarks' items, with the benchmarks'
prompts. A choice may be a text of any length. Two distributions are compared:
    full         the probabilities of the next token after the context, over the whole vocabulary
    candidates   c_i = exp(ll_i) / sum_j exp(ll_j), with the log-likelihood ll_i of choice i
Two measures compare the models for each distribution: KL(dense || pruned) in nats, and whether the most likely token or
candidate stays the same. `order` is the share of pairs of candidates whose order by log-likelihood is the same in both
models. `mass` is the probability of all first tokens of candidates together. `rank` is the rank of the most likely of
these first tokens among all tokens. `acc` is the benchmark's own score of the item.
Axes: N tokens, V vocabulary, C candidates.
"""
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kdp_core.base.measurements import Candidates, Survival
from kdp_core.model import checkpoints
from kdp_core.score import evaluate
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.fast import FastJudge
from kdp_core.score.metrics import PRIMARY
from kdp_core.study import distances

MEANS = ("acc_dense", "acc", "kl", "kl_candidates", "agreement", "agreement_candidates", "order", "mass", "mass_other")
"""Columns of the items' rows for which means are computed."""


class CandidatesError(ValueError):
    """The choices of a benchmark cannot be compared."""


class Item(NamedTuple):
    """One item of a benchmark."""
    task: str
    number: int
    context: str
    choices: list[str]
    """The continuations among which the model chooses."""
    score: Callable[[list[tuple[float, bool]]], float]
    """The function that computes the item's score from lm-eval's results for the choices."""


class Read(NamedTuple):
    """The outputs of one model for one item."""
    z_V: Tensor
    """Logits after the context."""
    ll_C: Tensor
    """Log-likelihood of each choice, float64."""
    greedy: list[bool]
    first: list[int]
    """The different first tokens of the choices."""


def items(folder: str | Path, chosen: Chosen) -> list[Item]:
    """The items of multiple-choice benchmarks. The prompts are those with which the checkpoint in `folder` is
    evaluated.

    Raises CandidatesError if a benchmark has no choices.
    """
    made = []
    for name, task in evaluate.requests(folder, chosen).items():
        by_item: dict[int, list[Any]] = {}
        for one in task.instances:
            by_item.setdefault(one.doc_id, []).append(one)
        for number, own in by_item.items():
            contexts = {one.args[0] for one in own}
            if len(own) < 2 or len(contexts) > 1 or any(one.request_type != "loglikelihood" for one in own):
                raise CandidatesError(f"benchmark {name!r} does not score several choices after one context; choose "
                                      "others, such as piqa or arc_easy")
            made.append(Item(name, number, contexts.pop(), [one.args[1] for one in own], _scorer(task, own[0].doc)))
    return made


def _scorer(task: Any, doc: Any) -> Callable[[list[tuple[float, bool]]], float]:
    def score(results: list[tuple[float, bool]]) -> float:
        found = task.process_results(doc, results)
        return float(found[next(metric for metric in PRIMARY["acc"] if metric in found)])
    return score


def of_dense(folder: str | Path, chosen: Chosen, *, device: str = "cpu", dtype: str = "float32") -> Candidates:
    """The outputs of the dense model for all items. These outputs are stored and compared with every pruned model."""
    found = _read_folder(folder, items(folder, chosen), device, dtype)
    return Candidates(torch.stack([one.z_V for one in found]), [one.ll_C.tolist() for one in found],
                      [one.greedy for one in found], [one.first for one in found])


def survive(folder: str | Path, chosen: Chosen, known: Candidates, *, device: str = "cpu",
            dtype: str = "float32") -> Survival:
    """The comparison of a pruned model with the dense model, whose outputs are `known`. Raises CandidatesError if the
    number of items differs."""
    asked = items(folder, chosen)
    if len(asked) != len(known.first):
        raise CandidatesError(f"the dense model read {len(known.first)} items, and now there are {len(asked)}; delete "
                              "its choices.safetensors, so that they are read again")
    dense = [Read(z_V, torch.tensor(lls, dtype=torch.float64), greedy, first) for z_V, lls, greedy, first in zip(
        known.z_IV, known.log_likelihoods, known.greedy, known.first, strict=True)]
    rows = [compare(item, one, other)
            for item, one, other in zip(asked, dense, _read_folder(folder, asked, device, dtype), strict=True)]
    return Survival(rows, by_task(rows))


def _read_folder(folder: str | Path, asked: Sequence[Item], device: str, dtype: str) -> list[Read]:
    model = checkpoints.load_model(folder, device=device, dtype=dtype)
    return read(model, checkpoints.load_tokenizer(folder), asked)


@torch.inference_mode()
def read(model: nn.Module, tokenizer: Any, asked: Sequence[Item]) -> list[Read]:
    """The outputs of a model for each item; the context runs once for all choices of the item."""
    judge, found = FastJudge(model, tokenizer), []
    for item in asked:
        pairs = [judge._encode_pair(item.context, choice) for choice in item.choices]
        context = pairs[0][0]
        cache = DynamicCache()
        z_V = model(torch.tensor([context], device=model.device), past_key_values=cache,
                    use_cache=True).logits[0, -1].float().cpu()
        lls, greedy = [], []
        for _, choice in pairs:
            z_NV = z_V[None]
            if len(choice) > 1:
                after = model(torch.tensor([choice[:-1]], device=model.device), past_key_values=cache, use_cache=True)
                cache.crop(1 - len(choice))
                z_NV = torch.cat((z_NV, after.logits[0].float().cpu()))
            logp_NV, right_N = z_NV.double().log_softmax(dim=-1), torch.tensor(choice)
            lls.append(logp_NV.gather(-1, right_N[:, None]).sum())
            greedy.append(bool((z_NV.argmax(dim=-1) == right_N).all()))
        found.append(Read(z_V, torch.stack(lls), greedy, sorted({choice[0] for _, choice in pairs})))
    return found


def compare(item: Item, dense: Read, pruned: Read) -> dict[str, Any]:
    """One row: the changes of an item over all tokens and over its candidates, and the item's score by each model."""
    full = distances.restricted(dense.z_V[None], pruned.z_V[None], dense.first, 1.0)
    few = distances.outputs(dense.ll_C[None], pruned.ll_C[None], 1.0)
    pairs = list(itertools.combinations(range(len(item.choices)), 2))
    kept = [(dense.ll_C[a] > dense.ll_C[b]) == (pruned.ll_C[a] > pruned.ll_C[b]) for a, b in pairs]
    acc_dense, acc = (item.score(list(zip(one.ll_C.tolist(), one.greedy, strict=True))) for one in (dense, pruned))
    return {"task": item.task, "item": item.number, "candidates": len(item.choices), "acc_dense": acc_dense, "acc": acc,
            **{name: full[name].item() for name in ("kl", "agreement", "mass", "mass_other", "rank")},
            "kl_candidates": few["kl"].item(), "agreement_candidates": few["agreement"].item(),
            "order": sum(map(float, kept)) / len(kept)}


def measure(dense: nn.Module, pruned: nn.Module, tokenizer: Any, asked: Sequence[Item],
            known: Sequence[Read] | None = None) -> list[dict[str, Any]]:
    """The rows of all items. `known` has the outputs of the dense model if they were computed before."""
    known = read(dense, tokenizer, asked) if known is None else known
    return [compare(item, one, other)
            for item, one, other in zip(asked, known, read(pruned, tokenizer, asked), strict=True)]


def by_task(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the items of each task, with the drop in accuracy and the paired standard error of this drop."""
    made = []
    for task, own in pd.DataFrame(list(rows)).groupby("task", sort=False):
        drop = own["acc_dense"] - own["acc"]
        made.append({"task": task, "items": len(own), **{name: float(own[name].mean()) for name in MEANS},
                     "rank_median": float(own["rank"].median()), "drop": float(drop.mean()),
                     "drop_stderr": float(drop.sem()) if len(own) > 1 else None})
    return made
