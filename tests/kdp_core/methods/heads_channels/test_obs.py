"""Structured optimal brain surgeon against least squares on the columns that stay, and against greedy brute force."""
import pytest
import torch

from kdp_core.methods.heads_channels import obs
from kdp_core.states.block import FitError

D, C, N = 5, 12, 40


def case(seed=0, columns=C):
    """W and X'X of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w_DC = torch.randn(D, columns, generator=generator, dtype=torch.float64)
    mixed_CC = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x_NC = torch.randn(N, columns, generator=generator, dtype=torch.float64) @ mixed_CC
    return w_DC, x_NC.T @ x_NC


def damped(gram_CC, damp):
    return gram_CC + damp * gram_CC.diagonal().mean() * torch.eye(len(gram_CC), dtype=torch.float64)


def refitted(w_DC, h_CC, gone):
    """The W that is 0 in the columns `gone` and otherwise nearest, and its loss tr((W - V) H (W - V)')."""
    kept = [column for column in range(len(h_CC)) if column not in gone]
    v_DC = torch.zeros_like(w_DC)
    v_DC[:, kept] = torch.linalg.solve(h_CC[kept][:, kept], h_CC[kept] @ w_DC.T).T
    return v_DC, ((w_DC - v_DC) @ h_CC * (w_DC - v_DC)).sum().item()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_losses_are_those_of_least_squares_on_the_rest(length):
    w_DC, gram_CC = case()
    inverse_CC, _ = obs.inverse(gram_CC, 0.01)
    losses_U = obs.losses(w_DC, inverse_CC, C // length)
    expected = [refitted(w_DC, damped(gram_CC, 0.01), range(unit * length, (unit + 1) * length))[1]
                for unit in range(C // length)]
    assert losses_U.tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("length, batches", [(1, [1] * 6), (1, [4, 2, 1]), (3, [1, 1]), (2, [2, 1])])
def test_each_batch_leaves_the_best_map_without_the_units_of_least_loss(length, batches):
    w_DC, gram_CC = case(1)
    h_CC, gone, units = damped(gram_CC, 0.01), [], C // length
    for count, found in zip(batches, obs.prune(w_DC, gram_CC, units, batches, 0.01), strict=True):
        before = refitted(w_DC, h_CC, columns(gone, length))[1]
        rises = {unit: refitted(w_DC, h_CC, columns([*gone, unit], length))[1] - before
                 for unit in range(units) if unit not in gone}
        gone += sorted(sorted(rises, key=rises.get)[:count])
        v_DC, loss = refitted(w_DC, h_CC, columns(gone, length))
        assert found.removed == gone and found.loss == pytest.approx(loss, rel=1e-8)
        torch.testing.assert_close(found.w_DC, v_DC)
        assert found.kept(units).tolist() == [unit for unit in range(units) if unit not in gone]


def columns(units, length):
    return [unit * length + column for unit in units for column in range(length)]


def test_the_relative_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(2)
    x_NC, w_DC, v_DC = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                        for shape in ((N, C), (D, C), (D, C)))
    expected = ((x_NC @ (w_DC - v_DC).T).square().sum() / (x_NC @ w_DC.T).square().sum()).item()
    assert obs.squared(w_DC - v_DC, x_NC.T @ x_NC) / obs.squared(w_DC, x_NC.T @ x_NC) == pytest.approx(expected)


def test_a_singular_gram_matrix_gets_more_damp_and_is_named_at_last():
    x_NC = torch.ones(4, 3, dtype=torch.float64)
    assert obs.inverse(x_NC.T @ x_NC, 0.0)[1] == 1e-4
    assert obs.inverse(x_NC.T @ x_NC, 0.01)[1] == 0.01
    indefinite_CC = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    with pytest.raises(FitError, match=r"singular with damp 0\.1; raise compose\.damp or add calibration sequences"):
        obs.inverse(indefinite_CC, 0.01)
    with pytest.raises(FitError, match="all inputs of a map are zero"):
        obs.inverse(torch.zeros(2, 2), 0.01)
