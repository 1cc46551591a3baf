"""SLEB: beside whole models with layers exchanged for the identity, all candidates of all rounds; ties; refusals."""
import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.methods import sleb
from kdp_core.methods._judge import RankError, judge_of, loss_nats, picked
from kdp_core.methods.sleb import greedy
from kdp_core.model import checkpoints, distil
from kdp_core.model.families import decoder_layers
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.methods.searching.whole import without

LAYERS, SEQUENCES = 6, 6
TOKENS = stored.tokens()
OPTIONS = {"k_max": 2, "sequences": SEQUENCES, "largest": 0.5, "batch_sequences": 4}


class Dense(NamedTuple):
    """A checkpoint."""
    folder: Any
    model: Any
    facts: Any


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3_text"])
def dense(request, tmp_path_factory):
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return Dense(folder, model, checkpoints.facts(model, source="pico", sha256=""))


@pytest.fixture(scope="module")
def found(dense):
    return greedy(dense.folder, None, TOKENS, dense.facts, **OPTIONS)


@torch.no_grad()
def whole_loss(model, gone, ids_ST):
    """The loss that transformers itself gives of the whole model without some layers."""
    return without(model, gone)(ids_ST, labels=ids_ST).loss.item()


def judged(seed=0, sequences=SEQUENCES):
    return TOKENS.ids_ST[torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:sequences]]


def test_every_pick_is_the_best_of_all_candidates_of_its_round(dense, found):
    losses = [whole_loss(dense.model, [], judged())]
    gone, single = [], {}
    for _ in range(3):
        tried = {layer: whole_loss(dense.model, [*gone, layer], judged())
                 for layer in range(1, LAYERS - 1) if layer not in gone}
        single = single or {str(layer): loss - losses[0] for layer, loss in tried.items()}
        gone.append(min(tried, key=tried.get))
        losses.append(tried[gone[-1]])
    assert found.order == gone
    assert found.scores == pytest.approx([after - before for before, after in itertools.pairwise(losses)], abs=1e-4)
    assert found.single == pytest.approx(single, abs=1e-4)
    assert found.stats["dense_nats"] == pytest.approx(losses[0], abs=1e-4)


def test_what_a_search_says_of_itself(found):
    assert (found.criterion, found.k_max, found.evaluations) == ("loss", 2, 4 + 3 + 2)
    assert found.stats["tokens"] == SEQUENCES * 24 and found.stats["sequences"] == SEQUENCES


def test_the_ends_stay_however_many_are_asked_for(dense):
    found = greedy(dense.folder, None, TOKENS, dense.facts, **OPTIONS | {"largest": 0.99, "sequences": 2})
    assert sorted(found.order) == list(range(1, LAYERS - 1)) and found.evaluations == 4 + 3 + 2 + 1
    assert found.stats["dense_nats"] + sum(found.scores) == pytest.approx(
        whole_loss(dense.model, found.order, judged(sequences=2)), abs=1e-4)


def test_batches_and_chunks_of_the_head_do_not_matter(dense, found, monkeypatch):
    monkeypatch.setattr(distil, "CHUNK_NUMBERS", 384 * 7)
    again = greedy(dense.folder, None, TOKENS, dense.facts, **OPTIONS | {"batch_sequences": 1})
    assert again.order == found.order and again.scores == pytest.approx(found.scores, abs=1e-4)


def test_states_kept_are_those_of_the_pruned_model(dense):
    """Layer after layer goes; whatever layer the loss then starts at, it is that of the whole pruned model."""
    judge = judge_of(dense.model, judged(), 4)
    for gone in ([3], [3, 1], [3, 1, 2]):
        left = [layer for layer in range(LAYERS) if layer not in gone]
        sleb._advance(judge, left, gone[-1])
        assert sorted(judge.states) == left
        for start in left:
            later = [layer for layer in left if layer >= start]
            assert loss_nats(judge, start, later) == pytest.approx(whole_loss(dense.model, gone, judged()), abs=1e-4)


def test_ties_go_to_the_lowest_layer(tmp_path):
    """Where no layer does anything, all losses are equal to the bit."""
    model = pico.model("llama", layers=LAYERS)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    found = greedy(tmp_path / "model", None, TOKENS, checkpoints.facts(model, source="pico", sha256=""), **OPTIONS)
    assert found.order == [1, 2, 3] and found.scores == [0.0, 0.0, 0.0]


def test_sequences_are_drawn_by_the_seed_in_their_own_order():
    some, others = (picked(TOKENS, 5, seed).tolist() for seed in (0, 1))
    rows = [TOKENS.ids_ST.tolist().index(row) for row in some]
    assert rows == sorted(set(rows)) and len(rows) == 5 and some != others
    for everything in (None, 16, 99):
        assert torch.equal(picked(TOKENS, everything, 0), TOKENS.ids_ST)


@pytest.mark.parametrize("options, message", [
    ({"largest": 0.0}, r"largest is 0\.0; give a number above 0"),
    ({"largest": 1.0}, r"largest is 1\.0; give a number below 1"),
    ({"largest": 0.05}, r"search\.largest 0\.05 of 6 layers: none may be removed"),
    ({"sequences": 0}, "sequences is 0; give a number at least 1"),
    ({"batch_sequences": 0}, "batch_sequences is 0; give a number at least 1"),
])
def test_options_that_cannot_be_are_named_before_the_model_is_read(dense, options, message):
    with pytest.raises(ValueError, match=message):
        greedy(None, None, TOKENS, dense.facts, **OPTIONS | options)


def test_models_and_sequences_too_short_are_refused(dense):
    with pytest.raises(RankError, match="of 2 layers: none may be removed"):
        greedy(None, None, TOKENS, dense.facts._replace(layers=2), **OPTIONS)
    short = TOKENS._replace(ids_ST=TOKENS.ids_ST[:, :1])
    with pytest.raises(RankError, match="sequences of 1 tokens have no next token"):
        greedy(None, None, short, dense.facts, **OPTIONS)


def test_a_loss_that_is_no_number_is_refused(dense):
    model = copy.deepcopy(dense.model)
    with torch.no_grad():
        next(decoder_layers(model)[2].parameters()).fill_(float("nan"))
    judge = judge_of(dense.model, judged(), 4)
    with pytest.raises(RankError, match="the loss from layer 1 through 5 layers is nan; try dtype float32"):
        loss_nats(judge._replace(passes=judge_of(model, judged(), 4).passes), 1, range(1, LAYERS))
