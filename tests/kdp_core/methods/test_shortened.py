"""Shortened LLaMA: perplexities of whole models without a layer, gradients of a whole backward pass, plain sums."""
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.methods._judge import RankError
from kdp_core.methods.shortened import magnitude, perplexity, taylor
from kdp_core.model import checkpoints, distil
from kdp_core.model.families import family_of
from kdp_core.model.passes import Passes
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.methods.searching.whole import without

LAYERS, SEQUENCES = 6, 7
TOKENS = stored.tokens()
KEPT = {"k_max": 2, "keep_first": 1, "keep_last": 2}
DATA = {**KEPT, "sequences": SEQUENCES, "batch_sequences": 3}
MAY_GO = range(1, 4)


class Dense(NamedTuple):
    """A checkpoint."""
    folder: Any
    model: Any
    facts: Any


@pytest.fixture(scope="module", params=["llama", "opt", "qwen3", "gemma3_text"])
def dense(request, tmp_path_factory):
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return Dense(folder, model, checkpoints.facts(model, source="pico", sha256=""))


def judged():
    return TOKENS.ids_ST[torch.randperm(16, generator=torch.Generator().manual_seed(0))[:SEQUENCES]]


@torch.no_grad()
def whole_ppl(model, gone):
    """exp of the loss that transformers itself gives of the whole model without some layers."""
    return without(model, gone)(judged(), labels=judged()).loss.exp().item()


def weights(dense, layer):
    """Names and gains of a layer's weights in NumPy, by name: norms of Gemma multiply by 1 + w."""
    prefix = f"{family_of(dense.facts.family).prefix}{layer}."
    for name, parameter in dense.model.named_parameters():
        if name.startswith(prefix) and name.endswith(".weight"):
            gain = parameter.detach().numpy().astype(np.float64)
            yield parameter, gain + 1 if "norm" in name and dense.facts.family == "gemma3_text" else gain


def assert_ranking(found, expected, criterion, evaluations):
    """The scores, and the order from the lowest of the expected ones."""
    assert found.single == pytest.approx({str(layer): score for layer, score in expected.items()}, rel=1e-4)
    assert found.order == sorted(expected, key=expected.get)
    assert found.scores == pytest.approx(sorted(expected.values()), rel=1e-4)
    assert (found.criterion, found.k_max, found.evaluations) == (criterion, 2, evaluations)


def test_perplexity_is_that_of_the_whole_model_without_the_layer(dense):
    found = perplexity(dense.folder, None, TOKENS, dense.facts, **DATA)
    assert_ranking(found, {layer: whole_ppl(dense.model, [layer]) for layer in MAY_GO}, "ppl", 3)
    assert found.stats["dense_ppl"] == pytest.approx(whole_ppl(dense.model, []), rel=1e-4)
    assert found.stats["tokens"] == SEQUENCES * 24 and found.stats["sequences"] == SEQUENCES


def test_perplexity_of_the_first_and_the_last_layer(dense):
    found = perplexity(dense.folder, None, TOKENS, dense.facts, **DATA | {"keep_first": 0, "keep_last": 0})
    assert {layer: found.single[str(layer)] for layer in (0, 5)} == pytest.approx(
        {layer: whole_ppl(dense.model, [layer]) for layer in (0, 5)}, rel=1e-4)
    assert sorted(found.order) == list(range(LAYERS))


@pytest.fixture(scope="module")
def first_order(dense):
    """sum |W dL/dW| of every layer from one backward pass of the whole model."""
    dense.model.zero_grad()
    dense.model(judged(), labels=judged()).loss.backward()
    sums = {layer: sum(np.abs(gain * parameter.grad.numpy()).sum() for parameter, gain in weights(dense, layer))
            for layer in range(LAYERS)}
    dense.model.zero_grad()
    return sums


def test_taylor_is_one_backward_pass_over_all_sequences(dense, first_order):
    found = taylor(dense.folder, None, TOKENS, dense.facts, **DATA)
    assert_ranking(found, {layer: first_order[layer] for layer in MAY_GO}, "taylor", 1)
    assert found.stats["tokens"] == SEQUENCES * 24


def test_taylor_of_one_batch_runs_each_layer_once(dense, first_order, monkeypatch):
    ran, layer = [], Passes.layer
    monkeypatch.setattr(Passes, "layer", lambda passes, number, h: ran.append(number) or layer(passes, number, h))
    found = taylor(dense.folder, None, TOKENS, dense.facts, **DATA | {"batch_sequences": SEQUENCES})
    assert ran == list(range(LAYERS))
    assert_ranking(found, {layer: first_order[layer] for layer in MAY_GO}, "taylor", 1)


def test_taylor_of_all_layers_with_the_head_in_chunks(dense, first_order, monkeypatch):
    monkeypatch.setattr(distil, "CHUNK_NUMBERS", 384 * 7)
    found = taylor(dense.folder, None, TOKENS, dense.facts, **DATA | {"keep_first": 0, "keep_last": 0})
    assert_ranking(found, first_order, "taylor", 1)


@pytest.mark.parametrize("norm, size", [("l1", np.abs), ("l2", np.square)])
def test_magnitude_is_a_sum_over_weights_without_biases(dense, norm, size):
    found = magnitude(dense.folder, None, None, dense.facts, norm=norm, **KEPT)
    expected = {layer: sum(size(gain).sum() for _, gain in weights(dense, layer)) for layer in MAY_GO}
    assert_ranking(found, expected, f"magnitude_{norm}", 0)


def test_by_default_the_first_four_and_the_last_two_stay():
    with pytest.raises(RankError, match=r"keep_first 4 and keep_last 2 of 6 layers leave none that may be removed"):
        magnitude(None, None, None, checkpoints.facts(pico.model("llama", layers=6), source="", sha256=""), k_max=2)


@pytest.mark.parametrize("rank", [perplexity, taylor, magnitude])
@pytest.mark.parametrize("options, message", [
    ({"keep_first": 4, "keep_last": 2}, r"search\.keep_first 4 and keep_last 2 of 6 layers leave none"),
    ({"keep_first": -1}, "keep_first is -1; give a number at least 0"), ({"keep_last": -1}, "keep_last is -1; "),
])
def test_layers_kept_beyond_reason_are_named_before_the_model_is_read(dense, rank, options, message):
    with pytest.raises(ValueError, match=message):
        rank(None, None, TOKENS, dense.facts, **KEPT | options)


def test_other_options_that_cannot_be_are_named(dense):
    with pytest.raises(OptionError, match="norm is 'max'; choose one of l1, l2"):
        magnitude(None, None, None, dense.facts, norm="max", **KEPT)
    for rank in (perplexity, taylor):
        with pytest.raises(OptionError, match="sequences is 0; give a number at least 1"):
            rank(None, None, TOKENS, dense.facts, **DATA | {"sequences": 0})
