"""The fast scorer against lm-eval's own HFLM: on pico models of all families, folded ones, and real sets."""
import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from kdp_core.score import fast
from kdp_core.score.fast import FastJudge
from tests import pico

DOCUMENTS = pico.documents(12, seed=3, words=90)


def ids_of(rng, count):
    return [rng.randrange(2, 384) for _ in range(count)]


def requests():
    """Choices of one context, half of which begin alike; sequences that fill the model or must be cut; lone ones."""
    rng = random.Random(0)
    shots, made = ids_of(rng, 80), []
    for i in range(8):
        context = (shots if i % 2 else []) + ids_of(rng, 1 + 5 * i)
        made += [((str(i), str(j)), context, ids_of(rng, 1 + (i + j) % 5)) for j in range(4)]
    made += [(("cut", ""), ids_of(rng, 200), ids_of(rng, 120)), (("full", ""), ids_of(rng, 200), ids_of(rng, 57)),
             (("one", ""), [7], [8]), (("twice", "a"), shots[:9], [4, 5, 6]), (("twice", "b"), shots[:9], [4, 5, 6]),
             (("within", ""), shots[:11], [4, 5])]
    return made


def check(judge, given):
    """Both scorers agree to 1e-4 nats, and on what is greedy."""
    ours, theirs = judge._loglikelihood_tokens(given), HFLM._loglikelihood_tokens(judge, given, disable_tqdm=True)
    assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.fixture
def packed(monkeypatch):
    """lm-eval's route is closed: what is scored was packed."""
    monkeypatch.setattr(fast.Judge, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("lm-eval's route"))


@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("family", pico.EVERY)
def test_it_gives_lm_evals_log_likelihoods(family, tokens, packed, monkeypatch):
    monkeypatch.setattr(fast, "ROW_TOKENS", tokens)
    check(FastJudge(pico.lively(pico.model(family)), pico.tokenizer()), requests())


def test_it_gives_the_same_on_several_threads(packed):
    judge, before = FastJudge(pico.model("llama"), pico.tokenizer()), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(judge, requests())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
