"""Stand-ins of skip path, linear part and dictionary: beside scikit-learn, brute force, and layers they must equal."""
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.linear_model import Ridge

from kdp_core.base.options import OptionError
from kdp_core.base.records import ModelFacts, Plan, Selection
from kdp_core.methods import settings
from kdp_core.methods.kdp_residual import closed_form, dictionaries
from kdp_core.methods.kdp_residual.closed_form import Statistics, fit_alone, fit_stand_in, solve
from kdp_core.methods.kdp_residual.compose import compose, compose_linear, linear_params, module_params
from kdp_core.methods.kdp_residual.dictionaries import Dictionary, Fit, Kind, counted, neurons, random_features
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import built
from kdp_core.model.stand_ins import normalised
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError, relative_error
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core import stored

FIT = Fit("none", 6, 3.0, 1e-2, "inverse_norm", "rms", 8.0, 4, 0)
LAST = {"opt": "fc2"}
"""The last matrix of an MLP, `mlp.down_proj` in the other families."""
ATTENTION_OUT = {"opt": "self_attn.out_proj"}
BLOCKS = [(1, 3), (4, 6)]
IDS_ST = torch.randint(2, 384, (24, 24), generator=torch.Generator().manual_seed(2))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def last_of(model, layer):
    return decoder_layers(model)[layer].get_submodule(LAST.get(model.config.model_type, "mlp.down_proj"))


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


def entries_of(dictionary, x_ND):
    """f(V x + c) by NumPy."""
    inner = x_ND @ dictionary.v_RD.double().numpy().T + dictionary.c_R.double().numpy()
    if dictionary.kind == "rff":
        return np.cos(inner)
    if dictionary.kind == "mlp":
        return np.maximum(inner, 0)
    gate, up = np.split(inner, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def made_up(kind, entries=6, width=5, seed=0):
    rows = 2 * entries if kind == "glu" else entries
    activation = "silu" if kind == "glu" else "relu"
    return Dictionary(kind, randn(rows, width, seed=seed), randn(rows, seed=seed + 1), activation)


# least squares

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
        assert torch.equal(built(module)(h_STD[1, 2]), h_STD[1, 2]), "massive tokens go by"
    np.testing.assert_allclose(out_ND.numpy(), h_ND + f_NF @ w_DF.T + bias_D, atol=1e-3)


def test_streamed_statistics_are_those_of_the_whole(monkeypatch):
    h_STD, y_STD, dictionary = randn(7, 9, 5, seed=7), randn(7, 9, 5, seed=8), made_up("glu")
    whole = fit_stand_in((0, 1), dictionary, h_STD, y_STD, FIT)
    for tokens in (9, 27):  # of the 63: one and three sequences a product
        monkeypatch.setattr(closed_form, "PRODUCT_TOKENS", tokens)
        other = fit_stand_in((0, 1), dictionary, h_STD, y_STD, FIT)
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, atol=1e-4, rtol=1e-4)


def test_which_tokens_count():
    h_STD, y_STD = torch.ones(2, 6, 4), 3 * torch.ones(2, 6, 4)
    h_STD[0, 1], y_STD[1, 5], h_STD[1, 0] = 8.1, 24.3, 7.9
    keep_ST, above = counted(h_STD, y_STD, 8.0)
    assert above == pytest.approx(16.0) and (~keep_ST).nonzero().tolist() == [[0, 1], [1, 5]]
    with pytest.raises(FitError, match=r"block \(2, 3\): every token is massive; raise hidden\.massive_factor"):
        fit_stand_in((2, 3), None, h_STD, y_STD, FIT._replace(massive_factor=0.5))


# choice of neurons

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


def one_mlp(family):
    """A model of three layers whose attention adds nothing, and its exact states of all sorts of tokens."""
    model = pico.lively(pico.model(family, layers=3))
    with torch.no_grad():
        for layer in decoder_layers(model):
            for parameter in layer.get_submodule(ATTENTION_OUT.get(family, "self_attn.o_proj")).parameters():
                parameter.zero_()
    return model, [h_BTD.clone() for h_BTD in boundary_states(model, IDS_ST, [0, 1, 2, 3])]


@pytest.mark.parametrize("family", pico.EVERY)
@torch.no_grad()
def test_the_dictionary_is_what_the_layers_last_matrix_reads(family):
    model, states = one_mlp(family)
    seen = []
    hook = last_of(model, 1).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS_ST)
    hook.remove()
    norm = "layer" if family == "opt" else "rms"
    dictionary = neurons(model, (1, 2))
    module = closed_form._module((1, 2), dictionary, torch.zeros(32 + dictionary.entries, 32), torch.zeros(32), 1e9,
                                norm)
    found = built(module).features(normalised(states[1], norm))
    torch.testing.assert_close(found, seen[0].view(found.shape), atol=1e-3, rtol=1e-3)
    assert found.std() > 0.05 and dictionary.entries == 64


@pytest.mark.parametrize("family", [family for family in pico.EVERY if family != "gemma3_text"])
def test_with_all_neurons_the_stand_in_is_the_layer(family):
    """Of Gemma's it cannot be: a norm follows its MLPs."""
    model, states = one_mlp(family)
    fit = dictionaries.closed_form_options(model, hidden_like(), dictionary="neurons", entries=64, seed=0)
    h_STD, y_STD = states[1], states[2]
    module = fit_stand_in((1, 2), neurons(model, (1, 2)), h_STD[:20], y_STD[:20], fit._replace(ridge=1e-6))
    with torch.no_grad():
        assert relative_error(built(module)(h_STD[20:]).flatten(0, 1), y_STD[20:].flatten(0, 1)) < 1e-5
    few = fit_stand_in((1, 2), neurons(model, (1, 2)), h_STD[:20], y_STD[:20], fit._replace(entries=8))
    with torch.no_grad():
        assert relative_error(built(few)(h_STD[20:]).flatten(0, 1), y_STD[20:].flatten(0, 1)) > 1e-3


def hidden_like():
    """What the defaults read of stored states."""
    return hidden.HiddenStates(None, [], torch.zeros(0), 1e6, 0, 0, 0, {})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_neurons_of_several_layers_follow_each_other(family):
    model = pico.lively(pico.model(family, layers=3))
    both = neurons(model, (1, 3))
    assert both.entries == 128
    for layer, rows in ((1, torch.arange(64)), (2, torch.arange(64, 128))):
        one = neurons(model, (layer, layer + 1))
        assert torch.equal(both.only(rows).v_RD, one.v_RD) and torch.equal(both.only(rows).c_R, one.c_R)


def test_random_features_approximate_the_kernel_of_the_asked_width():
    x_ND = randn(300, 5, seed=40) + 3
    found = random_features(x_ND, 20_000, 2.0, seed=7)
    width = 2.0 * np.median(pdist(x_ND.numpy()))
    assert 1 / found.v_RD.std().item() == pytest.approx(width, rel=0.1)
    few_ND = x_ND[:8].double().numpy()
    f_NR = entries_of(found, few_ND)
    distance_NN = np.linalg.norm(few_ND[:, None] - few_ND[None], axis=-1)
    kernel_NN = np.exp(-(distance_NN * found.v_RD.std().item()) ** 2 / 2)
    np.testing.assert_allclose(2 * f_NR @ f_NR.T / 20_000, kernel_NN, atol=0.05)
    again, other = (random_features(x_ND, 20, 2.0, seed=seed) for seed in (7, 8))
    assert torch.equal(again.v_RD, random_features(x_ND, 20, 2.0, seed=7).v_RD)
    assert not torch.equal(again.v_RD, other.v_RD)


# whole grid points

class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    model = pico.model("llama", layers=8)
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


def selection(*blocks):
    return Selection(list(blocks), [0.0] * len(blocks), "divergence", 0.2, 0.2, 0.5, 3, [],
                     sum(stop - start for start, stop in blocks))


def composed(dense, blocks=BLOCKS, **options):
    given = {"dictionary": "none", "epochs": 0, "heldout": 0.25, **options}
    return compose(dense.folder, dense.hidden, stored.tokens(), selection(*blocks), **given)


def kept_of(dense, heldout=0.25, seed=0):
    order = torch.randperm(dense.hidden.sequences, generator=torch.Generator().manual_seed(seed))
    return order[round(heldout * dense.hidden.sequences):].sort().values


def assert_same(module, other, **tolerance):
    assert module.block == other.block and set(module.tensors) == set(other.tensors)
    for name, tensor in module.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, **tolerance)


@pytest.mark.parametrize("dictionary", get_args(Kind))
def test_without_prefix_each_block_is_fitted_on_the_dense_models_states(dense, dictionary):
    made = composed(dense, dictionary=dictionary, entries=8, prefix=False)
    fit = Fit(dictionary, 8, 3.0, 1e-4, "inverse_norm", "rms", 8.0, 4, 0)
    for module, block in zip(made.plan.modules, BLOCKS, strict=True):
        assert_same(module, fit_alone(dense.model, dense.hidden, block, kept_of(dense), fit), atol=0, rtol=0)
    assert made.curve == [] and made.plan.tensors == {} and [row["block"] for row in made.fits] == BLOCKS


def test_with_prefix_a_block_is_fitted_on_what_the_pruned_model_feeds_it(dense, tmp_path):
    """Beside the states of a checkpoint in which the blocks before it are folded."""
    with_prefix, without = composed(dense), composed(dense, prefix=False)
    assert_same(with_prefix.plan.modules[0], without.plan.modules[0], atol=0, rtol=0)
    first = with_prefix.plan.modules[0]
    fold(Plan("made_up", [(1, "whole"), (2, "whole")], [first], {}), dense.folder, tmp_path / "out")
    # layers 0, 3, 4 ... are left: state 4 of the dense model is state 2 here
    fed_STD, = boundary_states(checkpoints.load_model(tmp_path / "out"), stored.tokens().ids_ST, [2])
    kept, fit = kept_of(dense), Fit("none", 0, 3.0, 1e-4, "inverse_norm", "rms", 8.0, 4, 0)
    expected = fit_stand_in((4, 6), None, fed_STD[kept], dense.hidden.state(6)[kept], fit)
    assert_same(with_prefix.plan.modules[1], expected, atol=1e-3, rtol=1e-3)
    apart = with_prefix.plan.modules[1].tensors["linear.weight"] - without.plan.modules[1].tensors["linear.weight"]
    assert apart.abs().max() > 0.01


def test_the_prefix_mends_what_earlier_blocks_broke(dense):
    blocks = [(1, 2), (3, 4), (5, 6)]
    with_prefix, without = composed(dense, blocks), composed(dense, blocks, prefix=False)
    first, *later = ((a["heldout_error"], b["heldout_error"]) for a, b in zip(with_prefix.fits, without.fits,
                                                                              strict=True))
    assert first[0] == first[1] and all(ours < theirs for ours, theirs in later)


def test_held_out_sequences_are_never_fitted_on(dense, tmp_path):
    h_LSTD = torch.stack([dense.hidden.state(k) for k in dense.hidden.layers])
    held = [s for s in range(16) if s not in kept_of(dense).tolist()]
    assert len(held) == 4
    h_LSTD[:, held] = randn(9, 4, 24, 32, seed=50)
    changed = dense._replace(hidden=stored.write(tmp_path / "h.zarr", h_LSTD))
    before, after = (composed(case, prefix=False) for case in (dense, changed))
    for module, other in zip(before.plan.modules, after.plan.modules, strict=True):
        assert_same(module, other, atol=1e-5, rtol=1e-5)
    assert before.fits[0]["heldout_error"] != pytest.approx(after.fits[0]["heldout_error"], rel=0.1)


def test_joint_training_comes_last_and_no_weight_of_the_model_changes(dense):
    weights = (dense.folder / "model.safetensors").read_bytes()
    start, made = (composed(dense, dictionary="neurons", entries=4, epochs=epochs, lr=1e-2) for epochs in (0, 2))
    assert [row["epoch"] for row in made.curve] == [0, 1, 2] and made.plan.tensors == {}
    assert min(row["heldout_loss"] for row in made.curve) < made.curve[0]["heldout_loss"]
    assert made.fits == start.fits, "errors of the closed form"
    for module, other in zip(start.plan.modules, made.plan.modules, strict=True):
        assert module.options == other.options
        assert not torch.equal(module.tensors["linear.weight"], other.tensors["linear.weight"])
    assert (dense.folder / "model.safetensors").read_bytes() == weights


def test_the_linear_row_is_the_linear_part_alone(dense):
    made = compose_linear(dense.folder, dense.hidden, stored.tokens(), selection(*BLOCKS), heldout=0.25, ridge=1e-3)
    expected = composed(dense, ridge=1e-3)
    for module, other in zip(made.plan.modules, expected.plan.modules, strict=True):
        assert_same(module, other, atol=0, rtol=0)
        assert set(module.tensors) == {"linear.weight", "linear.bias"} and module.options["entries"] == 0


@pytest.mark.parametrize("family, dictionary", [("llama", "neurons"), ("opt", "neurons"), ("llama", "rff"),
                                                ("opt", "rff_learned"), ("qwen3", "none")])
def test_parameters_are_known_before_the_fit(family, dictionary):
    kind = {"neurons": "mlp" if family == "opt" else "glu", "none": None}.get(dictionary, "rff")
    module = fit_stand_in((0, 1), kind and made_up(kind), randn(4, 9, 5), randn(4, 9, 5, seed=1), FIT)
    facts = ModelFacts(family, 8, 5, 384, 0, [], 0, "made", "")
    assert module_params(facts, {"compose": {"dictionary": dictionary, "entries": 6}}) == \
        sum(tensor.numel() for tensor in module.tensors.values())
    assert module_params(facts, {}) == module_params(facts, {"compose": settings(compose, {})})
    assert linear_params(facts, {}) == module_params(facts, {"compose": {"dictionary": "none"}}) == 30


@pytest.mark.parametrize("options, message", [
    ({"dictionary": "words"}, r"dictionary is 'words'; choose one of neurons, rff,"),
    ({"token_weight": "all"}, r"token_weight is 'all'; choose one of inverse_norm, none"),
    ({"dictionary": "rff", "entries": 0}, r"entries is 0; give a number at least 1"),
    ({"heldout": 0.0}, r"heldout is 0\.0; give a number above 0"), ({"heldout": 0.99}, r"compose\.heldout 0\.99 of 16"),
    ({"epochs": -1}, r"epochs is -1; give a number at least 0"),
    ({"epochs": 1, "positions": 0}, "positions is 0; give a number at least 1"),
])
def test_options_that_cannot_be_are_named(dense, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        composed(dense, **options)


def test_states_that_are_not_stored_are_named(dense, tmp_path):
    hidden.extract(dense.model, stored.tokens(), tmp_path / "h.zarr", layers=[1, 3, 4, 6])
    with pytest.raises(FitError, match=r"lacks states \(stored: \[1, 3, 4, 6\]\); set hidden\.layers to all"):
        composed(dense._replace(hidden=hidden.read(tmp_path / "h.zarr")))
