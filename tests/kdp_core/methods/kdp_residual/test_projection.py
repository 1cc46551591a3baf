"""Learned frequencies: the gradient through the solve, the plain regression behind it, and what learning is worth."""
import math

import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.methods.kdp_residual import closed_form, dictionaries, projection
from kdp_core.methods.kdp_residual.projection import ProjectionError, Sample, learn, projected_error
from kdp_core.model.passes import built
from kdp_core.model.stand_ins import normalised


def sample(sequences=12, length=24, width=3, seed=0, dtype=torch.float32, goal=None):
    """Gaussian inputs, a goal of them (a random linear map where none is given), uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(sequences * length, width, generator=generator, dtype=dtype)
    goal_ND = goal(x_ND) if goal else x_ND @ torch.randn(width, width, generator=generator, dtype=dtype)
    weight_N = torch.rand(len(x_ND), generator=generator, dtype=dtype) + 0.5
    return Sample(x_ND, goal_ND, weight_N, torch.arange(sequences).repeat_interleave(length))


def start(entries, width=3, seed=1, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(entries, width, generator=generator, dtype=dtype),
            2 * math.pi * torch.rand(entries, generator=generator, dtype=dtype))


def planted(x_ND):
    """Four waves of a direction each, too fast for the linear part to see."""
    v_MD, c_M = start(4, seed=5, scale=1.4, dtype=x_ND.dtype)
    outer_MD = torch.randn(4, 3, generator=torch.Generator().manual_seed(6), dtype=x_ND.dtype)
    return (x_ND @ v_MD.T + c_M).cos() @ outer_MD


def halves(whole):
    return whole.only(whole.sequence_N < 8), whole.only(whole.sequence_N >= 8)


def test_gradient_is_that_of_finite_differences():
    solved, judged = halves(sample(dtype=torch.float64, goal=planted))
    v_MD, c_M = (tensor.requires_grad_() for tensor in start(5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda v, c: projected_error(v, c, solved, judged, 1e-3), (v_MD, c_M))
    assert torch.autograd.grad(projected_error(v_MD, c_M, solved, judged, 1e-3), v_MD)[0].norm() > 1e-3


def test_error_is_that_of_a_weighted_ridge_regression_in_numpy():
    solved, judged = halves(sample(dtype=torch.float64, goal=planted))
    v_MD, c_M = start(5, dtype=torch.float64)

    def regressors(one):
        x = one.x_ND.numpy()
        return np.hstack((x, np.cos(x @ v_MD.numpy().T + c_M.numpy())))

    weight = solved.weight_N.numpy() / solved.weight_N.sum().item()
    raw, goal = regressors(solved), solved.goal_ND.numpy()
    mean, mean_goal = weight @ raw, weight @ goal
    scale = np.sqrt(weight @ (raw - mean) ** 2)
    # ridge as extra rows of the least squares
    rows = np.vstack((np.sqrt(weight)[:, None] * (raw - mean) / scale, np.sqrt(1e-2) * np.eye(len(scale))))
    goals = np.vstack((np.sqrt(weight)[:, None] * (goal - mean_goal), np.zeros((len(scale), 3))))
    w = np.linalg.lstsq(rows, goals, rcond=None)[0]
    missed = judged.goal_ND.numpy() - mean_goal - (regressors(judged) - mean) / scale @ w
    judging = judged.weight_N.numpy()
    expected = (judging @ missed ** 2).sum() / (judging @ judged.goal_ND.numpy() ** 2).sum()
    assert projected_error(v_MD, c_M, solved, judged, 1e-2).item() == pytest.approx(expected, rel=1e-9)


def test_solution_is_that_of_the_stand_in():
    one = sample(goal=planted)
    f_NF = torch.cat((projection.features(one.x_ND, *start(5)), torch.ones(len(one.x_ND), 1)), dim=1).double()
    weighted_NF = one.weight_N[:, None] * f_NF
    expected_FD, bias_D = closed_form.solve(
        closed_form.Statistics(f_NF.T @ weighted_NF, weighted_NF.T @ one.goal_ND.double()), 1e-3)
    w_FD, mean_F, mean_goal_D = projection._solution(f_NF[:, :-1].float(), one, 1e-3)
    torch.testing.assert_close(w_FD.double(), expected_FD, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((mean_goal_D - mean_F @ w_FD).double(), bias_D, rtol=1e-3, atol=1e-5)


def test_planted_waves_are_found_where_random_ones_miss_them():
    whole, unseen = sample(sequences=30, goal=planted), sample(sequences=30, seed=9, goal=planted)
    first = start(8)
    learned = learn(whole, *first, ridge=1e-4, steps=150, lr=0.1, seed=0)
    before, after = (projected_error(*theta, whole, unseen, 1e-4).item()
                     for theta in (first, (learned.v_MD, learned.c_M)))
    assert before > 0.2 and after < 0.5 * before


@pytest.mark.parametrize("lr", [0.05, 50.0])
def test_kept_step_is_the_best_compared_and_never_worse_than_the_start(lr):
    whole, first = sample(goal=planted), start(6)
    learned = learn(whole, *first, ridge=1e-3, steps=12, lr=lr, seed=2)
    compared = {row["step"]: row["judged_error"] for row in learned.curve if "judged_error" in row}
    assert list(compared) == [0, 5, 10, 12] and [row["step"] for row in learned.curve] == list(range(13))
    assert compared[learned.step] == min(compared.values()) <= compared[0]
    assert (learned.step == 0) == torch.equal(learned.v_MD, first[0])


def test_no_steps_return_the_start():
    first = start(6)
    learned = learn(sample(), *first, ridge=1e-3, steps=0, lr=0.1, seed=0)
    assert torch.equal(learned.v_MD, first[0]) and torch.equal(learned.c_M, first[1]) and learned.step == 0


def test_same_seed_same_bits_and_arguments_stay_as_they_are():
    whole, first = sample(goal=planted), start(6)
    copies = [tensor.clone() for tensor in first]
    one, two, other = (learn(whole, *first, ridge=1e-3, steps=7, lr=0.1, seed=seed) for seed in (3, 3, 4))
    assert one.curve == two.curve and torch.equal(one.v_MD, two.v_MD) and torch.equal(one.c_M, two.c_M)
    assert one.curve != other.curve
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(first, copies, strict=True))
    assert not any(tensor.requires_grad for tensor in (*first, one.v_MD, one.c_M))


def test_a_deal_parts_sequences_and_stays_within_its_tokens(monkeypatch):
    monkeypatch.setattr(projection, "MOST_SOLVED", 50)
    whole, generator = sample(), torch.Generator().manual_seed(0)
    solved, judged = projection._deal(whole, *projection._halves(torch.arange(12), generator), generator)
    assert len(solved.x_ND) == 50 and len(judged.x_ND) == 3 * 24
    assert not set(solved.sequence_N.tolist()) & set(judged.sequence_N.tolist())


def test_statistics_of_wide_kernels_keep_what_little_varies():
    generator = torch.Generator().manual_seed(0)
    h_STD = torch.randn(6, 40, 3, generator=generator)
    y_STD = h_STD + 0.1 * torch.randn(6, 40, 3, generator=generator)
    fit = dictionaries.Fit("rff", 5, 300.0, 1e-4, "inverse_norm", "rms", 8.0, 2, 0)
    dictionary = dictionaries.candidates(None, (0, 1), h_STD, y_STD, fit)
    found = closed_form._statistics(dictionary, h_STD, y_STD, torch.ones(6, 40, dtype=torch.bool), fit)
    x_ND = normalised(h_STD, "rms").flatten(0, 1).double()
    weight_N1 = 1 / y_STD.flatten(0, 1).norm(dim=1)[:, None]
    f_NF = torch.cat((projection.features(x_ND, dictionary.v_RD.double(), dictionary.c_R.double()),
                      torch.ones(len(x_ND), 1)), dim=1) * weight_N1
    expected = closed_form.Statistics(f_NF.T @ f_NF, f_NF.T @ ((y_STD - h_STD).flatten(0, 1) * weight_N1).double())
    for mine, theirs in zip(closed_form._standard(found), closed_form._standard(expected), strict=True):
        # float32 cosines of values near one carry 1e-7 of error, their spread is 1e-2
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("change", "match"), [
    ({"steps": -1}, "steps is -1; give a number at least 0"), ({"lr": 0.0}, "lr is 0.0; give a number above 0")])
def test_options_out_of_range_are_refused(change, match):
    with pytest.raises((ProjectionError, OptionError), match=match):
        learn(sample(), *start(4), **{"ridge": 1e-3, "steps": 2, "lr": 0.1, "seed": 0} | change)


def test_too_few_sequences_and_a_singular_matrix_are_refused():
    with pytest.raises(ProjectionError, match="2 sequences"):
        learn(sample(sequences=2), *start(4), ridge=1e-3, steps=2, lr=0.1, seed=0)
    v_MD, c_M = start(1)
    with pytest.raises(ProjectionError, match="singular with ridge 0"):
        projected_error(v_MD.repeat(9, 1), c_M.repeat(9), *halves(sample()), 0.0)


def test_as_a_dictionary_of_a_stand_in_it_is_at_least_as_good_as_the_start(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    h_STD = torch.randn(16, 24, 3, generator=generator)
    y_STD = h_STD + planted(normalised(h_STD.flatten(0, 1), "rms")).view_as(h_STD)
    fit = dictionaries.Fit("rff_learned", 6, 1.0, 1e-4, "inverse_norm", "rms", 8.0, 4, 0, theta_steps=60, theta_lr=0.1)
    learned = dictionaries.candidates(None, (0, 1), h_STD, y_STD, fit)
    random = dictionaries.candidates(None, (0, 1), h_STD, y_STD, fit._replace(dictionary="rff"))
    unchanged = dictionaries.candidates(None, (0, 1), h_STD, y_STD, fit._replace(theta_steps=0))
    assert torch.equal(unchanged.v_RD, random.v_RD) and torch.equal(unchanged.c_R, random.c_R)
    assert (learned.kind, learned.entries) == ("rff", 6) and not torch.equal(learned.v_RD, random.v_RD)
    errors = []
    for dictionary in (random, learned):
        run = built(closed_form.fit_stand_in((0, 1), dictionary, h_STD, y_STD, fit))
        with torch.no_grad():
            errors.append((run(h_STD) - y_STD).square().sum().item())
    assert errors[1] < errors[0]
