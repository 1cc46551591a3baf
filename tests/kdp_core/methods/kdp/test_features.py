"""The lift is compared with its closed forms, least squares with NumPy, and equation 5 with a plain loop."""
import math

import numpy as np
import pytest
import torch

from kdp_core.methods.kdp.features import Lift, Operators, chain, cosine_weights, equation_5, ols
from kdp_core.states.block import FitError, lift_input


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


def test_of_one_operator_both_losses_are_one():
    a, phi = torch.randn(1, 4, 4, generator=seeded(15)), torch.randn(2, 5, 4, generator=seeded(16))
    weight = torch.ones(1, 5)
    assert equation_5(a, phi, weight, chained=True).total.item() == pytest.approx(
        equation_5(a, phi, weight).total.item(), rel=1e-6)


def test_equation_5_is_zero_for_a_perfect_operator():
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
