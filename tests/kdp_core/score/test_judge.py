"""The judge against lm-eval's own routes, on pico models."""
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kdp_core.model import checkpoints
from kdp_core.score import judge as judge_module
from kdp_core.score.fast import FastJudge
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


# the first token

def begun(adds):
    """The pico tokenizer, which adds its first token or leaves that to others."""
    tokenizer = pico.tokenizer()
    tokenizer.add_bos_token = adds
    return tokenizer


STYLES = {"Llama": ("llama", True, True), "GPT-2": ("gpt2", False, False), "Gemma": ("gemma2", True, True),
          "Gemma whose tokenizer adds none": ("gemma3_text", False, True)}
"""Name -> family, whether the tokenizer adds its first token, whether a context shall begin with it."""


def nats(model, ids, first):
    """Log-likelihood of ids[first:], token by token."""
    with torch.no_grad():
        log_probs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs_TV[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize("kind", [Judge, FastJudge])
@pytest.mark.parametrize("style", STYLES)
def test_the_first_token_comes_once_and_is_not_scored(style, kind):
    family, adds, wanted = STYLES[style]
    model, plain = pico.lively(pico.model(family, layers=2)), begun(False)
    judge = kind(model, begun(adds))
    text, context = "the council met on monday", "the council met"
    whole, shorter = plain(text).input_ids, plain(context).input_ids
    rolled = judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (given,), 0)
                                          for given in (text, f"<s>{text}")], disable_tqdm=True)
    assert rolled == pytest.approx([nats(model, [0, *whole], 1)] * 2, abs=1e-3)
    asked = [(context, text[len(context):]), ("", text), (f"<s>{context}", text[len(context):])]
    # one by one: lm-eval takes requests of the same tokens for one, though their contexts end elsewhere
    found = [judge.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)[0][0] for pair in asked]
    begins = [0] * wanted
    assert found == pytest.approx([
        nats(model, [*begins, *whole], len(begins) + len(shorter)), nats(model, [0, *whole], 1),
        nats(model, [0, *whole], 1 + len(shorter))], abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_windows_of_a_long_text_begin_with_the_token_that_the_family_needs(family):
    """Windows of 16 tokens. Without a token of its own a window begins with the last one of the window before."""
    model, ids = pico.lively(pico.model(family, layers=2)), begun(False)(DOCUMENTS[0]).input_ids
    judge = FastJudge(model, begun(True), max_length=16)
    own = 15 if family == "gemma2" else 16
    starts = range(own, len(ids), own)
    # lm-eval fills the last window with tokens that were scored before
    expected = nats(model, [0, *ids[:own]], 1)
    for start in starts:
        stop = min(start + own, len(ids))
        seen = ids[stop - own - 1:stop]
        expected += nats(model, [0, *seen] if family == "gemma2" else seen, len(seen) + (family == "gemma2")
                         - (stop - start))
    found, = judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (DOCUMENTS[0],), 0)], disable_tqdm=True)
    assert len(starts) > 3 and found == pytest.approx(expected, abs=1e-2)


def test_a_padding_token_beyond_the_embedding_is_not_given_to_the_model():
    """Llama 2's added one: a batch of unequal prompts would ask for a row that is not there."""
    tokenizer, prompts = pico.tokenizer(), ("the council met on monday", "the")
    tokenizer.add_special_tokens({"pad_token": "<extra>"})
    model = pico.model("llama", layers=2)
    assert tokenizer.pad_token_id == len(model.get_input_embeddings().weight)
    asked = [Instance("generate_until", {}, (prompt, {"until": ["<none>"], "max_gen_toks": 4}), 0)
             for prompt in prompts]
    together = Judge(model, tokenizer, batch_size=2).generate_until(asked, disable_tqdm=True)
    alone = [Judge(model, pico.tokenizer(), batch_size=1).generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert together == alone
