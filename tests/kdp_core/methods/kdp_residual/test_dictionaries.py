"""Dictionaries are compared with the layers whose neurons they hold, and with the kernel that they approximate."""
import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from kdp_core.methods.kdp_residual import closed_form, dictionaries
from kdp_core.methods.kdp_residual.closed_form import fit_stand_in
from kdp_core.methods.kdp_residual.dictionaries import counted, neurons, random_features
from kdp_core.model.families import FAMILIES, decoder_layers, family_of
from kdp_core.model.passes import built
from kdp_core.model.stand_ins import normalised
from kdp_core.states import hidden
from kdp_core.states.block import FitError, relative_error
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core.methods.kdp_residual.examples import FIT, entries_of, randn

IDS_ST = torch.randint(2, 384, (24, 24), generator=torch.Generator().manual_seed(2))


def last_of(model, layer):
    return decoder_layers(model)[layer].get_submodule(family_of(model).parts["mlp"].writer)


def one_mlp(family):
    """A model of three layers whose attention adds nothing, and its exact states of all sorts of tokens."""
    model = pico.lively(pico.model(family, layers=3))
    with torch.no_grad():
        for layer in decoder_layers(model):
            for parameter in layer.get_submodule(FAMILIES[family].parts["attention"].writer).parameters():
                parameter.zero_()
    return model, [h_BTD.clone() for h_BTD in boundary_states(model, IDS_ST, [0, 1, 2, 3])]


def hidden_like():
    """What the defaults read of stored states."""
    return hidden.HiddenStates(None, [], torch.zeros(0), 1e6, 0, 0, 0, {})


def test_which_tokens_count():
    h_STD, y_STD = torch.ones(2, 6, 4), 3 * torch.ones(2, 6, 4)
    h_STD[0, 1], y_STD[1, 5], h_STD[1, 0] = 8.1, 24.3, 7.9
    keep_ST, above = counted(h_STD, y_STD, 8.0)
    assert above == pytest.approx(16.0) and (~keep_ST).nonzero().tolist() == [[0, 1], [1, 5]]
    with pytest.raises(FitError, match=r"block \(2, 3\): every token is massive; raise hidden\.massive_factor"):
        fit_stand_in((2, 3), None, h_STD, y_STD, FIT._replace(massive_factor=0.5))


@pytest.mark.parametrize("family", pico.EVERY)
@torch.no_grad()
def test_the_dictionary_is_what_the_layers_last_matrix_reads(family):
    model, states = one_mlp(family)
    seen = []
    hook = last_of(model, 1).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS_ST)
    hook.remove()
    norm = {"opt": "layer", "gpt2": "layer", "gpt_neox": "layer", "olmo2": "none"}.get(family, "rms")
    assert dictionaries.closed_form_options(model, hidden_like(), dictionary="neurons", entries=64, seed=0).norm == norm
    dictionary = neurons(model, (1, 2))
    module = closed_form._module((1, 2), dictionary, torch.zeros(32 + dictionary.entries, 32), torch.zeros(32), 1e9,
                                norm)
    found = built(module).features(normalised(states[1], norm))
    torch.testing.assert_close(found, seen[0].view(found.shape), atol=1e-3, rtol=1e-3)
    assert found.std() > 0.05 and dictionary.entries == 64


@pytest.mark.parametrize("family", [family for family in pico.EVERY if not FAMILIES[family].norms_after])
def test_with_all_neurons_the_stand_in_is_the_layer(family):
    """Of Gemma's and OLMo2's it cannot be: a norm follows their MLPs."""
    model, states = one_mlp(family)
    fit = dictionaries.closed_form_options(model, hidden_like(), dictionary="neurons", entries=64, seed=0)
    h_STD, y_STD = states[1], states[2]
    module = fit_stand_in((1, 2), neurons(model, (1, 2)), h_STD[:20], y_STD[:20], fit._replace(ridge=1e-6))
    with torch.no_grad():
        assert relative_error(built(module)(h_STD[20:]).flatten(0, 1), y_STD[20:].flatten(0, 1)) < 1e-5
    few = fit_stand_in((1, 2), neurons(model, (1, 2)), h_STD[:20], y_STD[:20], fit._replace(entries=8))
    with torch.no_grad():
        assert relative_error(built(few)(h_STD[20:]).flatten(0, 1), y_STD[20:].flatten(0, 1)) > 1e-3


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
