"""Stand-ins and folded classes: what a module computes, where it is attached, what the classes inherit."""
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kdp_core.model import folded
from kdp_core.model.families import FAMILIES, PREFIX, decoder_layers, family_of
from kdp_core.model.folded import FOLDED
from kdp_core.model.sizes import count_macs
from kdp_core.model.sliced import SlicedNorm, slice_widths
from kdp_core.model.stand_ins import Affine, Residual, RffMlp, normalised, rms_scale
from kdp_core.model.surgery import attach
from tests import pico

IDS_ST = torch.arange(2, 26).view(2, 12)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0):
    """The module with random weights of moderate size."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=100 * seed + index))
    return module


def logits(model):
    with torch.no_grad():
        return model(IDS_ST).logits


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


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_layers_are_found_under_the_prefix_of_the_state_dict(family):
    model = pico.model(family)
    layers = decoder_layers(model)
    assert len(layers) == 10
    name, tensor = next(iter(layers[3].state_dict().items()))
    assert torch.equal(model.state_dict()[f"{family_of(family).prefix}3.{name}"], tensor)
    assert family_of(PREFIX + family).prefix == family_of(family).prefix


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_attached_maps_act_before_and_after_their_layers_in_order(family):
    """Beside a model whose layers are wrapped by hand."""
    model, plain = pico.model(family), pico.model(family)
    entries = [{"layer": 2, "after": False}, {"layer": 2, "after": False}, {"layer": 9, "after": True}]
    attach(model, [entry | {"kind": "affine", "options": {"width": 32}} for entry in entries])
    before, after = decoder_layers(model)[2].stand_in, decoder_layers(model)[9].stand_in_after
    for seed, module in enumerate([*before, *after]):
        filled(module, seed)

    class Wrapped(nn.Module):
        def __init__(self, layer, first=(), last=()):
            super().__init__()
            self.layer, self.first, self.last = layer, first, last
            self.attention_type = getattr(layer, "attention_type", None)

        def forward(self, h, *args, **kwargs):
            for w_DD, b_D in self.first:
                h = h @ w_DD.T + b_D
            h = self.layer(h, *args, **kwargs)
            for w_DD, b_D in self.last:
                h = h @ w_DD.T + b_D
            return h

    layers = decoder_layers(plain)
    layers[2] = Wrapped(layers[2], first=[(m.map.weight, m.map.bias) for m in before])
    layers[9] = Wrapped(layers[9], last=[(m.map.weight, m.map.bias) for m in after])
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    assert len(before) == 2 and (logits(model) - logits(pico.model(family))).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_folded_classes_are_registered_subclasses(family):
    config_class, model_class = FOLDED[family]
    base_config, base_model = (getattr(transformers, name) for name in (FAMILIES[family].config_class,
                                                                          FAMILIES[family].model_class))
    assert issubclass(config_class, base_config) and issubclass(model_class, base_model)
    assert config_class.model_type == f"kdp_{family}" and model_class.config_class is config_class
    assert isinstance(AutoConfig.for_model(config_class.model_type), config_class)
    assert AutoModelForCausalLM._model_mapping[config_class] is model_class
    assert getattr(folded, model_class.__name__) is model_class
    assert config_class().stand_ins == [] and config_class().widths == []


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_folded_class_without_stand_ins_is_the_base_class(family):
    base = pico.model(family)
    config_class, model_class = FOLDED[family]
    folded = model_class(config_class(**{key: value for key, value in base.config.to_dict().items()
                                         if key != "model_type"})).eval()
    folded.load_state_dict(base.state_dict())
    assert torch.equal(logits(folded), logits(base))


def with_widths(base, widths):
    config_class, model_class = FOLDED[base.config.model_type]
    given = {key: value for key, value in base.config.to_dict().items() if key != "model_type"}
    return model_class(config_class(**given, widths=widths)).eval()


def whole(family, channels=64):
    return {"heads": 4, "kv_heads": 4 if family == "opt" else 2, "intermediate": channels}


@pytest.mark.parametrize("family", pico.EVERY)
def test_all_heads_and_channels_are_the_base_class(family):
    base = pico.model(family, layers=3)
    folded = with_widths(base, [whole(family)] * 3)
    folded.load_state_dict(base.state_dict())
    assert torch.equal(logits(folded), logits(base))


@pytest.mark.parametrize("family", pico.EVERY)
def test_layers_of_different_widths_have_their_shapes_and_generate_alike_with_cache(family):
    """Text longer than the sliding windows; the cache holds another number of heads in each layer."""
    narrow = {"heads": 2, "kv_heads": 2 if family == "opt" else 1, "intermediate": 5}
    model = pico.lively(with_widths(pico.model(family, layers=4), [whole(family), narrow, whole(family, 7), narrow]))
    for layer, (heads, kv_heads, channels) in zip(decoder_layers(model), [
            (4, whole(family)["kv_heads"], 64), (2, narrow["kv_heads"], 5), (4, whole(family)["kv_heads"], 7),
            (2, narrow["kv_heads"], 5)], strict=True):
        parts = {name: [list(layer.get_submodule(path).weight.shape) for path in (*part.readers, part.writer)]
                 for name, part in FAMILIES[family].parts.items()}
        assert parts["attention"] == [[8 * heads, 32], [8 * kv_heads, 32], [8 * kv_heads, 32], [32, 8 * heads]]
        assert parts["mlp"] == [[channels, 32]] * (1 if family == "opt" else 2) + [[32, channels]]
    runs = [model.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=8, min_new_tokens=8,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)


SLICED = {"attention": [12, 16], "mlp": [20, 24], "final": 28}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "mistral"])
def test_sliced_model_has_the_widths_of_its_configuration(family):
    model = pico.lively(pico.model(family, layers=2))
    norm = getattr(decoder_layers(model)[1], "input_layernorm", None) or decoder_layers(model)[1].self_attn_layer_norm
    eps, kind = getattr(norm, "variance_epsilon", 1e-5), type(decoder_layers(model)[1])
    slice_widths(model, SLICED)
    filled(model)
    with torch.no_grad():
        states = model(IDS_ST, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [12, 16, 28] and model.lm_head.in_features == 28
    layer = decoder_layers(model)[1]
    assert isinstance(layer, kind) and (layer.mlp_shortcut.in_features, layer.mlp_shortcut.out_features) == (24, 28)
    norms = [module for module in model.modules() if isinstance(module, SlicedNorm)]
    assert len(norms) == 5 and all((norm.width, norm.eps) == (32, eps) for norm in norms)
    # of the norms that were there only those of single heads are left
    left = {name.split(".")[-2] for name, _ in model.named_parameters() if "norm" in name}
    assert left == ({"q_norm", "k_norm"} if family == "qwen3" else set())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sliced_layer_by_hand(family):
    """What the attention adds is taken from its hook, all else is written out."""
    model, found = pico.model(family, layers=2), {}
    slice_widths(model, SLICED)
    layer = filled(decoder_layers(filled(model))[1], 1)
    layer.register_forward_pre_hook(lambda _, args: found.update(h=args[0]))
    layer.self_attn.register_forward_hook(
        lambda _, args, kwargs, output: found.update(read=kwargs["hidden_states"], added=output[0]), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output: found.update(out=output))
    logits(model)
    eps, h = 1e-5 if family == "opt" else model.config.rms_norm_eps, found["h"]
    torch.testing.assert_close(found["read"], h / torch.sqrt((h ** 2).sum(-1, keepdim=True) / 32 + eps))
    y = h @ layer.attention_shortcut.weight.T + found["added"]
    x = y / torch.sqrt((y ** 2).sum(-1, keepdim=True) / 32 + eps)
    mlp = layer.fc2(torch.relu(layer.fc1(x))) if family == "opt" else \
        layer.mlp.down_proj(nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    torch.testing.assert_close(found["out"], y @ layer.mlp_shortcut.weight.T + mlp, atol=1e-5, rtol=1e-4)


def test_sliced_norm_divides_by_the_width_before_slicing():
    h = randn(3, 5, seed=2)
    expected = h / torch.sqrt((h ** 2).sum(-1, keepdim=True) / 8 + 1e-3)
    torch.testing.assert_close(SlicedNorm(8, 1e-3)(h), expected)
    assert SlicedNorm(8, 1e-3)(h.half()).dtype == torch.float16


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
