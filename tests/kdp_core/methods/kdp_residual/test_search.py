"""The greedy search: beside exhaustive removal in whole models, and, on made-up costs, beside brute force."""
import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from kdp_core.base.options import OptionError
from kdp_core.methods.kdp_residual import search
from kdp_core.methods.kdp_residual.closed_form import fit_alone
from kdp_core.methods.kdp_residual.dictionaries import closed_form_options
from kdp_core.methods.kdp_residual.search import SearchError, by_divergence
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import built
from kdp_core.states import hidden
from kdp_core.states.similarity import similarity
from tests import pico
from tests.kdp_core import stored

FIT, JUDGE = 12, 4
OPTIONS = {"k_max": 3, "entries": 4, "judge_sequences": JUDGE, "largest": 0.5}


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any
    tokens: Any
    facts: Any


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = pico.lively(pico.model(request.param, layers=6))
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"), stored.tokens(),
                 checkpoints.facts(model, source="pico", sha256=""))


@pytest.fixture(scope="module")
def found(dense):
    return by_divergence(dense.folder, dense.hidden, dense.tokens, dense.facts, **OPTIONS)


def test_by_cka_the_layer_within_the_most_alike_states_goes_first(dense):
    found = by_divergence(dense.folder, dense.hidden, dense.tokens, dense.facts, k_max=2, order="cka", largest=0.7,
                          judge_sequences=10_000)
    cka_LL = similarity(dense.hidden, batch=dense.hidden.sequences * dense.hidden.tokens // 8).cka_linear_LL
    alike = {layer: cka_LL[layer - 1, layer + 1].item() for layer in range(1, 5)}
    assert {int(layer): 1 - value for layer, value in found.single.items()} == pytest.approx(alike)
    best = max(alike, key=alike.get)
    # with k_max 2 no two neighbours are removed
    others = [layer for layer in alike if abs(layer - best) > 1]
    assert found.order[0] == best and all(abs(a - b) > 1 for a, b in itertools.combinations(found.order, 2))
    assert found.order[1] == max(others, key=alike.get) and found.criterion == "cka_linear" and found.evaluations == 0


def test_by_cka_the_given_similarity_is_read_and_no_state(dense):
    cka_LL = torch.eye(7, dtype=torch.float64)
    cka_LL[2, 4], cka_LL[0, 2], cka_LL[3, 5] = 0.9, 0.8, 0.7
    given = similarity(dense.hidden, batch=64)._replace(cka_linear_LL=cka_LL)
    found = by_divergence(dense.folder, dense.hidden._replace(path=dense.hidden.path / "gone"), dense.tokens,
                          dense.facts, k_max=3, order="cka", largest=0.4, similarity=given)
    assert found.order == [3, 1] and found.scores == pytest.approx([0.1, 0.2])


class Instead(nn.Module):
    """A stand-in that takes a decoder layer's arguments."""

    def __init__(self, stand_in, layer):
        super().__init__()
        self.stand_in, self.attention_type = stand_in, getattr(layer, "attention_type", None)

    def forward(self, h, *args, **kwargs):
        return self.stand_in(h)


@torch.no_grad()
def exhaustive(dense, gone, stand_ins, ids_ST):
    """KL(dense || pruned) from the logits of a whole model whose layers were exchanged."""
    model = copy.deepcopy(dense.model)
    layers = decoder_layers(model)
    for layer in gone:
        layers[layer] = Instead(stand_ins[layer], layers[layer])
    logp, logq = (one(ids_ST).logits.flatten(0, 1).log_softmax(-1) for one in (dense.model, model))
    return (kl_div(logq, logp, log_target=True, reduction="sum") / len(logp)).item()


def test_every_pick_is_the_best_of_all(dense, found):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    ids_ST = stored.tokens().ids_ST[order[:JUDGE]]
    fit = closed_form_options(dense.model, dense.hidden, dictionary="neurons", entries=4, seed=0)
    rows = order[JUDGE:].sort().values
    stand_ins = {layer: built(fit_alone(dense.model, dense.hidden, (layer, layer + 1), rows, fit))
                 for layer in range(1, 5)}
    single = {layer: exhaustive(dense, [layer], stand_ins, ids_ST) for layer in range(1, 5)}
    assert {int(layer): value for layer, value in found.single.items()} == pytest.approx(single, rel=1e-3)
    first = min(single, key=single.get)
    pairs = {layer: exhaustive(dense, [first, layer], stand_ins, ids_ST) for layer in single if layer != first}
    assert found.order[:2] == [first, min(pairs, key=pairs.get)]
    expected = [single[first], min(pairs.values()), exhaustive(dense, found.order, stand_ins, ids_ST)]
    assert list(itertools.accumulate(found.scores)) == pytest.approx(expected, rel=1e-3)


def test_what_a_search_says_of_itself(dense, found):
    assert len(found.order) == 3 == len(found.scores) and set(found.order) <= {1, 2, 3, 4} and found.k_max == 3
    assert not any({first, first + 1, first + 2} <= set(found.order) for first in range(6))
    assert 4 < found.evaluations <= 4 + 3 + 2
    assert found.stats["fit_tokens"] == FIT * 24 and found.stats["judge_tokens"] == JUDGE * 24


def test_same_seed_same_search_whatever_the_batch(dense, found):
    again = by_divergence(dense.folder, dense.hidden, dense.tokens, dense.facts, **OPTIONS)
    assert again._replace(stats={}) == found._replace(stats={})
    batched = by_divergence(dense.folder, dense.hidden, dense.tokens, dense.facts, batch_sequences=3, **OPTIONS)
    # closed form is streamed in batches of its own
    assert batched.order == found.order and batched.scores == pytest.approx(found.scores, rel=1e-3)
    other = by_divergence(dense.folder, dense.hidden, dense.tokens, dense.facts, seed=1, **OPTIONS)
    assert other.scores != found.scores


@pytest.mark.parametrize("options, message", [
    ({"judge_sequences": 16}, "judge_sequences 16 of 16 sequences leaves none to fit on"),
    ({"judge_sequences": 0}, "judge_sequences is 0; give a number at least 1"),
    ({"k_max": 1}, "no layer may be removed with k_max 1; raise k_max"),
    ({"largest": 0.0}, r"largest is 0\.0; give a number above 0"),
    ({"largest": 1.0}, r"largest is 1\.0; give a number below 1"),
    ({"dictionary": "words"}, r"dictionary is 'words'; choose one of neurons, rff,"),
    ({"entries": 0}, r"entries is 0; give a number at least 1"),
])
def test_options_that_cannot_be_are_named(dense, options, message):
    with pytest.raises((SearchError, OptionError), match=message):
        by_divergence(None, dense.hidden, dense.tokens, dense.facts, **{**OPTIONS, **options})


# the greedy by itself, on costs made up

def greedy(monkeypatch, cost, eligible, k_max, most):
    monkeypatch.setattr(search, "_divergence", lambda run, gone, layer: cost(frozenset([*gone, layer])))
    monkeypatch.setattr(search, "_advance", lambda run, gone, layer: None)
    return search._greedy(None, eligible, k_max, most)


def brute(cost, eligible, k_max, most):
    """Every layer that may go tried in every round."""
    gone, reached = [], []
    while len(gone) < most:
        open_ = [layer for layer in eligible if layer not in gone and not any(
            set(range(first, first + k_max)) <= {*gone, layer} for first in range(layer - k_max + 1, layer + 1))]
        if not open_:
            break
        gone.append(min(open_, key=lambda layer: (cost(frozenset([*gone, layer])), layer)))
        reached.append(cost(frozenset(gone)))
    return gone, reached


def costs(seed, layers=12, together=0.3):
    """Each layer's own cost, and one for every pair: no removal makes another cheaper."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(layers, generator=generator, dtype=torch.float64).tolist()
    pair = (together * torch.rand(layers, layers, generator=generator, dtype=torch.float64)).tolist()
    return lambda gone: sum(own[layer] for layer in gone) + sum(pair[a][b] for a, b in
                                                                itertools.combinations(sorted(gone), 2))


@pytest.mark.parametrize("k_max", [2, 3, 4])
def test_lazy_is_exhaustive_where_no_removal_makes_another_cheaper(monkeypatch, k_max):
    tried = []
    for seed in range(12):
        order, rises, single, count = greedy(monkeypatch, costs(seed), range(1, 11), k_max, 6)
        expected, reached = brute(costs(seed), range(1, 11), k_max, 6)
        assert order == expected and list(itertools.accumulate(rises)) == pytest.approx(reached)
        assert single == pytest.approx({str(layer): costs(seed)(frozenset([layer])) for layer in range(1, 11)})
        tried.append(count)
    assert max(tried) <= 10 + 9 + 8 + 7 + 6 + 5 and min(tried) < 40


@pytest.mark.parametrize("k_max", [2, 3, 5])
def test_never_k_max_consecutive_layers(monkeypatch, k_max):
    """Also when asked for more layers than may go."""
    for seed in range(8):
        order, *_ = greedy(monkeypatch, costs(seed, together=-0.2), range(1, 11), k_max, 10)
        assert len(set(order)) == len(order) < 10
        assert not any(set(range(first, first + k_max)) <= set(order) for first in range(11))
        rest = set(range(1, 11)) - set(order)
        assert all(any(set(range(first, first + k_max)) <= {*order, layer} for first in range(11)) for layer in rest), \
            "it stops only where none may go"


def test_ties_go_to_the_lowest_layer(monkeypatch):
    assert greedy(monkeypatch, len, range(2, 8), 3, 3)[0] == [2, 3, 5]
