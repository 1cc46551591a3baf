"""Step 1: the lift against its closed forms, least squares against NumPy, training against what it promises."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from kdp_core.base.options import OptionError
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp import kernel
from kdp_core.methods.kdp.features import Lift, Operators, chain, cosine_weights, equation_5, median_distance, ols
from kdp_core.methods.kdp.kernel import KernelCollapsed
from kdp_core.states.block import FitError, lift_input, load
from tests.kdp_core import stored

SMALL = dict(features=16, rank=2, epochs=3, batch_sequences=4, lr=0.05, heldout=0.2)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("drift") / "h.zarr", stored.drift())


@pytest.fixture(scope="module")
def pico_states(tmp_path_factory):
    return stored.of_pico(tmp_path_factory.mktemp("pico") / "h.zarr")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_lift(width=3, features=8, rank=2, scale=1.7):
    """A lift away from its start: lambda and L random."""
    lift = Lift(width, features, rank, scale, seeded(1))
    with torch.no_grad():
        lift.lambda_D.copy_(0.5 * torch.randn(width, generator=seeded(2)))
        lift.l_DR.copy_(0.5 * torch.randn(width, rank, generator=seeded(3)))
    return lift


def sigma(lift):
    """Sigma = (D + L L') / scale^2, in NumPy."""
    l_DR = lift.l_DR.detach().double().numpy()
    return (np.diag(np.exp(lift.lambda_D.detach().double().numpy())) + l_DR @ l_DR.T) / lift.scale ** 2


def tensors(record):
    return {name: value for name, value in record._asdict().items() if isinstance(value, torch.Tensor)}


def same_bits(one, other):
    return all(torch.equal(tensor, getattr(other, name)) for name, tensor in tensors(one).items())


# the lift

def test_features_approach_the_gaussian_kernel_of_sigma_and_not_of_its_inverse():
    lift = random_lift(features=40_000)
    x_ND, y_ND = torch.randn(2, 40, 3, generator=seeded(4))
    with torch.no_grad():
        found_N = (lift(x_ND) * lift(y_ND)).sum(-1).double().numpy()
    d_ND = (x_ND - y_ND).double().numpy()
    v_N = np.einsum("nd,de,ne->n", d_ND, sigma(lift), d_ND)
    # the mean of m cosines of a normal angle of variance v
    stderr_N = np.sqrt(((1 + np.exp(-2 * v_N)) / 2 - np.exp(-v_N)) / 20_000)
    assert (np.abs(found_N - np.exp(-v_N / 2)) < 4 * stderr_N).all()
    inverse_N = np.exp(-0.5 * np.einsum("nd,de,ne->n", d_ND, np.linalg.inv(sigma(lift)), d_ND))
    assert (np.abs(found_N - inverse_N) > 4 * stderr_N).mean() > 0.9


def test_covariance_of_the_frequencies_is_sigma():
    lift = random_lift(features=40_000)
    omega_DM = lift.omega().detach().double().numpy()
    np.testing.assert_allclose(omega_DM @ omega_DM.T / 20_000, sigma(lift), atol=0.02)


def test_omega_and_phi_by_hand():
    lift = random_lift()
    z, v, b = (t.numpy() for t in (lift.z_DM, lift.v_RM, lift.b_M))
    lam, low = lift.lambda_D.detach().numpy(), lift.l_DR.detach().numpy()
    omega = np.array([[(math.sqrt(math.exp(lam[d])) * z[d, m] + sum(low[d, r] * v[r, m] for r in range(2))) / 1.7
                       for m in range(4)] for d in range(3)])
    np.testing.assert_allclose(lift.omega().detach().numpy(), omega, rtol=1e-5)
    x = torch.randn(5, 3, generator=seeded(5))
    angle = x.numpy() @ omega + b
    np.testing.assert_allclose(lift(x).detach().numpy(), np.hstack([np.cos(angle), np.sin(angle)]) / 2, atol=1e-6)


def test_features_have_norm_one_even_far_out():
    x_ND = torch.cat([torch.zeros(1, 3), torch.randn(20, 3, generator=seeded(6)), 1e4 * torch.ones(1, 3)])
    torch.testing.assert_close(random_lift()(x_ND).norm(dim=-1), torch.ones(22))


def test_only_lambda_and_l_are_learned():
    lift = random_lift()
    fixed = {name: buffer.clone() for name, buffer in lift.named_buffers()}
    assert {name for name, _ in lift.named_parameters()} == {"lambda_D", "l_DR"}
    assert set(fixed) == {"z_DM", "v_RM", "b_M"}
    omega_DM = lift.omega().detach()
    adam = torch.optim.Adam(lift.parameters(), lr=0.1)
    lift(torch.ones(2, 3)).sum().backward()
    adam.step()
    assert all(torch.equal(buffer, fixed[name]) for name, buffer in lift.named_buffers())
    assert not torch.equal(lift.omega(), omega_DM)


def test_rms_input_forgets_the_length_of_a_state_and_raw_does_not():
    h = torch.randn(4, 6, generator=seeded(7))
    torch.testing.assert_close(lift_input(3 * h, "rms"), lift_input(h, "rms"))
    torch.testing.assert_close(lift_input(h, "rms").square().mean(-1), torch.ones(4))
    assert lift_input(h, "raw") is h


@pytest.mark.parametrize("count", [50, 33])
def test_median_distance_is_scipys(count):
    x_ND = torch.randn(count, 4, generator=seeded(8))
    # torch takes the lower one of two middle values
    expected = np.quantile(pdist(x_ND.double().numpy()), 0.5, method="lower")
    assert median_distance(x_ND, seeded()) == pytest.approx(expected)
    sampled = median_distance(torch.randn(500, 4, generator=seeded(9)), seeded(), sample=100)
    assert sampled == pytest.approx(expected, rel=0.3) and sampled != pytest.approx(expected, rel=1e-6)


# least squares and operators

def test_ols_is_numpys_and_leaves_residuals_orthogonal_to_the_inputs():
    phi_KNF = torch.randn(3, 200, 12, generator=seeded(10))
    found_KFF = ols(phi_KNF, 0.0).double().numpy()
    for step in range(2):
        x, y = phi_KNF[step].double().numpy(), phi_KNF[step + 1].double().numpy()
        np.testing.assert_allclose(found_KFF[step].T, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-6)
        np.testing.assert_allclose(x.T @ (y - x @ found_KFF[step].T), 0, atol=1e-4)


def test_ridge_is_least_squares_with_extra_rows():
    phi_KNF = torch.randn(2, 8, 12, generator=seeded(11))  # fewer tokens than features
    x, y = phi_KNF.double().numpy()
    level = 0.1 * np.mean(np.sum(x ** 2, axis=0))
    rows, goal = np.vstack([x, math.sqrt(level) * np.eye(12)]), np.vstack([y, np.zeros((12, 12))])
    np.testing.assert_allclose(ols(phi_KNF, 0.1)[0].T, np.linalg.lstsq(rows, goal, rcond=None)[0], atol=1e-6)
    with pytest.raises(FitError, match="singular with ridge 0; raise the ridge"):
        ols(phi_KNF.clone().index_fill_(2, torch.tensor([3]), 0.0), 0.0)


def test_operators_take_any_start_whatever_gamma_is():
    operators = Operators(6, 5)
    assert torch.equal(operators(), torch.eye(5).expand(6, 5, 5))
    with torch.no_grad():
        operators.gamma_K.copy_(torch.tensor([1.0, -0.5, 2.0, 0.0, 1e-7, -1e-5]))
    a_KFF = torch.randn(6, 5, 5, generator=seeded(12))
    operators.start(a_KFF)
    torch.testing.assert_close(operators(), a_KFF, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(operators.gamma_K[:3], torch.tensor([1.0, -0.5, 2.0]))
    assert (operators.gamma_K.abs() >= 1e-3).all()
    by_hand = np.eye(5) + operators.gamma_K[1].item() * operators.b_KFF[1].detach().numpy()
    np.testing.assert_allclose(operators()[1].detach().numpy(), by_hand, rtol=1e-6)


def test_chain_multiplies_the_last_operator_from_the_left():
    a_KFF = torch.randn(3, 4, 4, generator=seeded(13))
    phi_NF = torch.randn(7, 4, generator=seeded(14))
    stepwise = phi_NF.double()
    for a_FF in a_KFF.double():
        stepwise = stepwise @ a_FF.T
    torch.testing.assert_close(phi_NF.double() @ chain(a_KFF).T, stepwise)
    assert not torch.allclose(chain(a_KFF), chain(a_KFF.flip(0)))


# equation 5

def test_equation_5_is_the_loop():
    a, phi = torch.randn(2, 4, 4, generator=seeded(15)), torch.randn(3, 5, 4, generator=seeded(16))
    weight = torch.rand(2, 5, generator=seeded(17)) * 2
    mse, cosine, cosines = 0.0, 0.0, []
    for i in range(2):
        for n in range(5):
            predicted, target = a[i].double().numpy() @ phi[i, n].double().numpy(), phi[i + 1, n].double().numpy()
            mse += np.sum((predicted - target) ** 2) / 5
            cosines.append(predicted @ target / np.linalg.norm(predicted) / np.linalg.norm(target))
            cosine += (1 - weight[i, n].item() * cosines[-1]) / 5
    loss = equation_5(a, phi, weight)
    assert loss.total.item() == pytest.approx(mse + cosine, rel=1e-5)
    assert loss.mse.item() == pytest.approx(mse, rel=1e-5)
    assert loss.cos.item() == pytest.approx(np.mean(cosines), rel=1e-5)


def test_the_chained_loss_is_the_loop_over_the_last_state():
    a, phi = torch.randn(3, 4, 4, generator=seeded(15)), torch.randn(4, 5, 4, generator=seeded(16))
    weight = torch.rand(3, 5, generator=seeded(17)) * 2
    mse, cosine = 0.0, 0.0
    for n in range(5):
        predicted, target = phi[0, n].double().numpy(), phi[3, n].double().numpy()
        for i in range(3):
            predicted = a[i].double().numpy() @ predicted
        mse += np.sum((predicted - target) ** 2) / 5
        cos = predicted @ target / np.linalg.norm(predicted) / np.linalg.norm(target)
        cosine += (1 - weight[2, n].item() * cos) / 5
    loss = equation_5(a, phi, weight, chained=True)
    assert loss.mse.item() == pytest.approx(mse, rel=1e-5)
    assert loss.total.item() == pytest.approx(mse + cosine, rel=1e-5)


def test_of_one_step_both_losses_are_one():
    a, phi = torch.randn(1, 4, 4, generator=seeded(15)), torch.randn(2, 5, 4, generator=seeded(16))
    weight = torch.ones(1, 5)
    assert equation_5(a, phi, weight, chained=True).total.item() == pytest.approx(
        equation_5(a, phi, weight).total.item(), rel=1e-6)


def test_equation_5_is_zero_for_a_perfect_step():
    phi = torch.randn(1, 6, 4, generator=seeded(18)).expand(3, 6, 4)
    assert equation_5(torch.eye(4).expand(2, 4, 4), phi, torch.ones(2, 6)).total.item() == pytest.approx(0, abs=1e-6)


def test_gradients_of_equation_5_by_finite_differences():
    lift = random_lift().double()
    x_KND = torch.randn(3, 6, 3, generator=seeded(19), dtype=torch.float64)
    a_KFF = torch.randn(2, 8, 8, generator=seeded(20), dtype=torch.float64)
    weight_KN = cosine_weights("position", torch.arange(6), 6, 2, 4).double()

    def loss():
        return equation_5(a_KFF, lift(x_KND), weight_KN).total

    loss().backward()
    for parameter in (lift.lambda_D, lift.l_DR):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(len(flat)):
            start, step = flat[index].item(), 1e-5
            ends = []
            for moved in (start + step, start - step):
                flat[index] = moved
                ends.append(loss().item())
            flat[index] = start
            assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind, exponents", [("position", 3), ("position_depth", 32)])
def test_position_weights_are_a_geometric_sequence_of_base_two(kind, exponents):
    weight_KN = cosine_weights(kind, torch.arange(128), 128, 3, 32)
    assert weight_KN.shape == (3, 128)
    torch.testing.assert_close(weight_KN.mean(-1), torch.ones(3))
    ratio_N = weight_KN[0, 1:] / weight_KN[0, :-1]
    torch.testing.assert_close(ratio_N, ratio_N[:1].expand(127))
    assert weight_KN[1, -1] / weight_KN[1, 0] == pytest.approx(2 ** (exponents - 1), rel=1e-4)
    if kind == "position_depth":
        assert weight_KN[0, -4:].sum() / 128 == pytest.approx(0.49, abs=0.01)  # as the docstring says


def test_weights_by_step_and_none_and_of_chosen_positions():
    positions_N = torch.tensor([0, 6, 6])
    assert torch.equal(cosine_weights("none", positions_N, 7, 2, 9), torch.ones(2, 3))
    expected_K1 = torch.tensor([[1.0], [2.0], [4.0]]) * 3 / 7
    torch.testing.assert_close(cosine_weights("step", positions_N, 7, 3, 9), expected_K1.expand(3, 3))
    full_N = cosine_weights("position", torch.arange(7), 7, 2, 9)[0]
    torch.testing.assert_close(cosine_weights("position", positions_N, 7, 2, 9)[0], full_N[positions_N])


# training

def test_training_lowers_the_loss_it_fits_and_the_one_it_does_not(drifting):
    found = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 25})
    first, last = found.curve[0], found.curve[-1]
    assert last["loss"] < 0.8 * first["loss"] and last["heldout_mse"] < 0.8 * first["heldout_mse"]
    assert found.stats["decode_error"] < 1 and found.stats["decode_error_true_features"] < found.stats["decode_error"]


def test_record_says_what_the_glossary_promises(pico_states):
    found = kernel.fit(pico_states, (4, 6), **SMALL, lift="rms")
    assert found.block == (4, 6) and found.lift_input == "rms" and found.omega_DM.shape == (32, 8)
    assert found.operators_KFF.shape == (2, 16, 16) and found.b_M.shape == (8,)
    assert [row["epoch"] for row in found.curve] == [1, 2, 3]
    assert all(set(row) == {"epoch", "seconds", "lr", "loss", "mse", "cos", "heldout_loss", "heldout_mse",
                            "heldout_cos", "phi_variance", "phi_norm", "operator_norm"} for row in found.curve)
    assert all(0 <= row["phi_variance"] <= 1 and row["phi_norm"] <= 2 for row in found.curve)
    assert all(len(row["operator_norm"]) == 2 for row in found.curve)
    assert found.stats["ridge"] == 1e-6 and found.stats["tokens"] <= 13 * 24
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in tensors(found).values())


def test_heldout_figures_and_final_operators_by_hand(drifting):
    found = kernel.fit(drifting, (0, 3), **SMALL, massive="raw", weight="none")
    split = load(drifting, (0, 3), massive="raw", heldout=0.2, seed=0)
    phi = {}
    for name in ("train", "heldout"):
        angle = split.h_KSTD[:, getattr(split, name)].flatten(1, 2).double().numpy() @ found.omega_DM.double().numpy()
        angle += found.b_M.double().numpy()
        phi[name] = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / math.sqrt(8)
    mse = 0.0
    for i, a_FF in enumerate(found.operators_KFF.double().numpy()):
        x, y = phi["train"][i:i + 2]
        level = 1e-6 * np.mean(np.sum(x ** 2, axis=0))
        rows, goal = np.vstack([x, math.sqrt(level) * np.eye(16)]), np.vstack([y, np.zeros((16, 16))])
        np.testing.assert_allclose(x @ a_FF.T, x @ np.linalg.lstsq(rows, goal, rcond=None)[0], atol=1e-4)
        mse += np.mean(np.sum((phi["heldout"][i] @ a_FF.T - phi["heldout"][i + 1]) ** 2, axis=-1))
    assert found.stats["heldout_mse"] == pytest.approx(mse, rel=1e-3)
    assert found.stats["phi_variance"] == pytest.approx(phi["heldout"][0].var(axis=0).sum(), rel=1e-3)
    assert found.stats["tokens"] == len(phi["train"][0])


def test_same_seed_same_bits_and_random_numbers_stay_fixed_while_training(drifting):
    before = torch.random.get_rng_state()
    one, other = (kernel.fit(drifting, (0, 2), **SMALL) for _ in range(2))
    assert same_bits(one, other) and [row["loss"] for row in one.curve] == [row["loss"] for row in other.curve]
    longer = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 6})
    assert torch.equal(longer.b_M, one.b_M) and not torch.equal(longer.omega_DM, one.omega_DM)
    assert not torch.equal(kernel.fit(drifting, (0, 2), **SMALL, seed=1).b_M, one.b_M)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_decoded_state_judged_while_training_is_that_of_a_shorter_run_and_changes_nothing(drifting):
    plain = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 4}, final_ols=False)
    judged = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 4}, final_ols=False, decode_every=2)
    shorter = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 2}, final_ols=False)
    assert same_bits(plain, judged) and ["decode_error" in row for row in judged.curve] == [False, True, False, True]
    for row, run in ((judged.curve[1], shorter), (judged.curve[3], plain)):
        assert {key: row[key] for key in ("decode_error", "decode_error_true_features")} == {
            key: run.stats[key] for key in ("decode_error", "decode_error_true_features")}
    assert all(one["seconds"] < two["seconds"] for one, two in itertools.pairwise(judged.curve))


def test_the_chained_loss_trains_the_lift_for_the_last_state(drifting):
    steps, chained = (kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 6}, loss=loss) for loss in ("steps", "chain"))
    assert chained.curve[-1]["loss"] < chained.curve[0]["loss"] and not same_bits(steps, chained)
    # of one step there is nothing to chain
    steps, chained = (kernel.fit(drifting, (0, 1), **SMALL, loss=loss) for loss in ("steps", "chain"))
    assert [row["loss"] for row in chained.curve] == pytest.approx([row["loss"] for row in steps.curve], rel=1e-4)


@pytest.mark.parametrize("every", ["iteration", "epoch", "start"])
def test_every_schedule_of_least_squares_trains(drifting, every):
    found = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 6}, ols_every=every, final_ols=False)
    assert found.curve[-1]["loss"] < found.curve[0]["loss"]
    # Adam moves gamma only where least squares does not set the operators each time
    assert torch.equal(found.gamma_K, torch.ones(2)) == (every == "iteration")
    assert found.stats["heldout_loss"] == found.curve[-1]["heldout_loss"]


def test_minibatches_leave_no_small_remainder(drifting):
    """10 training sequences by 9: a remainder of one sequence would be fitted exactly by 24 features."""
    found = kernel.fit(drifting, (0, 2), **SMALL | {"features": 24, "batch_sequences": 9, "epochs": 1}, weight="none")
    whole = kernel.fit(drifting, (0, 2), **SMALL | {"features": 24, "batch_sequences": 10, "epochs": 1}, weight="none")
    assert found.curve[0]["loss"] > 0.5 * whole.curve[0]["loss"]
    assert found.curve[0]["heldout_loss"] < 3 * whole.curve[0]["heldout_loss"]


def test_learning_rate_halves_after_patience(drifting):
    found = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 8, "lr": 1e-7, "batch_sequences": 100}, patience=2)
    # no epoch after the first is better by a ten-thousandth: epochs 2 to 4, then 5 to 7, are one more than patience
    assert [row["lr"] for row in found.curve] == pytest.approx([1e-7] * 4 + [5e-8] * 3 + [2.5e-8])


def test_bandwidth_is_counted_in_median_distances(tmp_path):
    """Ten times larger states with the median as unit: the same features; with unit bandwidth: others."""
    h_LSTD = stored.drift()
    small, large = (stored.write(tmp_path / f"{s}.zarr", s * h_LSTD) for s in (1.0, 10.0))
    one, ten = (kernel.fit(h, (0, 2), **SMALL | {"epochs": 0}) for h in (small, large))
    torch.testing.assert_close(one.omega_DM, 10 * ten.omega_DM)
    torch.testing.assert_close(one.operators_KFF, ten.operators_KFF, atol=1e-3, rtol=1e-3)
    unit = [kernel.fit(h, (0, 2), **SMALL | {"epochs": 0}, bandwidth="unit").omega_DM for h in (small, large)]
    assert torch.equal(*unit)


def test_heldout_sequences_are_never_fitted(tmp_path):
    h_LSTD = stored.drift()
    heldout = load(stored.write(tmp_path / "a.zarr", h_LSTD), (0, 2), massive="raw", heldout=0.2, seed=0).heldout
    assert len(heldout) == 2
    other = h_LSTD.clone()
    other[:, heldout] = torch.randn(other[:, heldout].shape, generator=seeded(21))
    one, two = (kernel.fit(stored.write(tmp_path / f"{name}.zarr", h), (0, 2), **SMALL, massive="raw")
                for name, h in (("b", h_LSTD), ("c", other)))
    assert same_bits(one, two) and one.stats["heldout_loss"] != two.stats["heldout_loss"]


def test_massive_tokens_are_left_out_of_the_fit_by_default(tmp_path):
    fits = []
    for name, direction in (("a", 1.0), ("b", -1.0)):
        h_LSTD = stored.drift()
        h_LSTD[1:, :, 0] = direction * 1000.0  # massive in the block's last states only
        fits.append(stored.write(tmp_path / f"{name}.zarr", h_LSTD))
    bypassed = [kernel.fit(h, (1, 3), **SMALL) for h in fits]
    assert same_bits(*bypassed) and bypassed[0].stats["tokens"] == 10 * 23
    assert bypassed[0].bypass_above == pytest.approx(8 * fits[0].state(1).norm(dim=-1).median().item())
    raw = [kernel.fit(h, (1, 3), **SMALL, massive="raw") for h in fits]
    assert not same_bits(*raw) and raw[0].stats["tokens"] == 10 * 24 and raw[0].bypass_above is None


# refusals

def test_collapse_is_named_with_its_remedy(drifting):
    with pytest.raises(KernelCollapsed, match=r"epoch 1: .* nearly constant.*lower kernel\.bandwidth_scale"):
        kernel.fit(drifting, (0, 2), **SMALL, bandwidth_scale=1e4)


@pytest.mark.parametrize("every", ("iteration", "epoch", "start"))
def test_divergence_is_named_with_its_remedy(drifting, every):
    with pytest.raises(TrainingFailed, match=r"lower kernel\.lr"):
        kernel.fit(drifting, (0, 2), **SMALL | {"lr": 3e37, "epochs": 60}, ols_every=every)


def test_broken_states_are_refused(tmp_path):
    h_LSTD = stored.drift()
    h_LSTD[1, 3, 5, 2] = float("nan")
    with pytest.raises(FitError, match=r"state 1 .*not finite"):
        kernel.fit(stored.write(tmp_path / "h.zarr", h_LSTD), (0, 2), **SMALL)


@pytest.mark.parametrize("options, message", [
    ({"features": 15}, r"features is 15; give a number that is a multiple of 2"),
    ({"features": 0}, r"features is 0; give a number at least 2"),
    ({"bandwidth": "mean"}, r"bandwidth is 'mean'; choose one of median, unit"),
    ({"loss": "sum"}, r"loss is 'sum'; choose one of steps, chain"),
    ({"weight": "last"}, r"weight is 'last'; choose one of none"),
    ({"ols_every": "hour"}, r"ols_every is 'hour'; choose one of iteration"),
    ({"massive": "drop"}, r"massive is 'drop'; choose one of bypass, raw"),
    ({"heldout": 0.0}, r"heldout is 0\.0; give a number above 0"),
    ({"lift": "log"}, r"lift is 'log'; choose one of raw, rms"),
])
def test_options_no_fit_can_work_with(drifting, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        kernel.fit(drifting, (0, 2), **SMALL | options)
