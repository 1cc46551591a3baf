"""The estimate Var_p(Dz) / (2 T^2): its order and its T^2 beside the exact KL, and the rankings made of it."""
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods._judge import RankError
from kdp_core.methods._search.objectives import drawn
from kdp_core.methods._select import BlockError
from kdp_core.methods.searching.fragility import compose, estimated_kl, estimates, rank
from kdp_core.model import checkpoints
from kdp_core.model.distil import head_of, to_head
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.sizes import part_params
from kdp_core.model.surgery import drop_parts
from kdp_core.states.block import FitError
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core.methods.searching.whole import LAYERS, TOKENS, logits

OPTIONS = {"sequences": 4, "positions": 6, "batch_sequences": 3}
CHOSEN = [23 - (5 - i) * 23 // 6 for i in range(6)]


# the estimate -------------------------------------------------------------------------------------------------------

def kl(z_NV, other_NV, temperature):
    """KL(softmax(z / T) || softmax(z' / T)) of each token, term by term."""
    p_NV, q_NV = ((one / temperature).softmax(dim=-1) for one in (z_NV.double(), other_NV.double()))
    return (p_NV * (p_NV / q_NV).log()).sum(dim=-1)


def made_up(seed, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    z_NV, d_NV = (torch.randn(8, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    return 2 * z_NV, size * d_NV


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_halving_the_change_divides_the_error_by_eight(temperature, seed):
    z_NV, d_NV = made_up(seed, size=0.02 * temperature)
    errors = [(kl(z_NV, z_NV + scale * d_NV, temperature) - estimated_kl(z_NV, z_NV + scale * d_NV, temperature)).abs()
              for scale in (1.0, 0.5, 0.25)]
    for error, half in itertools.pairwise(errors):
        assert (error.sum() / half.sum()).item() == pytest.approx(8, rel=0.1)


def test_halving_the_change_divides_the_error_by_eight_for_a_models_own_logits():
    """Dz of a removed layer of a model, scaled down until the third order decides."""
    model = pico.lively(pico.model("llama", layers=LAYERS))
    z_NV, other_NV = (logits(model, gone, TOKENS.ids_ST[:2]).flatten(0, 1).double() for gone in ([], [3]))
    d_NV = other_NV - z_NV
    errors = [(kl(z_NV, z_NV + scale * d_NV, 1.0) - estimated_kl(z_NV, z_NV + scale * d_NV, 1.0)).sum().abs().item()
              for scale in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.15)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 4.0])
def test_the_square_of_the_temperature_is_what_the_exact_divergence_has(temperature):
    """The power of T that fits the exact KL beside Var_p(Dz) / 2 is 2, whatever T is; p is itself a function of T."""
    z_NV, d_NV = made_up(0, size=1e-3 * temperature)
    exact = kl(z_NV, z_NV + d_NV, temperature)
    half_variance = estimated_kl(z_NV, z_NV + d_NV, temperature) * temperature ** 2
    power = (half_variance / exact).log() / math.log(temperature)
    assert power.tolist() == pytest.approx([2.0] * 8, abs=2e-3)
    assert torch.allclose(estimated_kl(z_NV, z_NV + d_NV, temperature), exact, rtol=2e-3)


def test_a_lower_temperature_is_not_always_more_fragile():
    """1/T^2 grows, but Var_p shrinks as p becomes one peak: at a low T the divergence of such a token falls."""
    z_NV = torch.tensor([[4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    other_NV = z_NV + torch.tensor([[0.0, 0.1, 0.0, 0.0]], dtype=torch.float64)
    found = [kl(z_NV, other_NV, temperature).item() for temperature in (2.0, 1.0, 0.25)]
    assert found[1] > found[2] and found[0] > found[1]


def test_a_change_of_all_logits_alike_is_none():
    z_NV, _ = made_up(1)
    assert estimated_kl(z_NV, z_NV + 3.0, 1.0).abs().max() < 1e-12


# the rankings -------------------------------------------------------------------------------------------------------

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


def judged():
    return drawn(TOKENS, 4, 0)


def expected(z_BTV, other_BTV):
    return estimated_kl(z_BTV[:, CHOSEN].flatten(0, 1), other_BTV[:, CHOSEN].flatten(0, 1), 0.7).mean().item()


def made(model, units, at):
    return estimates(model, judged(), units, temperature=0.7, at=at, positions=6, batch_sequences=3)


def test_estimates_at_the_output_are_those_of_whole_models(dense):
    found = made(dense.model, [(1, "whole"), (3, "whole")], "output")
    z = logits(dense.model, [], judged())
    assert found == pytest.approx({(layer, "whole"): expected(z, logits(dense.model, [layer], judged()))
                                   for layer in (1, 3)}, rel=1e-3)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_estimates_of_parts_are_those_of_models_without_them(dense, part):
    found, z = made(dense.model, [(2, part)], "output")[2, part], logits(dense.model, [], judged())
    pruned = checkpoints.load_model(dense.folder)
    drop_parts(pruned, {part: [2]})
    assert found == pytest.approx(expected(z, logits(pruned, [], judged())), rel=1e-3)


@torch.no_grad()
def test_estimates_at_the_layer_are_those_of_neighbouring_states_through_the_head(dense):
    states = boundary_states(dense.model, judged(), list(range(LAYERS + 1)))
    found = made(dense.model, [(layer, "whole") for layer in range(LAYERS)], "layer")
    z = [head_of(dense.model)(to_head(dense.model, h_BTD)) for h_BTD in states]
    for layer in range(LAYERS):
        assert found[layer, "whole"] == pytest.approx(expected(z[layer + 1], z[layer]), rel=1e-3)


def test_layers_are_ordered_by_their_estimates(dense):
    found = rank(dense.folder, None, TOKENS, dense.facts, k_max=2, temperature=0.7, **OPTIONS)
    scores = made(dense.model, [(layer, "whole") for layer in range(1, 5)], "layer")
    assert found.order == [layer for layer, _ in sorted(scores, key=scores.get)]
    assert found.single == pytest.approx({str(layer): score for (layer, _), score in scores.items()}, rel=1e-4)
    assert (found.criterion, found.stats["temperature"], found.stats["tokens"]) == ("fragility", 0.7, 24)


def test_temperature_and_place_change_the_scores(dense):
    found = [rank(dense.folder, None, TOKENS, dense.facts, k_max=2, **OPTIONS | more).single
             for more in ({}, {"temperature": 2.0}, {"at": "output"}, {"draw": 1}, {})]
    assert found[0] == found[4] and all(found[0] != other for other in found[1:4])


def parts_of(dense, ratio, **more):
    return compose(dense.folder, None, TOKENS, Selection([], [], "weights", ratio, ratio, 0.9, 3, [], 0),
                   **OPTIONS | more)


def test_parts_are_removed_from_one_list_up_to_the_ratio(dense):
    found = parts_of(dense, 0.2)
    order = found.stats["order"]
    values = [entry["estimate"] for entry in order]
    assert values == sorted(values) and len(order) == 2 * LAYERS
    removed = {(entry["layer"], entry["part"]) for entry in order[:found.stats["removed"]]}
    told = {(layer, one) for layer, part in found.plan.drop
            for one in (("attention", "mlp") if part == "whole" else (part,))}
    assert told == removed
    layers, family = decoder_layers(dense.model), family_of(dense.model)
    share = sum(part_params(layers[layer], family, part) for layer, part in removed) / dense.facts.params_total
    assert abs(share - 0.2) < 0.03


def test_only_the_named_parts_are_removed(dense):
    assert {part for _, part in parts_of(dense, 0.1, parts=["attention"]).plan.drop} == {"attention"}


@pytest.mark.parametrize("ratio, options, message", [
    (0.2, {"positions": 24}, "positions is 24, but sequences have 24 tokens"),
    (0.2, {"sequences": 17}, "draw 0 of 17 sequences needs 17 calibration sequences, and there are 16"),
    (0.2, {"temperature": 0}, "temperature is 0; give a number above 0"),
    (0.2, {"at": "head"}, "at is 'head'; choose one of layer, output"),
    (0.2, {"parts": ["norm"]}, "parts is .'norm'.; choose one of attention, mlp"),
    (0.89, {"parts": ["attention"]}, "ratio 0.89 is too high: all that fragility_parts can remove"),
])
def test_options_that_cannot_be_are_named(dense, ratio, options, message):
    with pytest.raises((RankError, OptionError, BlockError), match=message):
        parts_of(dense, ratio, **options)


def test_models_whose_parts_read_the_same_state_are_refused(tmp_path):
    pico.model("gpt_neox", layers=LAYERS).save_pretrained(tmp_path / "model")
    with pytest.raises(FitError, match="fragility_parts cannot remove parts of this gpt_neox model: attention and MLP"):
        parts_of(Dense(tmp_path / "model", None, None), 0.2)
