"""The judge against lm-eval's own routes, on pico models."""
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kdp_core.model import checkpoints
from kdp_core.score import judge as judge_module
from kdp_core.score.judge import Judge
from tests import pico

DOCUMENTS = pico.documents(12, seed=3, words=90)


def test_fewer_sequences_at_a_time_where_their_logits_would_be_too_large(llama_folder, monkeypatch):
    judge, seen = Judge(checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder)), []
    requests = [(("", str(i)), [5, 9, 200, 31 + i], [7 + i]) for i in range(9)]
    judge.model.register_forward_hook(lambda _, args, output: seen.append(len(output.logits)))
    at_once = judge._loglikelihood_tokens(requests)
    # two sequences of four tokens and the one that is predicted
    monkeypatch.setattr(judge_module, "LOGITS_BYTES", 2 * 5 * 4 * judge.model.config.vocab_size)
    few = judge._loglikelihood_tokens(requests)
    assert seen == [8, 1, 2, 2, 2, 2, 1] and judge.batch_size == 8
    assert [ll for ll, _ in few] == pytest.approx([ll for ll, _ in at_once], rel=1e-4)


def test_text_items_are_left_to_lm_eval(llama_folder):
    judge = Judge(checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder))
    requests = [Instance("loglikelihood_rolling", doc, (DOCUMENTS[0][:40],), 0) for doc in ({}, {"ids": [4, 5, 6]})]
    text, window = judge.loglikelihood_rolling(requests)
    assert text == pytest.approx(HFLM.loglikelihood_rolling(judge, requests[:1])[0], rel=1e-5)
    assert window == pytest.approx(judge._windows([[4, 5, 6]])[0])
