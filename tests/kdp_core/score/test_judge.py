"""The judge against lm-eval's own routes, on pico models."""
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kdp_core.model import checkpoints
from kdp_core.score import judge as judge_module
from kdp_core.score.judge import Judge
from tests import pico

DOCUMENTS = pico.documents(12, seed=3, words=90)


def test_shared_prefixes_change_nothing(pico_folder):
    """The cached route against lm-eval's own, on contexts shared by choices of different lengths, and lone ones."""
    judge = Judge(checkpoints.load_model(pico_folder), checkpoints.load_tokenizer(pico_folder), batch_size=3)
    rng = random.Random(0)
    draws = [[rng.randrange(2, 384) for _ in range(length)] for length in (9, 2, 12, 1)]
    requests = [((f"{i}", f"{j}"), context, [rng.randrange(2, 384) for _ in range(1 + (i + j) % 4)])
                for i, context in enumerate(draws) for j in range(4)]
    requests.append((("lone", ""), draws[0][:5], [7, 8]))
    shared, single = judge._by_context(requests)
    assert sorted(map(len, shared)) == [1, 1, 1, 3, 3, 3] and len(single) == 5
    ours, theirs = judge._loglikelihood_tokens(requests), HFLM._loglikelihood_tokens(judge, requests, disable_tqdm=True)
    assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], rel=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_fewer_sequences_at_a_time_where_their_logits_would_be_too_large(llama_folder, monkeypatch):
    judge, seen = Judge(checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder)), []
    requests = [(("", str(i)), [5, 9, 200, 31 + i], [7 + i]) for i in range(9)]
    judge.model.register_forward_hook(lambda _, args, output: seen.append(len(output.logits)))
    at_once = judge._loglikelihood_tokens(requests)
    # two sequences of five tokens
    monkeypatch.setattr(judge_module, "LOGITS_BYTES", 2 * 5 * 4 * judge.model.config.vocab_size)
    few = judge._loglikelihood_tokens(requests)
    assert seen == [8, 1, 2, 2, 2, 2, 1] and judge.batch_size == 8
    assert [ll for ll, _ in few] == pytest.approx([ll for ll, _ in at_once], rel=1e-4)


def test_greedy_is_found_on_the_shared_route(llama_folder):
    judge = Judge(checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder))
    context = [5, 9, 200, 31]
    best = judge.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    greedy = best[0, len(context):].tolist()
    found = judge._continuations(context, [greedy, [greedy[0], (greedy[1] + 1) % 384]])
    assert [hit for _, hit in found] == [True, False]


def test_text_items_are_left_to_lm_eval(llama_folder):
    judge = Judge(checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder))
    requests = [Instance("loglikelihood_rolling", doc, (DOCUMENTS[0][:40],), 0) for doc in ({}, {"ids": [4, 5, 6]})]
    text, window = judge.loglikelihood_rolling(requests)
    assert text == pytest.approx(HFLM.loglikelihood_rolling(judge, requests[:1])[0], rel=1e-5)
    assert window == pytest.approx(judge._windows([[4, 5, 6]])[0])
