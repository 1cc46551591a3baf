"""Single layers on stored states: beside the models' own forward passes, and beside folded checkpoints."""
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import Passes, built, path_of
from kdp_core.model.stand_ins import MODULES
from kdp_core.prune.fold import fold
from kdp_core.states.hidden import boundary_states
from tests import pico

LAYERS = 7
"""Gemma's sixth layer attends to everything, the others to a window."""
IDS_ST = torch.randint(2, 384, (3, 20), generator=torch.Generator().manual_seed(5))


def module(block, seed, dictionary="glu", width=32):
    """A stand-in with small random weights."""
    options = {"width": width, "entries": 4, "dictionary": dictionary, "activation": "silu", "norm": "rms",
               "bypass_above": 1e3}
    generator = torch.Generator().manual_seed(seed)
    shapes = MODULES["residual"](**options).state_dict()
    return Module(block, "residual", options, {name: 0.2 * torch.randn(tensor.shape, generator=generator)
                                               for name, tensor in shapes.items()})


@pytest.fixture(scope="module", params=pico.EVERY)
def whole(request):
    """A model, its parts, and its own states."""
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    return model, Passes(model, IDS_ST.shape[1]), boundary_states(model, IDS_ST, list(range(LAYERS + 1)))


@torch.no_grad()
def test_all_layers_and_the_head_are_the_model(whole):
    model, passes, states = whole
    last = passes.run(states[0], range(LAYERS))
    torch.testing.assert_close(last, states[-1], atol=1e-4, rtol=1e-4)
    expected = model(IDS_ST).logits
    torch.testing.assert_close(passes.head(passes.to_head(last)), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
def test_any_layer_starts_from_its_stored_state(whole):
    _, passes, states = whole
    for layer in range(LAYERS):
        torch.testing.assert_close(passes.layer(layer, states[layer]), states[layer + 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(passes.run(states[3], range(3, 6)), states[6], atol=1e-4, rtol=1e-4)


def test_batches_are_the_whole_and_nothing_is_left_on_the_model(whole):
    model, passes, states = whole
    for size in (1, 2, 3):
        found = passes.run_batches(states[2], [2, 3], size)
        torch.testing.assert_close(found, states[4], atol=1e-4, rtol=1e-4)
        assert not found.requires_grad
    assert all(not layer._forward_pre_hooks and not layer._forward_hooks for layer in decoder_layers(model))


def test_the_arguments_are_those_of_a_whole_pass_of_which_one_layer_runs(whole):
    model, passes, _ = whole
    layers, ran = decoder_layers(model), []
    hooks = [layer.register_forward_hook(lambda *_, k=k: ran.append(k))
             for k, layer in enumerate(next(layer.children()) for layer in layers)]
    layers[2].forward = given = layers[2].forward
    again = Passes(model, IDS_ST.shape[1])
    for hook in hooks:
        hook.remove()
    assert set(ran) == {0} and len(again.context) == len(passes.context) == LAYERS
    assert vars(layers[2]).pop("forward") is given and not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_a_path_with_stand_ins_is_the_folded_model(family, tmp_path):
    """Neighbours that share a place, and one after the last layer."""
    model = pico.lively(pico.model(family, layers=LAYERS))
    model.save_pretrained(tmp_path / "dense")
    modules = [module((1, 2), 0), module((2, 4), 1, "rff"), module((6, 7), 2, "mlp")]
    plan = Plan("made_up", [(layer, "whole") for layer in (1, 2, 3, 6)], modules, {})
    fold(plan, tmp_path / "dense", tmp_path / "out")
    passes = Passes(model, IDS_ST.shape[1])
    path = path_of(modules, [built(one) for one in modules], 0, LAYERS)
    assert [step for step in path if isinstance(step, int)] == [0, 4, 5] and len(path) == 6
    found = passes.head(passes.to_head(passes.run(boundary_states(model, IDS_ST, [0])[0], path)))
    torch.testing.assert_close(found, checkpoints.load_model(tmp_path / "out")(IDS_ST).logits, atol=1e-4, rtol=1e-4)
    assert (found - model(IDS_ST).logits).abs().max() > 0.1


def test_paths_start_where_they_are_asked_to():
    modules = [module((2, 3), 0), module((5, 7), 1)]
    assert path_of(modules, ["a", "b"], 2, 9) == ["a", 3, 4, "b", 7, 8]
    assert path_of(modules, ["a", "b"], 0, 7) == [0, 1, "a", 3, 4, "b"]
    assert path_of([], [], 4, 6) == [4, 5]


@torch.no_grad()
def test_stand_ins_are_float32_in_a_model_of_less_precision():
    model = pico.model("llama", layers=2).to(torch.bfloat16)
    passes, seen = Passes(model, 4), []

    def stand_in(h):
        seen.append(h.dtype)
        return h

    assert passes.run(torch.ones(1, 4, 32, dtype=torch.bfloat16), [stand_in, 1]).dtype == torch.bfloat16
    assert seen == [torch.float32]


@torch.no_grad()
def test_the_projection_before_the_head_of_some_opt_models():
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64)).eval()
    passes = Passes(model, IDS_ST.shape[1])
    last = passes.run(boundary_states(model, IDS_ST, [0])[0], [0, 1])
    torch.testing.assert_close(passes.head(passes.to_head(last)), model(IDS_ST).logits, atol=1e-4, rtol=1e-4)


def test_a_built_stand_in_is_a_copy_and_draws_nothing():
    record, before = module((0, 1), 3), torch.random.get_rng_state()
    made = built(record)
    assert torch.equal(torch.random.get_rng_state(), before) and not made.training
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, record.tensors[name])
    with torch.no_grad():
        made.linear.weight += 1
    assert not torch.equal(made.linear.weight, record.tensors["linear.weight"])
    with pytest.raises(RuntimeError, match=r"inner\.weight"):
        built(record._replace(tensors={name: tensor for name, tensor in record.tensors.items()
                                       if name != "inner.weight"}))
