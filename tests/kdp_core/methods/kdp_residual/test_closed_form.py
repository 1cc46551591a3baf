"""The closed form of one stand-in is compared with scikit-learn and with brute force."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from kdp_core.methods.kdp_residual import closed_form
from kdp_core.methods.kdp_residual.closed_form import Statistics, fit_stand_in, solve
from kdp_core.model.passes import built
from kdp_core.model.stand_ins import normalised
from kdp_core.states.block import FitError
from tests.kdp_core.methods.kdp_residual.examples import FIT, entries_of, made_up, randn


def by_scikit(f_NF, goal_ND, weight_N, ridge):
    """Ridge regression of weighted tokens on features at unit variance: weights of the raw features, and bias."""
    weight_N = weight_N / weight_N.sum()
    mean_F = weight_N @ f_NF
    scale_F = np.sqrt(weight_N @ (f_NF - mean_F) ** 2)
    found = Ridge(alpha=ridge, solver="cholesky").fit((f_NF - mean_F) / scale_F, goal_ND, sample_weight=weight_N)
    w_DF = found.coef_ / scale_F
    objective = weight_N @ ((f_NF @ w_DF.T + found.intercept_ - w_DF @ mean_F - goal_ND) ** 2).sum(1) + \
        ridge * (found.coef_ ** 2).sum()
    return w_DF, found.intercept_ - w_DF @ mean_F, objective


def test_solve_is_ridge_regression_on_standard_features_with_a_free_intercept():
    f_NF, goal_ND = 3 * randn(60, 7, seed=1).double() + randn(7, seed=2), randn(60, 4, seed=3).double() - 2
    weight_N = torch.rand(60, generator=torch.Generator().manual_seed(4)).double() + 0.1
    ones_NG = torch.cat([f_NF, torch.ones(60, 1)], dim=1)
    w_FD, bias_D = solve(Statistics(ones_NG.T @ (weight_N[:, None] * ones_NG),
                                    ones_NG.T @ (weight_N[:, None] * goal_ND)), 0.3)
    w_DF, intercept_D, _ = by_scikit(f_NF.numpy(), goal_ND.numpy(), weight_N.numpy(), 0.3)
    np.testing.assert_allclose(w_FD.T.numpy(), w_DF, atol=1e-9)
    np.testing.assert_allclose(bias_D.numpy(), intercept_D, atol=1e-9)


def test_a_singular_matrix_is_refused():
    f_NF = torch.cat([randn(9, 2), torch.ones(9, 1)], dim=1).double()[:, [0, 0, 1, 2]]
    with pytest.raises(FitError, match=r"singular with ridge -0\.5; raise the ridge"):
        solve(Statistics(f_NF.T @ f_NF, f_NF.T @ f_NF[:, :2]), -0.5)


@pytest.mark.parametrize("kind, norm, token_weight", [
    ("none", "rms", "inverse_norm"), ("glu", "rms", "none"), ("mlp", "layer", "inverse_norm"),
    ("rff", "rms", "inverse_norm"),
])
def test_a_stand_in_is_the_weighted_ridge_solution_of_counted_tokens(kind, norm, token_weight):
    h_STD, y_STD = randn(6, 20, 5, seed=5), 1.5 * randn(6, 20, 5, seed=6)
    h_STD[1, 2] *= 500  # massive at the start
    y_STD[4, 0] *= 500  # and at the end
    dictionary = None if kind == "none" else made_up(kind)
    module = fit_stand_in((2, 3), dictionary, h_STD, y_STD, FIT._replace(token_weight=token_weight, norm=norm))
    counts_ST = torch.ones(6, 20, dtype=torch.bool)
    counts_ST[1, 2] = counts_ST[4, 0] = False
    h_ND, y_ND = h_STD[counts_ST].double().numpy(), y_STD[counts_ST].double().numpy()
    x_ND = h_ND - h_ND.mean(1, keepdims=True) if norm == "layer" else h_ND
    x_ND = x_ND / np.sqrt((x_ND ** 2).mean(1, keepdims=True))
    f_NF = np.hstack([x_ND, entries_of(dictionary, x_ND)]) if dictionary else x_ND
    weight_N = 1 / (y_ND ** 2).sum(1) if token_weight == "inverse_norm" else np.ones(len(y_ND))
    w_DF, bias_D, _ = by_scikit(f_NF, y_ND - h_ND, weight_N, FIT.ridge)
    np.testing.assert_allclose(module.tensors["linear.weight"].numpy(), w_DF[:, :5], atol=2e-4)
    np.testing.assert_allclose(module.tensors["linear.bias"].numpy(), bias_D, atol=2e-4)
    if dictionary:
        np.testing.assert_allclose(module.tensors["outer.weight"].numpy(), w_DF[:, 5:], atol=2e-4)
    with torch.no_grad():
        out_ND = built(module)(h_STD[counts_ST])
        assert torch.equal(built(module)(h_STD[1, 2]), h_STD[1, 2]), "massive tokens bypass the stand-in"
    np.testing.assert_allclose(out_ND.numpy(), h_ND + f_NF @ w_DF.T + bias_D, atol=1e-3)


def test_streamed_statistics_are_those_of_the_whole(monkeypatch):
    h_STD, y_STD, dictionary = randn(7, 9, 5, seed=7), randn(7, 9, 5, seed=8), made_up("glu")
    whole = fit_stand_in((0, 1), dictionary, h_STD, y_STD, FIT)
    for tokens in (9, 27):  # of the 63: one and three sequences a product
        monkeypatch.setattr(closed_form, "PRODUCT_TOKENS", tokens)
        other = fit_stand_in((0, 1), dictionary, h_STD, y_STD, FIT)
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, atol=1e-4, rtol=1e-4)


def test_those_entries_stay_without_which_a_refit_would_lose_most():
    """Optimal brain surgeon beside brute force: each entry taken out in turn, everything solved anew."""
    dictionary, h_STD = made_up("glu", entries=9, width=4, seed=20), randn(10, 30, 4, seed=22)
    y_STD = h_STD + torch.tanh(h_STD @ randn(4, 4, seed=23))
    fit = FIT._replace(token_weight="none", ridge=0.05)
    h_ND = h_STD.flatten(0, 1).double().numpy()
    x_ND = h_ND / np.sqrt((h_ND ** 2).mean(1, keepdims=True))
    f_NF, goal_ND = np.hstack([x_ND, entries_of(dictionary, x_ND)]), y_STD.flatten(0, 1).double().numpy() - h_ND
    loss = [by_scikit(np.delete(f_NF, 4 + entry, axis=1), goal_ND, np.ones(300), 0.05)[2] for entry in range(9)]
    assert np.diff(np.sort(loss)).min() > 1e-6, "brute force knows an order"
    for count in range(1, 9):
        expected = np.sort(np.argsort(loss)[9 - count:])
        kept = fit_stand_in((0, 1), dictionary, h_STD, y_STD, fit._replace(entries=count)).tensors["inner.weight"]
        torch.testing.assert_close(kept, dictionary.only(torch.from_numpy(expected)).v_RD)


@pytest.mark.parametrize("kind", ["glu", "mlp"])
def test_planted_neurons_are_found_among_two_hundred(kind):
    dictionary, planted = made_up(kind, entries=200, width=8, seed=30), [3, 50, 77, 120, 199]
    h_STD = randn(20, 40, 8, seed=32)
    x_ND = normalised(h_STD.flatten(0, 1), "rms").double().numpy()
    step_ND = torch.from_numpy(entries_of(dictionary, x_ND)[:, planted]).float() @ randn(5, 8, seed=33)
    fit = FIT._replace(entries=5, ridge=1e-7, token_weight="none", massive_factor=1e3)
    module = fit_stand_in((0, 1), dictionary, h_STD, h_STD + step_ND.view(h_STD.shape), fit)
    expected = dictionary.only(torch.tensor(planted))
    assert torch.equal(module.tensors["inner.weight"], expected.v_RD)
    assert torch.equal(module.tensors["inner.bias"], expected.c_R)
    torch.testing.assert_close(module.tensors["outer.weight"], randn(5, 8, seed=33).T, atol=1e-3, rtol=1e-3)
