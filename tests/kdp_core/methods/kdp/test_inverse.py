"""Step 2: equation 6 by hand, the standardisation absorbed, the folded block equal to its steps."""
import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import erf

from kdp_core.base.options import OptionError
from kdp_core.base.records import Inverse, KernelMap
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp import inverse, kernel
from kdp_core.methods.kdp.features import chain, features_of
from kdp_core.methods.kdp.inverse import Network, equation_6, to_module
from kdp_core.model.stand_ins import MODULES
from kdp_core.states.block import load
from tests.kdp_core import stored

SMALL = dict(width=16, epochs=3, batch=32, heldout=0.2)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    return stored.of_pico(tmp_path_factory.mktemp("pico") / "h.zarr")


@pytest.fixture(scope="module")
def step_1(hidden):
    return kernel.fit(hidden, (4, 6), features=32, rank=2, epochs=2, heldout=0.2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made_up(lift="raw", bypass_above=None, activation="gelu", D=6, M=8, H=5):
    """Records of both steps with random tensors, operators far from commuting."""
    operators_KFF = torch.eye(2 * M) + 0.3 * randn(3, 2 * M, 2 * M, seed=3)
    step_1 = KernelMap((2, 5), randn(D, M, seed=1), 3 * randn(M, seed=2), operators_KFF, torch.ones(3), lift,
                       bypass_above, [], {})
    step_2 = Inverse((2, 5), randn(H, 2 * M, seed=4), randn(H, seed=5), randn(D, H, seed=6), randn(D, seed=7), 2.5,
                     activation, [], {})
    return step_1, step_2


ACTIVATIONS = {"gelu": lambda u: u * (1 + erf(u / math.sqrt(2))) / 2, "silu": lambda u: u / (1 + np.exp(-u)),
               "relu": lambda u: np.maximum(u, 0)}


def stepwise(step_1, step_2, h):
    """alpha * (W2 act(W1 A_k .. A_1 phi(h) + b1) + b2), one step at a time, NumPy float64."""
    part = {name: value.double().numpy() for record in (step_1, step_2) for name, value in record._asdict().items()
            if isinstance(value, torch.Tensor)}
    h = h.double().numpy()
    x = h / np.sqrt(np.mean(h ** 2, axis=-1, keepdims=True)) if step_1.lift_input == "rms" else h
    angle = x @ part["omega_DM"] + part["b_M"]
    z = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / math.sqrt(len(part["b_M"]))
    for a_FF in part["operators_KFF"]:
        z = z @ a_FF.T
    act = ACTIVATIONS[step_2.activation]
    return step_2.alpha * (act(z @ part["w1_HF"].T + part["b1_H"]) @ part["w2_DH"].T + part["b2_D"])


def folded(module):
    made = MODULES[module.kind](**module.options)
    made.load_state_dict(module.tensors)
    return made


def same_bits(one, other):
    return all(torch.equal(value, getattr(other, name)) for name, value in one._asdict().items()
               if isinstance(value, torch.Tensor)) and one.alpha == other.alpha


@pytest.mark.parametrize("lift", ["raw", "rms"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_folded_block_is_the_chain_of_its_steps(lift, activation):
    step_1, step_2 = made_up(lift, activation=activation)
    module = to_module(step_1, step_2)
    h = randn(2, 7, 6, seed=8)
    expected = stepwise(step_1, step_2, h)
    assert module.kind == "rff_mlp" and module.block == (2, 5)
    np.testing.assert_allclose(folded(module)(h).detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())
    backwards = step_1._replace(operators_KFF=step_1.operators_KFF.flip(0))
    assert np.abs(stepwise(backwards, step_2, h) - expected).max() > 0.1 * np.abs(expected).max()


def test_massive_tokens_pass_the_folded_block_unchanged():
    step_1, step_2 = made_up(bypass_above=10.0)
    h = randn(2, 7, 6, seed=9)
    h[0, 0], h[1, 3] = 100.0, -50.0
    out, free = folded(to_module(step_1, step_2))(h), folded(to_module(step_1._replace(bypass_above=None), step_2))(h)
    massive = h.norm(dim=-1) > 10
    assert massive.sum() == 2 and torch.equal(out[massive], h[massive]) and not torch.equal(free[massive], h[massive])
    assert torch.equal(out[~massive], free[~massive])


def test_equation_6_and_both_readings_of_its_norm_term():
    predicted, h = randn(5, 4, seed=10), randn(5, 4, seed=11)
    p, t = predicted.double().numpy(), h.double().numpy()
    error = sum(float(np.sum((p[n] - t[n]) ** 2)) for n in range(5)) / 5 / 4
    relative = sum(float(np.sum((p[n] - t[n]) ** 2) / np.sum(t[n] ** 2)) for n in range(5)) / 5
    gap = sum(float((np.linalg.norm(p[n]) / np.linalg.norm(t[n]) - 1) ** 2) for n in range(5)) / 5
    assert equation_6(predicted, h).item() == pytest.approx(error, rel=1e-5)
    assert equation_6(predicted, h, unit=2.0).item() == pytest.approx(error / 4, rel=1e-5)
    assert equation_6(predicted, h, "relative").item() == pytest.approx(error + relative, rel=1e-5)
    assert equation_6(predicted, h, "gap", 2.0).item() == pytest.approx(error / 4 + gap, rel=1e-5)
    turned = h.roll(1, dims=1)  # of the same norms
    assert equation_6(turned, h, "gap").item() == pytest.approx(equation_6(turned, h).item(), rel=1e-5)


@pytest.mark.parametrize("standardise", [True, False])
def test_record_holds_the_network_with_its_standardisation_absorbed(standardise):
    z_NF, h_ND = 0.01 * randn(40, 16, seed=12) + 0.2, 30 * randn(40, 6, seed=13) + 5
    torch.manual_seed(0)
    network = Network(z_NF, h_ND, 5, "gelu", standardise)
    with torch.no_grad():
        network.alpha.fill_(1.3)
        expected = network(z_NF).double().numpy()
    step_1 = made_up()[0]
    record = inverse._absorbed(network, step_1, "gelu", [], {})
    u = z_NF.double().numpy() @ record.w1_HF.double().numpy().T + record.b1_H.double().numpy()
    by_hand = ACTIVATIONS["gelu"](u) @ record.w2_DH.double().numpy().T + record.b2_D.double().numpy()
    np.testing.assert_allclose(record.alpha * by_hand, expected, atol=1e-4 * np.abs(expected).max())
    unit = (h_ND - h_ND.mean(0)).square().mean().sqrt().item() if standardise else 1.0
    assert record.alpha == pytest.approx(1.3 * unit)


def test_whole_way_back_by_hand(hidden, step_1):
    """Held-out error of the record, and of the folded module, as the fit reports it."""
    found = inverse.fit(hidden, step_1, **SMALL)
    split = load(hidden, (4, 6), massive="bypass", heldout=0.2, seed=0)
    h_KND = split.tokens(split.heldout)
    target = h_KND[-1].double().numpy()
    for predicted in (stepwise(step_1, found, h_KND[0]), folded(to_module(step_1, found))(h_KND[0]).detach().numpy()):
        error = np.sum((predicted - target) ** 2) / np.sum((target - target.mean(axis=0)) ** 2)
        assert error == pytest.approx(found.stats["heldout_error"], rel=1e-3)
    assert found.stats["heldout_error"] == min(row["heldout_error"] for row in found.curve)
    assert found.stats["tokens"] == split.keep_ST[split.train].sum()


def test_training_brings_held_out_states_back(hidden, step_1):
    found = inverse.fit(hidden, step_1, **SMALL | {"epochs": 30})
    first, last = found.curve[0], found.curve[-1]
    assert last["heldout_error"] < 0.8 * first["heldout_error"] and last["heldout_error"] < 1
    assert last["loss"] < first["loss"] and last["heldout_loss"] < first["heldout_loss"]
    assert [row["epoch"] for row in found.curve] == list(range(1, 31))
    assert set(last) == {"epoch", "seconds", "loss", "heldout_loss", "heldout_error"}
    assert (found.w1_HF.shape, found.w2_DH.shape, found.block) == ((16, 32), (32, 16), (4, 6))


def test_weights_of_the_best_epoch_are_kept_or_of_the_last_one_where_asked(hidden, step_1):
    """At a rate that throws training about, so that the last epoch is not the best."""
    options = SMALL | {"epochs": 8, "lr": 0.3}
    best, last = (inverse.fit(hidden, step_1, **options, keep=keep) for keep in ("best", "last"))
    errors = [row["heldout_error"] for row in best.curve]
    assert errors == [row["heldout_error"] for row in last.curve] and min(errors) < errors[-1]
    assert best.stats["heldout_error"] == min(errors) and last.stats["heldout_error"] == errors[-1]
    again = inverse.fit(hidden, step_1, **options | {"epochs": 1 + errors.index(min(errors))}, keep="last")
    assert torch.equal(best.w1_HF, again.w1_HF) and torch.equal(best.b2_D, again.b2_D) and best.alpha == again.alpha


def test_standardising_speeds_up_the_printed_recipe(hidden, step_1):
    with_it, without = (inverse.fit(hidden, step_1, **SMALL | {"epochs": 10}, standardise=choice).stats["heldout_error"]
                        for choice in (True, False))
    assert with_it < without


def test_untrained_network_starts_at_the_mean_of_the_target(hidden, step_1):
    found = inverse.fit(hidden, step_1, **SMALL | {"epochs": 0})
    split = load(hidden, (4, 6), massive="bypass", heldout=0.2, seed=0)
    h_ND = split.tokens(split.train)[-1]
    torch.testing.assert_close(found.alpha * found.b2_D, h_ND.mean(0), atol=1e-4, rtol=1e-4)
    assert found.alpha == pytest.approx(h_ND.var(0, correction=0).mean().sqrt().item(), rel=1e-4) and found.curve == []


@pytest.mark.parametrize("activation", inverse.ACTIVATIONS)
def test_the_start_by_ridge_is_the_least_squares_map_of_its_rank(hidden, step_1, activation):
    split = load(hidden, (4, 6), massive="bypass", heldout=0.2, seed=0)
    h_KND = split.tokens(split.train).double()
    phi_NF = features_of(h_KND[0].float(), step_1.omega_DM, step_1.b_M).double()
    z_NF, target_ND = phi_NF @ chain(step_1.operators_KFF).T, h_KND[-1] - h_KND[-1].mean(0)
    centred_NF = z_NF - z_NF.mean(0)
    level = inverse.RIDGE * centred_NF.square().sum(0).mean()
    w_FD = torch.linalg.solve(centred_NF.T @ centred_NF + level * torch.eye(32), centred_NF.T @ target_ND)
    found = inverse.fit(hidden, step_1, **SMALL | {"epochs": 0, "width": 9, "activation": activation}, start="ridge")
    # the best map of rank 4, for a width of 9
    u_NR, s_R, v_RD = torch.linalg.svd(centred_NF @ w_FD, full_matrices=False)
    best_ND = u_NR[:, :4] * s_R[:4] @ v_RD[:4] + h_KND[-1].mean(0)
    act = {"tanh": torch.tanh, "relu": torch.relu}.get(activation) or getattr(torch.nn.functional, activation)
    made_ND = found.alpha * (act(z_NF @ found.w1_HF.double().T + found.b1_H) @ found.w2_DH.double().T + found.b2_D)
    torch.testing.assert_close(made_ND, best_ND, atol=2e-3 * best_ND.abs().max().item(), rtol=0)
    assert [row["epoch"] for row in found.curve] == [0]


def test_a_training_that_only_harms_ends_with_its_start_by_ridge(hidden, step_1):
    options = SMALL | {"epochs": 2, "lr": 1.0, "start": "ridge"}
    best, last = (inverse.fit(hidden, step_1, **options, keep=keep) for keep in ("best", "last"))
    start = inverse.fit(hidden, step_1, **options | {"epochs": 0})
    errors = [row["heldout_error"] for row in best.curve]
    assert len(errors) == 3 and errors[0] < min(errors[1:])
    assert torch.equal(best.w1_HF, start.w1_HF) and not torch.equal(last.w1_HF, start.w1_HF)


@pytest.mark.parametrize("norm_loss", get_args(inverse.NormLoss))
def test_same_seed_same_bits_and_torchs_own_generator_untouched(hidden, step_1, norm_loss):
    before = torch.random.get_rng_state()
    one, other = (inverse.fit(hidden, step_1, **SMALL, norm_loss=norm_loss) for _ in range(2))
    assert same_bits(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    if norm_loss != "none":
        assert not same_bits(one, inverse.fit(hidden, step_1, **SMALL))


def test_heldout_sequences_are_never_fitted(tmp_path):
    h_LSTD = stored.drift()
    one = stored.write(tmp_path / "one.zarr", h_LSTD)
    step_1 = kernel.fit(one, (0, 2), features=16, rank=2, epochs=1, heldout=0.2, massive="raw")
    other = h_LSTD.clone()
    other[:, load(one, (0, 2), massive="raw", heldout=0.2, seed=0).heldout] = 2.0
    two = stored.write(tmp_path / "two.zarr", other)
    fits = [inverse.fit(h, step_1, **SMALL) for h in (one, two)]
    assert same_bits(*fits) and fits[0].stats["heldout_error"] != fits[1].stats["heldout_error"]


@pytest.mark.parametrize("options, error, message", [
    ({"activation": "bump"}, OptionError, r"activation is 'bump'; choose one of gelu"),
    ({"norm_loss": "abs"}, OptionError, r"norm_loss is 'abs'; choose one of none, relative, gap"),
    ({"keep": "first"}, OptionError, r"keep is 'first'; choose one of best, last"),
    ({"lr": 1e30}, TrainingFailed, r"epoch \d: the loss is (inf|nan); lower inverse\.lr"),
])
def test_refusals(hidden, step_1, options, error, message):
    with pytest.raises(error, match=message):
        inverse.fit(hidden, step_1, **SMALL | options)


@pytest.mark.parametrize("name", inverse.ACTIVATIONS)
def test_an_activation_is_the_one_that_the_folded_model_finds_under_its_name(name):
    from transformers.activations import ACT2FN

    x_N = torch.linspace(-4, 4, 33)
    assert torch.equal(inverse.ACTIVATIONS[name]()(x_N), ACT2FN[name](x_N))


def test_reading_states_and_fitting_do_not_load_the_models_of_transformers():
    import subprocess
    import sys

    script = "import sys, kdp_core.methods; sys.exit('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
