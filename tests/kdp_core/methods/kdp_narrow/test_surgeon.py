"""The surgeon's rule and the solution against their definitions."""
import itertools

import pytest
import torch

from kdp_core.methods.heads_channels.units import columns_of
from kdp_core.methods.kdp_narrow.surgeon import RIDGES, Products, kept_units, regression, solved, solved_by
from kdp_core.states.block import FitError

N, F, D = 40, 6, 3
RIDGE = 0.05


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    f_NF, u_ND, old_FD = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                          for shape in ((N, F), (N, D), (F, D)))
    return f_NF, u_ND, old_FD


def equations_of(data):
    f_NF, u_ND, old_FD = data
    return regression(f_NF.T @ f_NF, f_NF.T @ u_ND, old_FD, RIDGE)


def loss(data, inputs, w_GD):
    """|U - F W|^2 + lambda |W - W_0|^2, where a removed input has the weight 0 and so adds |W_0|^2."""
    f_NF, u_ND, old_FD = data
    w_FD = torch.zeros_like(old_FD)
    w_FD[inputs] = w_GD
    level = RIDGE * f_NF.square().sum() / F
    return ((u_ND - f_NF @ w_FD).square().sum() + level * (w_FD - old_FD).square().sum()).item()


def least(data, inputs):
    return loss(data, inputs, solved(equations_of(data).of(inputs)))


def test_the_solution_has_no_gradient(data):
    f_NF, u_ND, old_FD = data
    w_FD = solved(equations_of(data))
    level = RIDGE * f_NF.square().sum() / F
    assert (f_NF.T @ (f_NF @ w_FD - u_ND) + level * (w_FD - old_FD)).abs().max() < 1e-9


def test_the_ridge_is_the_one_with_the_least_loss_on_held_out_tokens(data):
    f_NF, u_ND, old_FD = data
    inputs, chosen = torch.tensor([0, 2, 3, 5]), set()
    # with few tokens a large ridge is best, with the fitted tokens themselves the smallest
    for fitted, judged in ((slice(5), slice(5, None)), (slice(30), slice(30, None)), (slice(None), slice(None))):
        products, held = (Products(f_NF[at].T @ f_NF[at], f_NF[at].T @ u_ND[at], old_FD) for at in (fitted, judged))
        losses = [(u_ND[judged] - f_NF[judged][:, inputs] @ solved(products.equations(ridge).of(inputs))).square().sum()
                  for ridge in RIDGES]
        w_FD, ridge = solved_by(held, products, inputs)
        assert ridge == RIDGES[torch.stack(losses).argmin()]
        assert torch.equal(w_FD, solved(products.equations(ridge).of(inputs)))
        chosen.add(ridge)
    assert ridge == RIDGES[0]
    assert len(chosen) > 1


@pytest.mark.parametrize("units", [6, 3, 2])
def test_the_unit_that_is_removed_first_raises_the_loss_least(data, units):
    length, every = F // units, torch.arange(units)
    rises = [least(data, columns_of(every[every != unit], length)) for unit in range(units)]
    kept = kept_units(equations_of(data), units, [units - 1])[units - 1]
    assert sorted(set(range(units)) - set(kept.tolist())) == [min(range(units), key=rises.__getitem__)]


def test_heads_leave_one_at_a_time_each_with_the_least_rise(data):
    kept = list(range(3))
    while len(kept) > 1:
        kept = list(min(itertools.combinations(kept, len(kept) - 1),
                        key=lambda some: least(data, columns_of(torch.tensor(some), 2))))
    assert kept_units(equations_of(data), 3, [1])[1].tolist() == kept


def test_outputs_are_weighed_by_the_gain_of_the_norm_after(data):
    f_NF, u_ND, old_FD = data
    scale_D = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    alone = regression(f_NF.T @ f_NF, f_NF.T @ u_ND[:, 2:], old_FD[:, 2:], RIDGE)
    assert kept_units(equations_of(data), F, [2], scale_D)[2].tolist() == kept_units(alone, F, [2])[2].tolist()


def test_a_direction_without_text_keeps_its_old_weights(data):
    f_NF, u_ND, old_FD = data
    f_NF = f_NF.clone()
    f_NF[:, 0] = 0
    w_FD = solved(regression(f_NF.T @ f_NF, f_NF.T @ u_ND, old_FD, RIDGE))
    assert torch.allclose(w_FD[0], old_FD[0]) and not torch.allclose(w_FD[1], old_FD[1])


def test_a_singular_gram_matrix_names_the_remedy():
    gram_FF = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(FitError, match=r"raise compose\.ridge"):
        solved(regression(gram_FF, gram_FF, gram_FF, 0.0))
