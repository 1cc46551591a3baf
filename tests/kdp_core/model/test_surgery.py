"""Changes of a model in place: stand-ins at their layers, layers with fewer heads and channels, rows of
rare tokens."""
import copy

import pytest
import torch
from torch import nn

from kdp_core.model.families import FAMILIES, decoder_layers, matrix, output_head
from kdp_core.model.folded import FOLDED
from kdp_core.model.stand_ins import RareHead
from kdp_core.model.surgery import attach, head_is_tied, reduce_rare
from tests import pico
from tests.kdp_core.model.random_weights import IDS_ST, filled, logits


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


def with_widths(base, widths):
    config_class, model_class = FOLDED[base.config.model_type]
    given = {key: value for key, value in base.config.to_dict().items() if key != "model_type"}
    return model_class(config_class(**given, widths=widths)).eval()


def whole(family, channels=64):
    return {"heads": 4, "kv_heads": 2 if grouped(family) else 4, "intermediate": channels}


def grouped(family):
    """Whether query heads share key-value heads."""
    return family not in ("opt", "gpt_neox", "gpt2")


WITH_WIDTHS = [name for name, record in FAMILIES.items() if record.head_norms != "all"]
"""Families of which heads can be removed."""


@pytest.mark.parametrize("family", WITH_WIDTHS)
def test_all_heads_and_channels_are_the_base_class(family):
    base = pico.model(family, layers=3)
    folded = with_widths(base, [whole(family)] * 3)
    folded.load_state_dict(base.state_dict())
    assert torch.equal(logits(folded), logits(base))


@pytest.mark.parametrize("family", WITH_WIDTHS)
def test_layers_of_different_widths_have_their_shapes_and_generate_alike_with_cache(family):
    """Text longer than the sliding windows; the cache holds another number of heads in each layer."""
    narrow = {"heads": 2, "kv_heads": 1 if grouped(family) else 2, "intermediate": 5}
    model = pico.lively(with_widths(pico.model(family, layers=4), [whole(family), narrow, whole(family, 7), narrow]))
    for layer, (heads, kv_heads, channels) in zip(decoder_layers(model), [
            (4, whole(family)["kv_heads"], 64), (2, narrow["kv_heads"], 5), (4, whole(family)["kv_heads"], 7),
            (2, narrow["kv_heads"], 5)], strict=True):
        record = FAMILIES[family]
        parts = {name: [list(matrix(layer.get_submodule(path)).shape) for path in (*part.readers, part.writer)]
                 for name, part in record.parts.items()}
        rows, inner = [8 * heads, 8 * kv_heads, 8 * kv_heads], [channels] * (2 if record.gated else 1)
        if family in ("phi3", "gpt_neox", "gpt2"):
            rows, inner = [sum(rows)], [sum(inner)]
        assert parts["attention"] == [*([row, 32] for row in rows), [32, 8 * heads]]
        assert parts["mlp"] == [*([row, 32] for row in inner), [32, channels]]
    runs = [model.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=8, min_new_tokens=8,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_a_model_with_all_rows_in_place_computes_the_same(family):
    model = pico.model(family, layers=2)
    expected, dense = logits(model), model.get_input_embeddings()
    vocabulary = dense.num_embeddings
    assert head_is_tied(model)
    reduce_rare(model, vocabulary - 5, 4)
    new, (*_, last) = model.get_input_embeddings(), dense.weight
    new.frequent.data, new.mean.data = dense.weight[:-5].detach().clone(), last.detach().clone()
    new.place.copy_(torch.arange(vocabulary))
    found = logits(model)
    # the five rare rows are all the mean, the last row
    assert torch.allclose(found[..., :-5], expected[..., :-5], atol=1e-5)
    assert torch.allclose(found[..., -1], expected[..., -1], atol=1e-5)
    assert head_is_tied(model) and isinstance(output_head(model), RareHead)


def test_a_copy_reads_its_own_embedding():
    config_class, model_class = FOLDED["llama"]
    given = {key: value for key, value in pico.model("llama", layers=2).config.to_dict().items() if key != "model_type"}
    model = model_class(config_class(**given | {"tie_word_embeddings": False,
                                                "rare_tokens": {"frequent": 100, "rank": 4}})).eval()
    copied = copy.deepcopy(model)
    assert output_head(copied).embedding is copied.get_input_embeddings()
    for parameter in model.get_input_embeddings().parameters():
        parameter.data.fill_(1.0)
    assert not torch.equal(logits(copied), logits(model))
