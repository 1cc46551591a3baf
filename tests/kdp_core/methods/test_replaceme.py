"""ReplaceMe: beside NumPy solutions from the models' own hooks, a planted map found again, plain checkpoints."""
import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.replaceme import compose, compose_cosine
from kdp_core.model import checkpoints, folded
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.sizes import count_params
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

RUN = (3, 5)
IDS_ST = torch.arange(2, 26).view(2, 12)
tokens = functools.cache(stored.tokens)


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, model):
    model.save_pretrained(root / "model")
    hidden.extract(model, tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module", params=["llama", "opt", "qwen3", "mistral"])
def dense(request, tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp(request.param), pico.lively(pico.model(request.param, layers=6)))


def selection(*blocks):
    return Selection(list(blocks), [0.0] * len(blocks), "angular", 0.2, 0.2, 0.5, 3, [],
                     sum(stop - start for start, stop in blocks))


def composed(dense, *blocks, **options):
    return compose(dense.folder, dense.hidden, tokens(), selection(*(blocks or [RUN])), heldout=0.25, **options)


def by_angle(dense, *blocks, **options):
    options = {"lr": 1e-2, "epochs": 3, "batch_tokens": 100, "heldout": 0.25, **options}
    return compose_cosine(dense.folder, dense.hidden, tokens(), selection(*(blocks or [RUN])), **options)


def writer_of(model):
    """Path below a layer of the last matrix of its MLP."""
    return family_of(model).parts["mlp"].writer


def last_of(model, layer):
    return decoder_layers(model)[layer].get_submodule(writer_of(model))


@torch.no_grad()
def caught(model, ids_ST, layer):
    """What the MLP of a layer gives, from a pass of the whole model."""
    seen = []
    hook = last_of(model, layer).register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids_ST)
    hook.remove()
    return seen[0].view(*ids_ST.shape, -1)


def split(seed=0):
    """Sequences fitted on and judged on."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    return order[4:], order[:4]


def given(dense, rows):
    """X = m, Y and x + m of these sequences, in NumPy's double precision."""
    m_ND = caught(dense.model, tokens().ids_ST[rows], RUN[0] - 1).flatten(0, 1).double().numpy()
    start_ND, stop_ND = (dense.hidden.state(k)[rows].flatten(0, 1).double().numpy() for k in RUN)
    return m_ND, stop_ND - (start_ND - m_ND), stop_ND


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_the_map_is_the_ridge_solution_and_goes_into_the_last_matrix(dense, ridge):
    plan, _, fits, stats = composed(dense, ridge=ridge)
    (m_ND, goal_ND, _), (held_m_ND, held_goal_ND, held_stop_ND) = (given(dense, rows) for rows in split())
    gram_DD = m_ND.T @ m_ND
    level = ridge * np.trace(gram_DD) / 32
    rows = np.vstack([m_ND, np.sqrt(level) * np.eye(32)])
    t_DD = np.linalg.lstsq(rows, np.vstack([goal_ND, np.zeros((32, 32))]), rcond=None)[0]
    last, prefix = last_of(dense.model, 2), family_of(dense.model).prefix
    name = f"{prefix}2.{writer_of(dense.model)}"
    np.testing.assert_allclose(plan.tensors[f"{name}.weight"].numpy(), t_DD.T @ last.weight.detach().double().numpy(),
                               atol=1e-3)
    assert set(plan.tensors) == {f"{name}.weight"} | ({f"{name}.bias"} if last.bias is not None else set())
    if last.bias is not None:
        np.testing.assert_allclose(plan.tensors[f"{name}.bias"].numpy(), t_DD.T @ last.bias.detach().double().numpy(),
                                   atol=1e-3)
    error = ((held_m_ND @ t_DD - held_goal_ND) ** 2).sum() / ((held_stop_ND - held_stop_ND.mean(0)) ** 2).sum()
    assert fits == [{"block": RUN, "heldout_error": pytest.approx(error, rel=1e-2), "params": 0}]
    assert plan.modules == [] and stats["tokens"] == 12 * 24


def planted(dense, path, *, massive=0):
    """The model's states, but the run's last one is x + m M; also M. Some tokens of it may be made massive."""
    map_DD = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    m_STD = caught(dense.model, tokens().ids_ST, RUN[0] - 1)
    h_LSTD = torch.stack([dense.hidden.state(k) for k in dense.hidden.layers])
    h_LSTD[RUN[1]] = h_LSTD[RUN[0]] - m_STD + m_STD @ map_DD
    h_LSTD[RUN[1], :, :massive] = 1e3
    return dense._replace(hidden=stored.write(path, h_LSTD)), map_DD


def recovered(plan, dense, map_DD):
    """Largest error of the fitted matrix beside the planted one."""
    name = f"{family_of(dense.model).prefix}2.{writer_of(dense.model)}.weight"
    return (plan.tensors[name] - map_DD.T @ last_of(dense.model, 2).weight.detach()).abs().max().item()


def test_a_planted_map_is_found_again(dense, tmp_path):
    case, map_DD = planted(dense, tmp_path / "h.zarr")
    made = composed(case, ridge=1e-10)
    assert made.fits[0]["heldout_error"] < 1e-6 and recovered(made.plan, dense, map_DD) < 0.02


def test_massive_tokens_are_left_out_where_asked(dense, tmp_path):
    case, map_DD = planted(dense, tmp_path / "h.zarr", massive=1)
    assert recovered(composed(case, ridge=1e-10, massive="mask").plan, dense, map_DD) < 0.02
    assert recovered(composed(case, ridge=1e-10, massive="raw").plan, dense, map_DD) > 1.0


def test_batches_do_not_matter(dense):
    one, other = (composed(dense, batch_sequences=size).plan.tensors for size in (1, 8))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_that_do_nothing_go_without_a_trace(dense, tmp_path):
    """Where the run only hands its state on, T is the identity, and the pruned model the dense one."""
    family = dense.model.config.model_type
    model = pico.lively(pico.model(family, layers=6))
    for layer in range(*RUN):
        for name in (part.writer for part in family_of(model).parts.values()):
            for parameter in decoder_layers(model)[layer].get_submodule(name).parameters():
                parameter.zero_()
    case = dense_of(tmp_path, model)
    plan = composed(case, ridge=1e-10).plan._replace(drop=[(layer, "whole") for layer in range(*RUN)])
    facts = fold(plan, case.folder, tmp_path / "out")
    pruned = checkpoints.load_model(tmp_path / "out")
    torch.testing.assert_close(pruned(IDS_ST).logits, model(IDS_ST).logits, atol=0.02, rtol=0.01)
    assert type(pruned) is type(model) and facts.params_added == 0 and len(decoder_layers(pruned)) == 4
    assert not (tmp_path / "out" / folded.FILE).exists()
    assert facts.params_after == facts.params_before - 2 * count_params(decoder_layers(model)[3])


@pytest.mark.parametrize("blocks, options, message", [
    ([(0, 2)], {}, r"one run of layers into the layer before it; the blocks are \[\(0, 2\)\]"),
    ([(1, 2), (3, 4)], {}, r"the blocks are \[\(1, 2\), \(3, 4\)\]"),
    ([RUN], {"massive": "bypass"}, r"massive is 'bypass'; choose one of raw, mask"),
])
def test_what_cannot_be_is_named(dense, blocks, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        composed(dense, *blocks, **options)


@pytest.mark.parametrize("heldout, error, message", [
    (0.0, OptionError, r"heldout is 0\.0; give a number above 0"),
    (1.0, OptionError, r"heldout is 1\.0; give a number below 1"),
    (0.99, FitError, r"compose\.heldout 0\.99 of 16 sequences leaves none to fit on or none to judge on"),
])
def test_a_share_that_leaves_no_sequence_is_refused(dense, heldout, error, message):
    with pytest.raises(error, match=message):
        compose(dense.folder, dense.hidden, tokens(), selection(RUN), heldout=heldout)


@pytest.mark.parametrize("start", [RUN[0], 0])
def test_a_family_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch, start):
    case = dense_of(tmp_path, pico.model("gemma3_text", layers=6))
    monkeypatch.setattr(checkpoints, "load_model", lambda *args, **options: pytest.fail("loaded"))
    for fit in (composed, by_angle):
        with pytest.raises(FitError, match="cannot be folded into a gemma3_text model: a norm follows its MLPs"):
            fit(case, (start, RUN[1]))


# Least squares, literally ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp("llama"), pico.lively(pico.model("llama", layers=6)))


def weight_of(made, dense):
    return made.plan.tensors["model.layers.2.mlp.down_proj.weight"].double().numpy()


def literal(rows_m_ND, rows_goal_ND, ridge):
    """(X'X + alpha I)^-1 X'Y, token by token."""
    D = rows_m_ND.shape[1]
    gram, cross = np.zeros((D, D)), np.zeros((D, D))
    for m_D, goal_D in zip(rows_m_ND, rows_goal_ND, strict=True):
        gram, cross = gram + np.outer(m_D, m_D), cross + np.outer(m_D, goal_D)
    alpha = ridge * sum(gram[i, i] for i in range(D)) / D
    return np.linalg.inv(gram + alpha * np.eye(D)) @ cross


def test_the_least_squares_map_is_that_of_the_formula(llama):
    (m_ND, goal_ND, _), _ = (given(llama, rows) for rows in split())
    down = last_of(llama.model, 2).weight.detach().double().numpy()
    np.testing.assert_allclose(weight_of(composed(llama, ridge=1e-2), llama), literal(m_ND, goal_ND, 1e-2).T @ down,
                               atol=1e-4)


def test_the_ridge_of_least_held_out_error_is_taken(llama):
    ridges = [1e-3, 0.3, 1e-1, 10.0]
    made = composed(llama, ridges=ridges, ridge=1e6)
    (m_ND, goal_ND, _), (held_m_ND, held_goal_ND, held_stop_ND) = (given(llama, rows) for rows in split())
    errors = []
    for ridge in ridges:
        t_DD = literal(m_ND, goal_ND, ridge)
        errors.append(((held_m_ND @ t_DD - held_goal_ND) ** 2).sum()
                      / ((held_stop_ND - held_stop_ND.mean(0)) ** 2).sum())
    best = ridges[int(np.argmin(errors))]
    assert [row["ridge"] for row in made.stats["ridges"]] == ridges and best not in (ridges[0], ridges[-1])
    assert [row["heldout_error"] for row in made.stats["ridges"]] == pytest.approx(errors, rel=1e-4)
    assert made.stats["ridge"] == best and made.fits[0]["heldout_error"] == pytest.approx(min(errors), rel=1e-4)
    np.testing.assert_allclose(weight_of(made, llama), weight_of(composed(llama, ridge=best), llama), atol=1e-5)


def test_the_first_of_equal_ridges_is_taken(llama):
    with_one, with_two = (composed(llama, ridges=[0.1] * count) for count in (1, 2))
    np.testing.assert_array_equal(weight_of(with_one, llama), weight_of(with_two, llama))


def test_a_singular_gram_matrix_is_named(tmp_path):
    model = pico.lively(pico.model("llama", layers=6))
    with torch.no_grad():
        last_of(model, 2).weight[5] = 0.0
    case = dense_of(tmp_path, model)
    assert composed(case, ridges=[1e-4]).stats["ridge"] == 1e-4
    with pytest.raises(FitError, match="the Gram matrix is singular with ridge 0; raise the ridge"):
        composed(case, ridges=[1e-4, 0.0])


@pytest.mark.parametrize("ridges, error, message", [
    ([], FitError, r"compose\.ridges is \[\]; name at least one ridge"),
    ([0.1, -1e-4], OptionError, r"ridges is \[0\.1, -0\.0001\]; give a number at least 0"),
])
def test_ridges_that_cannot_be_are_named(llama, ridges, error, message):
    with pytest.raises(error, match=message):
        composed(llama, ridges=ridges)


# By angle -------------------------------------------------------------------------------------------------------------

def angle_of(dense, rows, accurate, keep_ST):
    """m, base and goal of cos(base + T'm, goal), in NumPy's double precision."""
    m_ND, missing_ND, stop_ND = (part[keep_ST[rows].flatten().numpy()] for part in given(dense, rows))
    return (m_ND, stop_ND - missing_ND, stop_ND) if accurate else (m_ND, np.zeros_like(m_ND), missing_ND)


def loss_and_slope(t_DD, m_ND, base_ND, goal_ND):
    """Mean of 1 - cos over tokens, one by one, and its derivative by T."""
    loss, slope_DD = 0.0, np.zeros_like(t_DD)
    for m_D, base_D, goal_D in zip(m_ND, base_ND, goal_ND, strict=True):
        p_D = base_D + t_DD.T @ m_D
        p, goal = np.sqrt(p_D @ p_D), np.sqrt(goal_D @ goal_D)
        cosine = p_D @ goal_D / (p * goal)
        loss += (1 - cosine) / len(m_ND)
        # d cos / dp = y / (|p| |y|) - cos p / |p|^2
        slope_DD -= np.outer(m_D, goal_D / (p * goal) - cosine * p_D / p ** 2) / len(m_ND)
    return loss, slope_DD


def adam(t_DD, train, held, *, lr, epochs, batch_tokens):
    """Adam from its paper: T of the best epoch, and the held-out losses."""
    order, step = torch.Generator().manual_seed(0), 0
    first, second = np.zeros_like(t_DD), np.zeros_like(t_DD)
    best, judged = t_DD, [loss_and_slope(t_DD, *held)[0]]
    for _ in range(epochs):
        shuffled = torch.randperm(len(train[0]), generator=order).numpy()
        for at in range(0, len(shuffled), batch_tokens):
            _, slope_DD = loss_and_slope(t_DD, *(part[shuffled[at:at + batch_tokens]] for part in train))
            step += 1
            first, second = 0.9 * first + 0.1 * slope_DD, 0.999 * second + 0.001 * slope_DD ** 2
            t_DD = t_DD - lr * (first / (1 - 0.9 ** step)) / (np.sqrt(second / (1 - 0.999 ** step)) + 1e-8)
        judged.append(loss_and_slope(t_DD, *held)[0])
        if judged[-1] < min(judged[:-1]):
            best = t_DD
    return best, judged


@pytest.mark.parametrize("accurate, start, massive", [(True, "identity", "raw"), (False, "lstsq", "raw"),
                                                      (True, "lstsq", "mask"), (False, "identity", "mask")])
def test_the_map_by_angle_is_that_of_adam_as_written(llama, tmp_path, accurate, start, massive):
    h_LSTD = torch.stack([llama.hidden.state(k) for k in llama.hidden.layers])
    h_LSTD[RUN[1], :, 3] *= 100
    case, keep_ST = llama._replace(hidden=stored.write(tmp_path / "h.zarr", h_LSTD)), torch.ones(16, 24) > 0
    if massive == "mask":
        keep_ST[:, 3] = False
    made = by_angle(case, accurate=accurate, start=start, massive=massive, ridge=0.1)
    fitted_on, judged_on = split()
    train, held = (angle_of(case, rows.sort().values, accurate, keep_ST) for rows in (fitted_on, judged_on))
    t_DD = np.eye(32)
    if start == "lstsq":
        m_ND, base_ND, goal_ND = angle_of(case, fitted_on, True, keep_ST)
        t_DD = literal(m_ND, goal_ND - base_ND, 0.1)
    t_DD, judged = adam(t_DD, train, held, lr=1e-2, epochs=3, batch_tokens=100)
    down = last_of(llama.model, 2).weight.detach().double().numpy()
    np.testing.assert_allclose(weight_of(made, case), t_DD.T @ down, atol=1e-4)
    assert [row["heldout_loss"] for row in made.curve] == pytest.approx(judged, rel=1e-4)
    assert made.stats["epoch"] == judged.index(min(judged)) and made.stats["tokens"] == 12 * 24
    assert made.stats["heldout_loss"] == made.curve[made.stats["epoch"]]["heldout_loss"]
    assert made.curve[0]["loss"] is None and made.curve[1]["loss"] > 0


def test_a_planted_map_is_approached_by_angle_and_judged_as_the_other_fit(dense, tmp_path):
    case, map_DD = planted(dense, tmp_path / "h.zarr")
    near, far = by_angle(case, lr=1e-3, epochs=20, start="lstsq", ridge=1e-8), by_angle(case, lr=1e-2, epochs=20)
    assert recovered(near.plan, dense, map_DD) < 0.02 and near.fits[0]["heldout_error"] < 1e-4
    assert far.stats["heldout_loss"] < 0.1 * far.curve[0]["heldout_loss"]
    assert set(far.plan.tensors) == set(composed(case).plan.tensors)


def test_the_start_is_kept_where_training_does_harm(dense):
    made, last = by_angle(dense, lr=100.0, epochs=1), last_of(dense.model, 2)
    assert made.stats["epoch"] == 0 and made.curve[1]["heldout_loss"] > made.curve[0]["heldout_loss"]
    for kept in (made, by_angle(dense, epochs=0)):
        for name, tensor in kept.plan.tensors.items():
            assert torch.equal(tensor, last.get_parameter(name.rsplit(".", 1)[1]))
    least, start = composed(dense, ridge=1e-4), by_angle(dense, epochs=0, start="lstsq")
    for name, tensor in least.plan.tensors.items():
        torch.testing.assert_close(start.plan.tensors[name], tensor, atol=1e-5, rtol=1e-4)
    assert start.fits[0]["heldout_error"] == pytest.approx(least.fits[0]["heldout_error"], rel=1e-4)


def test_the_seed_decides_and_torchs_own_generator_stays(llama):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = weight_of(by_angle(llama, seed=1), llama)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert (weight_of(by_angle(llama, seed=1), llama) == one).all()
    assert (weight_of(by_angle(llama, seed=2), llama) != one).any()


@pytest.mark.parametrize("options, message", [
    ({"start": "zero"}, r"start is 'zero'; choose one of identity, lstsq"),
    ({"lr": 0.0}, r"lr is 0\.0; give a number above 0"),
    ({"epochs": -1}, r"epochs is -1; give a number at least 0"),
    ({"batch_tokens": 0}, r"batch_tokens is 0; give a number at least 1"),
    ({"massive": "bypass"}, r"massive is 'bypass'; choose one of raw, mask"),
    ({"heldout": 0.99}, r"compose\.heldout 0\.99 of 16 sequences leaves none to fit on or none to judge on"),
])
def test_options_by_angle_that_cannot_be_are_named(llama, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        by_angle(llama, **options)


def test_a_loss_by_angle_that_is_no_number_is_named(llama, tmp_path):
    h_LSTD = torch.stack([llama.hidden.state(k) for k in llama.hidden.layers])
    h_LSTD[RUN[1], :, 3] = float("nan")
    with pytest.raises(TrainingFailed, match=r"by cosine: the loss is nan; lower compose\.lr"):
        by_angle(llama._replace(hidden=stored.write(tmp_path / "h.zarr", h_LSTD)))
