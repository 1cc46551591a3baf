"""Block influence: beside transformers' own hidden states in NumPy loops, on turns of known angle, ties, exclusions."""
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import ModelFacts
from kdp_core.methods._judge import RankError, ranked
from kdp_core.methods.shortgpt import block_influence
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.states import hidden
from tests import pico
from tests.kdp_core import stored

TOKENS = stored.tokens()
LAYERS = 5


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any
    facts: Any


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    model.save_pretrained(root / "model")
    hidden.extract(model, TOKENS, root / "h.zarr", dtype="float32")
    facts = checkpoints.facts(model, source="pico", sha256="")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"), facts)


@torch.no_grad()
def own_states(model, ids_ST):
    """transformers' states, whose last is after the final norm, and what the last layer itself returns."""
    caught = []
    hook = decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: caught.append(output))
    states = model(ids_ST, output_hidden_states=True).hidden_states
    hook.remove()
    return [h.numpy().astype(np.float64) for h in states], caught[0].numpy().astype(np.float64)


def by_hand(before, after, counts=None):
    """1 - mean cosine, token by token."""
    cosines = []
    for place in np.ndindex(before.shape[:2]):
        if counts is None or counts[place]:
            x, y = before[place], after[place]
            cosines.append(x @ y / math.sqrt((x @ x) * (y @ y)))
    return 1 - sum(cosines) / len(cosines)


@pytest.mark.parametrize("last_state", ["pre_norm", "final_norm"])
def test_influence_is_that_of_the_models_own_states(dense, last_state):
    states, last = own_states(dense.model, TOKENS.ids_ST)
    if last_state == "pre_norm":
        states[-1] = last
    expected = {str(layer): by_hand(states[layer], states[layer + 1]) for layer in range(LAYERS)}
    found = block_influence(dense.folder, dense.hidden, TOKENS, dense.facts, k_max=3, last_state=last_state)
    assert found.single == pytest.approx(expected, abs=1e-5)
    assert found.order == sorted(range(LAYERS), key=lambda layer: expected[str(layer)])
    assert found.scores == pytest.approx(sorted(expected.values()), abs=1e-5)
    assert (found.criterion, found.k_max, found.evaluations) == ("block_influence", 3, 0)
    assert found.stats["tokens"] == 16 * 24 and found.stats["masked"] == found.stats["undefined"] == 0


def test_the_final_norm_moves_the_last_layer_alone(dense):
    raw, normed = (block_influence(dense.folder, dense.hidden, TOKENS, dense.facts, k_max=3, last_state=which)
                   for which in ("pre_norm", "final_norm"))
    assert abs(raw.single[str(LAYERS - 1)] - normed.single[str(LAYERS - 1)]) > 1e-3
    assert {**raw.single, str(LAYERS - 1): 0.0} == {**normed.single, str(LAYERS - 1): 0.0}


def facts_of(layers):
    return ModelFacts("llama", layers, 2, 8, 100, [10] * layers, 100, "pico", "")


def turned(angles):
    """h_LSTD in the plane: every layer turns all states by its angle, and doubles them."""
    start_ST = torch.linspace(0, 3, 12 * 4, dtype=torch.float64).view(12, 4)
    h_LST = torch.stack([start_ST + sum(angles[:layer]) for layer in range(len(angles) + 1)])
    length_L = 2.0 ** torch.arange(len(angles) + 1)
    return (length_L[:, None, None, None] * torch.stack((h_LST.cos(), h_LST.sin()), -1)).float()


def of_states(path, h_LSTD, **options):
    """Nothing is at hand but states: no model is loaded."""
    return block_influence(None, stored.write(path, h_LSTD), None, facts_of(len(h_LSTD) - 1), k_max=2, **options)


def test_a_turn_scores_its_cosine(tmp_path):
    angles = [0.1, 0.7, 0.3, 1.2, 0.2]
    found = of_states(tmp_path / "h.zarr", turned(angles))
    assert found.order == [0, 4, 2, 1, 3]
    assert found.single == pytest.approx({str(k): 1 - math.cos(angle) for k, angle in enumerate(angles)}, abs=1e-6)


def test_ties_go_to_the_lowest_layer():
    found = ranked({3: 0.5, 1: 0.5, 4: 0.25, 2: 0.5}, "ppl", 3, 4, {})
    assert found.order == [4, 1, 2, 3] and found.scores == [0.25, 0.5, 0.5, 0.5]


def test_massive_tokens_are_left_out_before_and_after_a_layer_where_asked(tmp_path):
    h_LSTD = stored.drift(states=5, width=6)
    h_LSTD[2, :, 3] *= 500.0
    h_LSTD[2, :, 3, 0] += 900.0
    case = stored.write(tmp_path / "h.zarr", h_LSTD)
    found = {massive: block_influence(None, case, None, facts_of(4), k_max=2, massive=massive)
             for massive in ("raw", "mask")}
    counts = np.ones((12, 24), dtype=bool)
    everything = {str(k): by_hand(h_LSTD[k].double().numpy(), h_LSTD[k + 1].double().numpy()) for k in range(4)}
    counts[:, 3] = False
    masked = {str(k): by_hand(h_LSTD[k].double().numpy(), h_LSTD[k + 1].double().numpy(), counts) for k in (1, 2)}
    assert found["raw"].single == pytest.approx(everything, abs=1e-6)
    assert found["mask"].single == pytest.approx(everything | masked, abs=1e-6)
    assert found["mask"].stats["masked"] == 2 * 12 and found["raw"].stats["masked"] == 0
    assert masked["1"] != pytest.approx(everything["1"], abs=1e-3)


def test_a_token_without_direction_is_left_out_and_counted(tmp_path):
    h_LSTD = turned([0.1, 0.7, 0.3])
    h_LSTD[1, 0, 0] = 0.0
    found = of_states(tmp_path / "h.zarr", h_LSTD)
    assert found.single == pytest.approx({str(k): 1 - math.cos(a) for k, a in enumerate((0.1, 0.7, 0.3))}, abs=1e-6)
    assert found.stats["undefined"] == 2
    h_LSTD[1] = 0.0
    with pytest.raises(RankError, match="layer 0: no token is left to judge it by"):
        of_states(tmp_path / "none.zarr", h_LSTD)


@pytest.mark.parametrize("options, message", [
    ({"last_state": "post"}, "last_state is 'post'; choose one of pre_norm, final_norm"),
    ({"massive": "bypass"}, "massive is 'bypass'; choose one of raw, mask"),
])
def test_options_that_cannot_be_are_named(dense, options, message):
    with pytest.raises(OptionError, match=message):
        block_influence(None, dense.hidden, TOKENS, dense.facts, k_max=3, **options)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(RankError, match="layer 2: its taylor is nan; try dtype float32"):
        ranked({1: 0.5, 2: float("nan")}, "taylor", 3, 1, {})
