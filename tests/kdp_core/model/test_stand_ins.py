"""Stand-ins: what each module computes, checked by hand."""
import numpy as np
import pytest
import torch
from torch import nn

from kdp_core.model.families import decoder_layers
from kdp_core.model.sizes import count_macs, count_params
from kdp_core.model.stand_ins import Affine, RareEmbedding, RareHead, Residual, RffMlp, normalised, rms_scale
from kdp_core.model.surgery import attach
from tests import pico
from tests.kdp_core.model.random_weights import IDS_ST, filled, randn

VOCABULARY, WIDTH, FREQUENT, RANK = 20, 8, 6, 3


@pytest.mark.parametrize("lift_input", ["raw", "rms"])
def test_rff_mlp_by_hand(lift_input):
    module, h = filled(RffMlp(6, 5, 4, "relu", lift_input)), randn(2, 3, 6, seed=1)
    part = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    x = h.double().numpy()
    if lift_input == "rms":
        x = x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True))
    angle = x @ part["omega"].T + part["phase"]
    z = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    out = np.maximum(z @ part["w1.weight"].T + part["w1.bias"], 0) @ part["w2.weight"].T + part["w2.bias"]
    np.testing.assert_allclose(module(h).detach().numpy(), out, atol=1e-5)


@pytest.mark.parametrize("dictionary, norm, entries", [("glu", "rms", 5), ("mlp", "layer", 5), ("rff", "rms", 5),
                                                       ("glu", "layer", 0)])
def test_residual_by_hand(dictionary, norm, entries):
    module, h = filled(Residual(6, entries, dictionary, "relu", norm)), 2 + randn(2, 3, 6, seed=1)
    part = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    x = h.double().numpy()
    if norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True))
    out = h.double().numpy() + x @ part["linear.weight"].T + part["linear.bias"]
    if entries:
        inner = x @ part["inner.weight"].T + part["inner.bias"]
        f = {"rff": np.cos, "mlp": lambda z: np.maximum(z, 0),
             "glu": lambda z: np.maximum(z[..., :entries], 0) * z[..., entries:]}[dictionary](inner)
        assert f.shape == (2, 3, entries)
        out = out + f @ part["outer.weight"].T
    np.testing.assert_allclose(module(h).detach().numpy(), out, atol=1e-5)
    assert set(part) == {"linear.weight", "linear.bias"} | \
        ({"inner.weight", "inner.bias", "outer.weight"} if entries else set())


def test_normalised_is_the_norm_without_its_gain():
    h = 3 + randn(4, 8)
    torch.testing.assert_close(normalised(h, "layer"), nn.functional.layer_norm(h, (8,), eps=0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalised(h, "rms"), nn.functional.rms_norm(h, (8,), eps=0.0), atol=1e-5, rtol=1e-5)


def test_rms_scale_keeps_zero_and_forgets_length():
    h = torch.cat([torch.zeros(1, 8), randn(3, 8)])
    scaled = rms_scale(h)
    assert torch.equal(scaled[0], torch.zeros(8))
    torch.testing.assert_close(scaled[1:].square().mean(-1), torch.ones(3))
    torch.testing.assert_close(rms_scale(1e3 * h), scaled)


@pytest.mark.parametrize("module", [RffMlp(6, 5, 4, "gelu", "raw", 3.0), Affine(6, 3.0),
                                    Residual(6, 5, "glu", "silu", "rms", 3.0)], ids=["rff_mlp", "affine", "residual"])
def test_tokens_above_the_limit_pass_unchanged_and_do_not_touch_others(module):
    module = filled(module)
    h = randn(2, 5, 6, seed=2)
    h = h / h.norm(dim=-1, keepdim=True)
    clean = module(h)
    h[0, 1] *= 3.001
    out = module(h)
    assert torch.equal(out[0, 1], h[0, 1]) and not torch.equal(clean[0, 1], h[0, 1])
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(out[others], clean[others])


def test_multiply_adds_are_those_of_the_matrices():
    module = RffMlp(6, 5, 4, "gelu", "raw")
    assert module.macs_per_token == sum(p.numel() for p in module.parameters() if p.ndim == 2) == count_macs(module)
    assert Affine(6).macs_per_token == 36
    for dictionary, entries in (("glu", 5), ("mlp", 5), ("rff", 3), ("glu", 0)):
        module = Residual(6, entries, dictionary, "silu", "rms")
        assert module.macs_per_token == sum(p.numel() for p in module.parameters() if p.ndim == 2) == count_macs(module)


@pytest.mark.parametrize("kind, options", [
    ("rff_mlp", {"width": 32, "frequencies": 8, "hidden": 6, "activation": "gelu", "lift_input": "raw"}),
    ("residual", {"width": 32, "entries": 8, "dictionary": "glu", "activation": "silu", "norm": "rms"}),
])
def test_gradients_reach_every_weight_of_a_stand_in(kind, options):
    model = pico.model("llama")
    attach(model, [{"layer": 4, "after": False, "kind": kind, "options": options}])
    stand_in = filled(decoder_layers(model)[4].stand_in[0])
    model(IDS_ST, labels=IDS_ST).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in stand_in.parameters())


@pytest.fixture
def embedding():
    made, generator = RareEmbedding(VOCABULARY, WIDTH, FREQUENT, RANK, scale=2.5), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made.place.copy_(torch.randperm(VOCABULARY, generator=generator))
    return made.requires_grad_(False)


def test_a_lookup_gives_the_scaled_row_and_the_head_multiplies_by_the_rows(embedding):
    ids, h = torch.tensor([[0, 7, 19], [5, 5, 2]]), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = embedding.rows()
    assert torch.allclose(embedding(ids), 2.5 * rows[ids], atol=1e-6)
    for states in (h[0], h, h.view(2, 2, WIDTH), h[:, None]):
        assert torch.allclose(RareHead(embedding)(states), states @ rows.T, atol=1e-5)
    # the loss of transformers views the logits of all sequences as one list of tokens
    assert RareHead(embedding)(h.view(2, 2, WIDTH)).view(-1, VOCABULARY).shape == (4, VOCABULARY)
    frequent = (embedding.place < FREQUENT).nonzero()[:, 0]
    assert torch.equal(rows[frequent], embedding.frequent[embedding.place[frequent].long()])


def test_the_head_adds_no_parameters_and_its_multiply_adds_count(embedding):
    head = RareHead(embedding)
    stored = FREQUENT * WIDTH + (VOCABULARY - FREQUENT) * RANK + RANK * WIDTH
    assert count_params(embedding) == stored + WIDTH and count_params(head) == 0
    assert count_macs(head) == stored < VOCABULARY * WIDTH
