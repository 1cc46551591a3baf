"""The fast scorer against lm-eval's own HFLM: on pico models of all families, folded ones, and real sets."""
import os
import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPTJConfig, GPTJForCausalLM

from kdp_core.model import checkpoints, distil
from kdp_core.model.folded import FOLDED
from kdp_core.score import benchmarks, fast, packing
from kdp_core.score.benchmarks import BENCHMARKS, Chosen
from kdp_core.score.fast import FastJudge
from kdp_core.score.judge import Judge
from kdp_core.score.packing import Scored
from tests import pico
from tests.kdp_core.model.random_weights import filled
from tests.kdp_core.score.hub import built

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
    """lm-eval's route is closed: what is scored was packed. The vocabulary has several slices, the last one shorter."""
    monkeypatch.setattr(distil, "SLICE", 100)
    monkeypatch.setattr(fast.Judge, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("lm-eval's route"))


@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("family", pico.EVERY)
def test_it_gives_lm_evals_log_likelihoods(family, tokens, packed, monkeypatch):
    monkeypatch.setattr(fast, "ROW_TOKENS", tokens)
    check(FastJudge(pico.lively(pico.model(family)), pico.tokenizer()), requests())


@torch.no_grad()
def test_scores_and_most_likely_tokens_of_slices_are_those_of_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(distil, "SLICE", 100)
    monkeypatch.setattr(fast, "HEAD_TOKENS", 3)
    head = distil.head_of(pico.lively(pico.model("llama")))
    h_CD = torch.randn(8, head.linear.in_features, generator=torch.Generator().manual_seed(0))
    logp_CV = head(h_CD).log_softmax(-1)
    # two targets of each row: its most likely token, and another token
    at, best_C = torch.arange(8).repeat(2), logp_CV.argmax(-1)
    targets = torch.cat((best_C, (best_C + 150) % 384))
    found, hits = fast._log_probs(head, h_CD, at, targets)
    torch.testing.assert_close(found, logp_CV[at, targets], atol=1e-5, rtol=1e-5)
    assert hits.tolist() == [True] * 8 + [False] * 8
    assert len(set((best_C // 100).tolist())) > 1


def test_it_gives_the_same_on_several_threads(packed):
    judge, before = FastJudge(pico.model("llama"), pico.tokenizer()), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(judge, requests())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


FOLDED_AS = {
    "stand-ins and dropped parts": {
        "stand_ins": [{"layer": 2, "after": False, "kind": "affine", "options": {"width": 32}},
                      {"layer": 3, "after": True, "kind": "affine", "options": {"width": 32, "bypass_above": 9.0}}],
        "dropped_parts": {"attention": [0, 2], "mlp": [1]}, "head_adapter": 3},
    "narrow": {"widths": [{"heads": 2, "kv_heads": 1, "intermediate": 20}] * 4},
    "sliced": {"sliced": {"attention": [12, 16, 32, 32], "mlp": [20, 24, 32, 32], "final": 28},
               "tie_word_embeddings": False},
    "rare rows": {"rare_tokens": {"frequent": 250, "rank": 6}, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("entries", FOLDED_AS.values(), ids=list(FOLDED_AS))
def test_folded_models_are_packed_too(entries, packed, monkeypatch):
    monkeypatch.setattr(fast, "ROW_TOKENS", 64)
    config_class, model_class = FOLDED["llama"]
    given = {key: value for key, value in pico.model("llama", layers=4).config.to_dict().items() if key != "model_type"}
    model = filled(model_class(config_class(**{**given, **entries})).eval())
    if "rare_tokens" in entries:
        model.get_input_embeddings().place.copy_(torch.randperm(384, generator=torch.Generator().manual_seed(0)))
    check(FastJudge(model, pico.tokenizer()), requests())


def test_a_model_that_mixes_neighbouring_tokens_is_scored_by_lm_eval():
    model = pico.model("llama", layers=2)
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args: (args[0] + 0.05 * torch.nn.functional.pad(args[0], (0, 0, 1, 0))[:, :-1], *args[1:]))
    assert not fast.packs(model)
    check(FastJudge(model, pico.tokenizer()), requests())


def test_a_model_of_an_unknown_family_is_scored_by_lm_eval():
    config = GPTJConfig(vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=256, rotary_dim=4)
    model = GPTJForCausalLM(config).eval()
    assert not fast.packs(model)
    check(FastJudge(model, pico.tokenizer()), requests())


def test_greedy_continuations_are_found(packed):
    judge, context = FastJudge(pico.model("llama"), pico.tokenizer()), [5, 9, 200, 31]
    best = judge.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    greedy = best[0, len(context):].tolist()
    given = [(("", str(i)), context, ids) for i, ids in enumerate((greedy, [greedy[0], (greedy[1] + 1) % 384]))]
    assert [hit for _, hit in judge._loglikelihood_tokens(given)] == [True, False]


def test_rolling_text_and_windows_are_lm_evals(packed):
    """Texts longer than the model reads, which lm-eval cuts into windows, beside items that carry token ids."""
    model = pico.model("llama")
    ours, theirs = (judge(model, pico.tokenizer(), max_length=24) for judge in (FastJudge, Judge))
    given = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS[:3]]
    ids = [Instance("loglikelihood_rolling", {"ids": list(range(2 + i, 18 + i))}, ("",), 0) for i in range(3)]
    found = ours.loglikelihood_rolling(given + ids)
    # lm-eval's route is closed above, so its own class answers
    text = HFLM(pretrained=model, backend="causal", tokenizer=pico.tokenizer(), max_length=24)
    assert found[:3] == pytest.approx(text.loglikelihood_rolling(given), abs=1e-4 * 24)
    assert found[3:] == pytest.approx(theirs.loglikelihood_rolling(ids), abs=1e-4)


def test_what_sequences_share_is_run_once():
    """Tokens that are run, counted: one context with its choices, and examples that all prompts begin with."""
    context, choices = tuple(range(10, 30)), [(40, 41, 42), (40, 43), (50,)]
    one = packing.pack([Scored((*context, *ids[:-1]), ids) for ids in choices], 256)
    # the last token of a choice is only predicted: 20 of the context, 40 and 41 of the choices
    assert [(group.prefix, group.tokens) for group in one] == [((), 22)]
    shots = tuple(range(100, 200))
    many = [Scored((*shots, 300 + i, 301 + i, 302 + i), (7,)) for i in range(0, 90, 3)]
    group, = packing.pack(many, 64)
    assert len(group.prefix) == 100 and group.tokens == 100 + 3 * 30
    assert all(len(row.ids_N) <= 64 for row in group.rows)
    assert sorted(number for row in group.rows for number, _ in row.ends) == list(range(30))


def test_rows_are_filled_with_the_choices_of_short_contexts():
    """A short context counts once for its row, so that a row takes as many items as fit."""
    choices = [Scored((first, *range(20, 39), 40, 41 + last), (41 + last, 5))
               for first in range(8) for last in range(4)]
    rows = [row for group in packing.pack(choices, 100) for row in group.rows]
    # a context with its choices has 20 + 1 + 4 tokens, and four of them fill a row
    assert [len(row.ids_N) for row in rows] == [100, 100]


def test_a_token_sees_its_own_path_within_the_window():
    row = packing.pack([Scored((1, 2, 3), (9,)), Scored((1, 2, 4, 5), (9,))], 8)[0].rows[0]
    assert (row.ids_N, row.positions_N) == ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3])
    seen = packing.visible(row, 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert packing.visible(row, 0, 2).int().tolist()[4] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("shots", [0, 2])
def test_real_items_of_every_local_task(shots, llama_folder):
    """The prompts of the real sets, as many as are there, on a pico model that reads at most 64 tokens."""
    data = os.environ.get("KDP_DATA", "")
    names = [name for name, entry in BENCHMARKS.items() if not entry.code and data and all(
        (Path(data) / file).is_file() for file in benchmarks.local_files(name, fewshot=shots))]
    if not names:
        pytest.skip("KDP_DATA names no folder with the local files of docs/benchmarks.md")
    model, tokenizer = checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder)
    ours = FastJudge(model, tokenizer, max_length=64)
    theirs = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, max_length=64, batch_size=8)
    for name in names:
        task = built(Chosen([name], data=data, fewshot=shots), name)
        task.build_all_requests(limit=3)
        kind = task.instances[0].request_type
        if kind == "generate_until":
            continue
        given = [one for one in task.instances if len(tokenizer(one.args[-1])["input_ids"]) <= 60
                 or kind == "loglikelihood_rolling"]
        found, right = (getattr(judge, kind)(given) for judge in (ours, theirs))
        if kind == "loglikelihood":
            assert [hit for _, hit in found] == [hit for _, hit in right], name
            found, right = ([score for score, _ in answers] for answers in (found, right))
        # a rolling score is a sum over many windows, each to 1e-4
        assert found == pytest.approx(right, abs=1e-4, rel=1e-6 if kind == "loglikelihood_rolling" else 0), name
