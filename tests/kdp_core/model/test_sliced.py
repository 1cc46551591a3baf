"""Sliced states: widths as configured, and one layer computed by hand."""
import pytest
import torch
from torch import nn

from kdp_core.model.families import decoder_layers
from kdp_core.model.sliced import SlicedNorm, slice_widths
from tests import pico
from tests.kdp_core.model.random_weights import IDS_ST, filled, logits, randn

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
