"""Affine maps: least squares by SciPy, the two limits of the ridge, products of steps, exact recovery."""
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch

from kdp_core.base.options import OptionError
from kdp_core.methods._affine import regress
from kdp_core.methods.kdp.linear import direct, sequential, to_module
from kdp_core.model.stand_ins import MODULES
from kdp_core.states.block import FitError, TokenWeight, load
from tests.kdp_core import stored

PLAIN = dict(massive="raw", heldout=0.2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("drift") / "h.zarr", stored.drift())


def affine_states(path, steps=3, width=6, noise=0.0):
    """States in which every layer is an affine map; also the maps."""
    h_LSTD, maps = [randn(12, 24, width, seed=20)], []
    for step in range(steps):
        w_DD, b_D = torch.eye(width) + 0.3 * randn(width, width, seed=30 + step), randn(width, seed=40 + step)
        maps.append((w_DD.double().numpy(), b_D.double().numpy()))
        h_LSTD.append(h_LSTD[-1] @ w_DD.T + b_D + noise * randn(12, 24, width, seed=50 + step))
    return stored.write(path, torch.stack(h_LSTD)), maps


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("token_weight", get_args(TokenWeight))
def test_without_ridge_it_is_weighted_least_squares_with_intercept(residual, token_weight):
    x, y = randn(50, 4, seed=1) + 2, 3 * randn(50, 4, seed=2)
    found = regress(x, y, 0.0, residual, token_weight)
    root = 1 / np.linalg.norm(y.double().numpy(), axis=1) if token_weight == "inverse_norm" else np.ones(50)
    rows = np.hstack([x.double().numpy(), np.ones((50, 1))]) * root[:, None]
    expected = scipy.linalg.lstsq(rows, y.double().numpy() * root[:, None])[0]
    np.testing.assert_allclose(found.w_DD.numpy(), expected[:4].T, atol=1e-8)
    np.testing.assert_allclose(found.b_D.numpy(), expected[4], atol=1e-8)


@pytest.mark.parametrize("residual", [True, False])
def test_ridge_is_the_closed_form_with_a_free_intercept(residual):
    x, y = randn(50, 4, seed=3) + 2, 3 * randn(50, 4, seed=4) - 1
    found = regress(x, y, 0.2, residual, "inverse_norm")
    x, y = x.double().numpy(), y.double().numpy()
    weight = 1 / np.sum(y ** 2, axis=1)
    weight /= weight.sum()
    goal = y - x if residual else y
    scatter = sum(w * np.outer(row - weight @ x, row - weight @ x) for w, row in zip(weight, x, strict=True))
    penalty = 0.2 * np.trace(scatter) / 4 * np.diag([1, 1, 1, 1, 0])  # of the weights, not of the intercept
    rows = np.hstack([x, np.ones((50, 1))])
    expected = np.linalg.inv(rows.T @ np.diag(weight) @ rows + penalty) @ rows.T @ np.diag(weight) @ goal
    np.testing.assert_allclose(found.w_DD.numpy(), expected[:4].T + residual * np.eye(4), atol=1e-9)
    np.testing.assert_allclose(found.b_D.numpy(), expected[4], atol=1e-9)


def test_ridge_shrinks_to_the_identity_or_to_the_mean():
    x, y = randn(50, 4, seed=5) + 2, randn(50, 4, seed=6) - 1
    to_identity, to_mean = (regress(x, y, 1e12, residual, "none") for residual in (True, False))
    torch.testing.assert_close(to_identity.w_DD, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_identity.b_D, (y - x).double().mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_mean.w_DD, torch.zeros(4, 4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_mean.b_D, y.double().mean(0), atol=1e-6, rtol=0)
    distances = [(regress(x, y, ridge, True, "none").w_DD - torch.eye(4)).norm().item() for ridge in (0, 1, 10, 100)]
    assert distances == sorted(distances, reverse=True)


def test_relative_errors_count_under_inverse_norm():
    """One token of a thousandfold norm owns the unweighted map and not the weighted one."""
    x = randn(60, 4, seed=7)
    y = x @ (torch.eye(4) + 0.2 * randn(4, 4, seed=8)).T
    clean = regress(x, y, 0.0, True, "none")
    x, y = x.clone(), y.clone()
    x[0], y[0] = 1000 * x[0], -5000 * x[0]
    off = {kind: (regress(x, y, 1e-6, True, kind).w_DD - clean.w_DD).norm().item() for kind in get_args(TokenWeight)}
    assert off["inverse_norm"] < 0.2 * off["none"]


@pytest.mark.parametrize("fit", [direct, sequential])
def test_affine_layers_are_recovered_exactly(tmp_path, fit):
    hidden, maps = affine_states(tmp_path / "h.zarr")
    found = fit(hidden, (0, 3), ridge=0.0, **PLAIN)
    w_DD, b_D = np.eye(6), np.zeros(6)
    for step_w, step_b in maps:
        w_DD, b_D = step_w @ w_DD, step_w @ b_D + step_b
    np.testing.assert_allclose(found.weight_DD.numpy(), w_DD, atol=1e-4)
    np.testing.assert_allclose(found.bias_D.numpy(), b_D, atol=1e-4)
    assert found.stats["heldout_error"] < 1e-8 < 0.1 < found.stats["heldout_error_identity"]
    assert found.stats["tokens"] == 10 * 24 and found.block == (0, 3) and found.bypass_above is None


@pytest.mark.parametrize("options", [{"ridge": 0.01}, {"ridge": 0.1, "residual": False, "token_weight": "none"}])
def test_sequential_is_the_product_of_the_layers_own_maps(drifting, options):
    found = sequential(drifting, (0, 3), **PLAIN | options)
    w_DD, b_D = torch.eye(6), torch.zeros(6)
    for layer in range(3):
        step = direct(drifting, (layer, layer + 1), **PLAIN | options)
        w_DD, b_D = step.weight_DD @ w_DD, step.weight_DD @ b_D + step.bias_D
    torch.testing.assert_close(found.weight_DD, w_DD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias_D, b_D, atol=1e-5, rtol=1e-5)
    one = sequential(drifting, (1, 2), **PLAIN | options)
    assert torch.equal(one.weight_DD, direct(drifting, (1, 2), **PLAIN | options).weight_DD)


def test_direct_beats_sequential_on_the_tokens_it_fits(tmp_path):
    """Least squares from end to end is by definition no worse than any other affine map, on its own tokens."""
    hidden, _ = affine_states(tmp_path / "h.zarr", noise=1.0)
    train = load(hidden, (0, 3), massive="raw", heldout=0.2, seed=0).train
    errors = []
    for fit in (direct, sequential):
        found = fit(hidden, (0, 3), ridge=0.0, token_weight="none", **PLAIN)
        x, y = (hidden.state(k)[train].flatten(0, 1) for k in (0, 3))
        errors.append((x @ found.weight_DD.T + found.bias_D - y).square().sum().item())
    assert errors[0] < errors[1]


def test_heldout_figures_by_hand(drifting):
    found = direct(drifting, (0, 2), **PLAIN)
    heldout = load(drifting, (0, 2), massive="raw", heldout=0.2, seed=0).heldout
    x, y = (drifting.state(k)[heldout].flatten(0, 1).double().numpy() for k in (0, 2))
    spread = np.sum((y - y.mean(axis=0)) ** 2)
    predicted = x @ found.weight_DD.double().numpy().T + found.bias_D.double().numpy()
    assert found.stats["heldout_error"] == pytest.approx(np.sum((predicted - y) ** 2) / spread, rel=1e-4)
    assert found.stats["heldout_error_identity"] == pytest.approx(np.sum((x - y) ** 2) / spread, rel=1e-6)


@pytest.mark.parametrize("fit", [direct, sequential])
def test_held_out_and_massive_tokens_are_never_fitted(tmp_path, fit):
    h_LSTD = stored.drift()
    one = stored.write(tmp_path / "one.zarr", h_LSTD)
    other = h_LSTD.clone()
    other[:, load(one, (0, 2), massive="raw", heldout=0.2, seed=0).heldout] *= 2
    other[1, :, 0] = 1e4  # massive in the middle of the block only
    two = stored.write(tmp_path / "two.zarr", other)
    other[1, :, 0] = -1e4
    three = stored.write(tmp_path / "three.zarr", other)
    found = [fit(hidden, (0, 2), heldout=0.2) for hidden in (one, two, three)]
    assert torch.equal(found[1].weight_DD, found[2].weight_DD) and found[1].stats["tokens"] == 10 * 23
    assert found[0].stats["tokens"] == 10 * 24
    raw = [fit(hidden, (0, 2), heldout=0.2, massive="raw") for hidden in (one, two)]
    # the middle state counts for `sequential` only
    assert torch.equal(raw[0].weight_DD, raw[1].weight_DD) == (fit is direct)


def test_module_is_the_map_and_massive_tokens_bypass_it(drifting):
    found = direct(drifting, (0, 2), heldout=0.2)
    module = to_module(found)
    made = MODULES[module.kind](**module.options)
    made.load_state_dict(module.tensors)
    h = randn(2, 5, 6, seed=9)
    h[1, 2] = 1000.0
    expected = h.numpy() @ found.weight_DD.numpy().T + found.bias_D.numpy()
    expected[1, 2] = 1000.0
    np.testing.assert_allclose(made(h).detach().numpy(), expected, atol=1e-4)
    assert torch.equal(made(h)[1, 2], h[1, 2])


@pytest.mark.parametrize("options, message", [
    ({"token_weight": "norm"}, "token_weight is 'norm'; choose one of inverse_norm, none"),
    ({"massive": "drop"}, "massive is 'drop'; choose one of bypass, raw"),
    ({"heldout": 1.0}, r"heldout is 1\.0; give a number below 1"),
])
def test_refusals(drifting, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        direct(drifting, (0, 2), **options)


def test_a_singular_regression_is_named(tmp_path):
    h_LSTD = stored.drift()
    h_LSTD[..., 3] = 0
    hidden = stored.write(tmp_path / "h.zarr", h_LSTD)
    with pytest.raises(FitError, match="singular with ridge 0; raise the ridge"):
        direct(hidden, (0, 2), ridge=0.0, **PLAIN)
    assert direct(hidden, (0, 2), ridge=1e-6, **PLAIN).weight_DD.isfinite().all()
