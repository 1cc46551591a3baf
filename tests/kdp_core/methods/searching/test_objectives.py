"""The objectives beside the same numbers from whole models' logits, and the calibration items."""
import itertools
import json

import pytest
import torch

from kdp_core.methods._judge import RankError
from kdp_core.methods._search.objectives import drawn, items_of_file, items_of_text, margins, spaced
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core.methods.searching.whole import IDS_ST, LAYERS, TOKENS, Identity, evaluator, logits

GONE = frozenset([2, 3])


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request):
    return pico.lively(pico.model(request.param, layers=LAYERS))


def test_loss_is_that_of_transformers(model):
    with torch.no_grad():
        dense = model(IDS_ST, labels=IDS_ST).loss.item()
    judged = evaluator(model, "loss")
    assert judged.values[frozenset()] == pytest.approx(dense, abs=1e-4)
    logq = logits(model, GONE, IDS_ST)[:, :-1].log_softmax(-1)
    expected = -logq.gather(-1, IDS_ST[:, 1:, None]).mean().item()
    assert judged.value(GONE) == pytest.approx(expected, abs=1e-4)


def test_nothing_removed_is_no_distance(model):
    assert evaluator(model, "kl").values[frozenset()] == pytest.approx(0, abs=1e-6)
    assert evaluator(model, "last_state").values[frozenset()] == pytest.approx(0, abs=1e-12)


def test_last_state_is_one_minus_the_cosine(model):
    dense, = boundary_states(model, IDS_ST, [LAYERS])
    layers = model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers
    kept = [layers[layer] for layer in GONE]
    for layer in GONE:
        layers[layer] = Identity(layers[layer])
    pruned, = boundary_states(model, IDS_ST, [LAYERS])
    for layer, own in zip(GONE, kept, strict=True):
        layers[layer] = own
    a, b = (h_STD[:, :-1].double().flatten(0, 1) for h_STD in (dense, pruned))
    expected = (1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean().item()
    assert evaluator(model, "last_state").value(GONE) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("goal", ["loss", "kl"])
def test_some_positions_are_read_of_whole_models(model, goal):
    chosen = [6, 11, 17, 22]
    assert spaced(23, 4) == chosen, "up to the last position that predicts one of 24 tokens"
    logp, logq = (logits(model, gone, IDS_ST)[:, chosen].log_softmax(-1) for gone in ([], GONE))
    next_SP1 = IDS_ST[:, [place + 1 for place in chosen]][..., None]
    expected = {"loss": -logq.gather(-1, next_SP1).mean(), "kl": (logp.exp() * (logp - logq)).sum(-1).mean()}[goal]
    assert evaluator(model, goal, positions=4).value(GONE) == pytest.approx(expected.item(), abs=1e-4)
    assert evaluator(model, goal, positions=23).value(GONE) == evaluator(model, goal).value(GONE)


def test_positions_are_spaced_evenly_and_leave_the_first_one_out():
    assert spaced(24, 1) == [23] and spaced(24, 23) == list(range(1, 24))
    gaps = {b - a for a, b in itertools.pairwise(spaced(128, 16))}
    assert gaps <= {7, 8} and spaced(128, 16)[-1] == 127


def test_margin_and_accuracy_are_those_of_whole_models(model):
    items = items_of_text(IDS_ST, 3)
    logq = logits(model, GONE, items.ids_RT).log_softmax(-1)
    found = []
    for item in range(len(IDS_ST)):
        scores = {}
        for row in (items.item_R == item).nonzero().flatten().tolist():
            places = items.choice_RT[row].nonzero().flatten().tolist()
            own = sum(logq[row, place - 1, items.ids_RT[row, place]].item() for place in places) / len(places)
            scores.setdefault(bool(items.right_R[row]), []).append(own)
        found.append(scores[True][0] - max(scores[False]))
    assert evaluator(model, "margin").value(GONE) == pytest.approx(-sum(found) / len(found), abs=1e-4)
    assert evaluator(model, "accuracy").value(GONE) == -sum(one > 0 for one in found) / len(found)


def test_items_of_text_ask_for_the_end_of_a_sequence():
    items = items_of_text(IDS_ST, 3)
    assert items.ids_RT.shape == (15, 24) and items.choice_RT.sum(dim=1).tolist() == [3] * 15
    assert items.right_R.view(5, 3).sum(dim=1).tolist() == [1] * 5
    assert torch.equal(items.ids_RT[items.right_R], IDS_ST)
    for row in range(15):
        item = int(items.item_R[row])
        assert torch.equal(items.ids_RT[row, :-3], IDS_ST[item, :-3])
        assert torch.equal(items.ids_RT[row, -3:], IDS_ST[(item + row % 3) % 5, -3:])
    with pytest.raises(RankError, match="choices is 6, but the ends of only 5 sequences"):
        items_of_text(IDS_ST, 6)


def write(path, entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


ENTRIES = [{"context": "The council met on", "choices": [" monday", "water and rain", "the coast"], "answer": 0},
           {"context": "She had seen the", "choices": ["plan", "night"], "answer": 1}]


def test_items_of_a_file_are_context_and_choice(tmp_path):
    tokenizer = pico.tokenizer()
    items = items_of_file(write(tmp_path / "items.jsonl", ENTRIES), tokenizer, None, 2, 0)
    assert items.item_R.tolist() == [0, 0, 0, 1, 1]
    assert items.right_R.tolist() == [True, False, False, False, True]
    said = ["The council met on monday", "The council met on water and rain", "The council met on the coast",
            "She had seen the plan", "She had seen the night"]
    for row, text in enumerate(said):
        length = int(items.choice_RT[row].nonzero().max()) + 1
        assert tokenizer.decode(items.ids_RT[row, :length]) == text
        assert not items.choice_RT[row, length:].any() and not items.ids_RT[row, length:].any()
        assert text.endswith(tokenizer.decode(items.ids_RT[row][items.choice_RT[row]]))
    begun = items_of_file(tmp_path / "items.jsonl", tokenizer, 7, 1, 1)
    assert begun.ids_RT[:, 0].tolist() == [7, 7] and begun.item_R.tolist() == [0, 0], "the second draw of one item"


def test_padding_changes_no_margin(tmp_path):
    model, tokenizer = pico.lively(pico.model("llama", layers=LAYERS)), pico.tokenizer()
    together = items_of_file(write(tmp_path / "both.jsonl", ENTRIES), tokenizer, None, 2, 0)
    for number, entry in enumerate(ENTRIES):
        alone = items_of_file(write(tmp_path / "one.jsonl", [entry]), tokenizer, None, 1, 0)
        found = []
        for items in (together, alone):
            judged = evaluator(model, "kl", ids_ST=items.ids_RT)
            found.append(margins(judged.passes, boundary_states(model, items.ids_RT, [LAYERS])[0], items))
        assert found[0][number].item() == pytest.approx(found[1].item(), abs=1e-4)


@pytest.mark.parametrize("entries, message", [
    ([{"context": "a", "choices": ["b", "c"]}], "cannot be read as JSON lines with context, choices and answer"),
    ([{"context": "a", "choices": ["b"], "answer": 0}], "item 0 has 1 choices and the answer 0"),
    ([{"context": "a", "choices": ["b", "c"], "answer": 2}], "item 0 has 2 choices and the answer 2"),
    ([], "has 0 items, and draw 0 of 1 needs 1"),
])
def test_entries_that_are_no_items_are_named(tmp_path, entries, message):
    with pytest.raises(RankError, match=message):
        items_of_file(write(tmp_path / "items.jsonl", entries), pico.tokenizer(), None, 1, 0)


def test_draws_are_disjoint_and_in_their_own_order():
    draws = [drawn(TOKENS, 5, draw) for draw in range(3)]
    rows = [[TOKENS.ids_ST.tolist().index(row) for row in draw.tolist()] for draw in draws]
    assert all(row == sorted(row) for row in rows) and len({place for row in rows for place in row}) == 15
    with pytest.raises(RankError, match=r"draw 3 of 5 sequences needs 20 calibration sequences, and there are 16"):
        drawn(TOKENS, 5, 3)
    with pytest.raises(RankError, match="sequences of 1 tokens have no next token"):
        drawn(TOKENS._replace(ids_ST=TOKENS.ids_ST[:, :1]), 5, 0)
