"""Probabilities over all tokens and over candidates, against log-likelihoods by transformers."""
import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from kdp_core.base import store
from kdp_core.model.checkpoints import load_model, load_tokenizer
from kdp_core.score import evaluate
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.metrics import PRIMARY
from kdp_core.study import candidates
from kdp_core.study.candidates import CandidatesError
from tests import pico


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("sets"), pico.documents(6)
    (folder / "eval").mkdir()
    rows = [{"goal": one[:20], "sol1": one[20:45], "sol2": one[45:60], "label": n % 2} for n, one in enumerate(lines)]
    (folder / "eval/piqa_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "eval/lambada_openai_test.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in lines))
    return folder


@pytest.fixture(scope="module")
def asked(data, llama_folder):
    return candidates.items(llama_folder, Chosen(("piqa",), data=str(data), limit=4))


def literal(model, context, choice):
    """Logits after a context, and the log-likelihood of a choice after it, from one pass over both."""
    ids = torch.tensor([[*context, *choice]])
    with torch.no_grad():
        z_TV = model(ids).logits[0].double().numpy()
    logp_TV = log_softmax(z_TV, axis=1)
    at = range(len(context) - 1, ids.shape[1] - 1)
    return z_TV[len(context) - 1], sum(logp_TV[place, token] for place, token in zip(at, choice, strict=True))


def test_items_are_those_of_an_evaluation_with_its_scores(asked, data, llama_folder):
    assert [item.task for item in asked] == ["piqa"] * 4 and all(len(item.choices) == 2 for item in asked)
    reads = candidates.read(pico.model("llama"), pico.tokenizer(), asked)
    mine = [item.score(list(zip(one.ll_C.tolist(), one.greedy, strict=True)))
            for item, one in zip(asked, reads, strict=True)]
    scores = evaluate.evaluate(llama_folder, tasks=[], chosen=Chosen(("piqa",), data=str(data), limit=4)).scores
    metric = next(name for name in PRIMARY["acc"] if name in {one.metric for one in scores})
    assert np.mean(mine) == pytest.approx(next(one.value for one in scores if one.metric == metric))


def test_a_row_is_that_of_the_logits(asked):
    reader, models = pico.tokenizer(), (pico.model("llama"), pico.model("llama", seed=1))
    row = candidates.measure(*models, reader, asked)[1]
    item = asked[1]
    split = [(reader(item.context)["input_ids"], reader(item.context + choice)["input_ids"]) for choice in item.choices]
    found = [[literal(model, context, both[len(context):]) for context, both in split] for model in models]
    (z, w), (ll, other) = ([one[0][0] for one in found], [np.array([ll for _, ll in one]) for one in found])
    logp, logq = log_softmax(z), log_softmax(w)
    c, d = softmax(ll), softmax(other)
    firsts = sorted({both[len(context)] for context, both in split})
    assert row["kl"] == pytest.approx((np.exp(logp) * (logp - logq)).sum(), rel=1e-4)
    assert row["kl_candidates"] == pytest.approx((c * np.log(c / d)).sum(), rel=1e-3)
    assert row["agreement_candidates"] == (c.argmax() == d.argmax()) == row["order"]
    assert row["mass"] == pytest.approx(np.exp(logp)[firsts].sum(), rel=1e-4)
    assert row["rank"] == (logp > logp[firsts].max()).sum() + 1


def test_what_the_dense_model_gave_is_kept_for_every_pruned_model(asked, data, llama_folder, tmp_path):
    chosen, other = Chosen(("piqa",), data=str(data), limit=4), pico.save(tmp_path / "other", "llama", seed=1)
    store.write(tmp_path / "kept.safetensors", candidates.of_dense(llama_folder, chosen))
    found = candidates.survive(other, chosen, store.read(tmp_path / "kept.safetensors"))
    models = [load_model(folder) for folder in (llama_folder, other)]
    assert found.items == candidates.measure(*models, load_tokenizer(other), asked)
    assert found.tasks == candidates.by_task(found.items)
    with pytest.raises(CandidatesError, match="the dense model read 4 items, and now there are 3"):
        candidates.survive(other, chosen._replace(limit=3), store.read(tmp_path / "kept.safetensors"))


def test_a_model_beside_itself_changes_nothing(asked):
    model = pico.model("llama")
    table, = candidates.by_task(candidates.measure(model, model, pico.tokenizer(), asked))
    assert table["kl"] < 1e-9 and table["kl_candidates"] < 1e-9 and table["drop"] == 0 and table["drop_stderr"] == 0
    assert table["agreement"] == table["agreement_candidates"] == table["order"] == 1
    assert table["mass"] == table["mass_other"] and table["items"] == 4


def test_a_benchmark_without_choices_is_refused(data, llama_folder):
    with pytest.raises(CandidatesError, match="'lambada_openai' does not score several choices"):
        candidates.items(llama_folder, Chosen(("lambada_openai",), data=str(data), limit=2))
