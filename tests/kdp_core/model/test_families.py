"""Records of families: what they say is so in a model of each family."""
import pytest
import torch
from transformers import GPTJConfig

from kdp_core.model.families import (
    FAMILIES,
    PREFIX,
    FamilyError,
    activation_of,
    as_weight,
    base_of,
    decoder_layers,
    entrance,
    family_of,
    final_norm,
    first_token,
    is_known,
    is_linear,
    matrix,
    norm_of,
    output_head,
    trunk,
    type_of,
)
from tests import pico


@pytest.mark.parametrize("family", pico.EVERY)
def test_layers_are_found_under_the_prefix_of_the_state_dict(family):
    model = pico.model(family)
    layers = decoder_layers(model)
    assert len(layers) == 10
    name, tensor = next(iter(layers[3].state_dict().items()))
    assert torch.equal(model.state_dict()[f"{family_of(family).prefix}3.{name}"], tensor)
    assert family_of(PREFIX + family).prefix == family_of(family).prefix


def test_every_family_has_a_pico_model():
    assert set(pico.CONFIGS) == set(FAMILIES) and all(family.name == name for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", pico.EVERY)
@torch.no_grad()
def test_a_model_runs_through_the_places_of_its_record(family):
    """Embedding, layers, final norm and head of the record, beside the model's own forward pass."""
    model, found = pico.lively(pico.model(family, layers=3)), {}
    ids_ST = torch.arange(2, 14).view(1, 12)
    places = {"first": decoder_layers(model)[0], "norm": final_norm(model), "head": output_head(model)}
    for name, module in places.items():
        module.register_forward_hook(lambda _, args, output, name=name: found.update({name: (args[0], output)}))
    base_of(model)(ids_ST)
    assert set(found) == {"first", "norm"}
    logits = model(ids_ST).logits
    torch.testing.assert_close(found["head"][0], found["norm"][1])
    if not FAMILIES[family].soft_cap:
        assert torch.equal(found["head"][1], logits)
    embeddings = [getattr(trunk(model), name) for name in FAMILIES[family].embeddings]
    assert embeddings[0] is model.get_input_embeddings()
    positions = torch.arange(12)[None] + FAMILIES[family].extra_positions if embeddings[1:] else None
    state = embeddings[0](ids_ST) + sum(torch.nn.functional.embedding(positions, one.weight) for one in embeddings[1:])
    torch.testing.assert_close(found["first"][0], state)


@pytest.mark.parametrize("family", pico.EVERY)
@torch.no_grad()
def test_parts_add_what_their_modules_give(family):
    """x + attention + MLP is the layer's output, with the norms of the record between; no part reads anything else."""
    model, record, found = pico.lively(pico.model(family, layers=2)), FAMILIES[family], {}
    layer = decoder_layers(model)[1]

    def watch(path, name):
        layer.get_submodule(path).register_forward_hook(
            lambda _, args, output: found.update({name: output[0] if isinstance(output, tuple) else output}))

    layer.register_forward_hook(lambda _, args, output: found.update(
        x=args[0], out=output[0] if isinstance(output, tuple) else output))
    for name, part in record.parts.items():
        watch(part.norm_after or part.module, name)
        reader = layer.get_submodule(next(iter(part.readers)))
        # without a norm a part reads the state itself, so what comes in is what is read
        entrance(layer, record, name).register_forward_hook(
            lambda _, args, kwargs, output, name=name, own=part: found.update(
                {f"{name} reads": output if own.norm else args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True)
        reader.register_forward_hook(lambda _, args, output, name=name: found.update({f"{name} read": args[0]}))
    model(torch.arange(2, 14).view(1, 12))
    shape = found["x"].shape
    torch.testing.assert_close(found["out"], found["x"] + found["attention"].view(shape) + found["mlp"].view(shape))
    if not record.parts["mlp"].norm:
        torch.testing.assert_close(found["mlp reads"], found["x"] + found["attention"])
    states = {"x": found["x"], "y": found["x"] + found["attention"].view(shape)}
    norm = norm_of(layer, record, "mlp")
    if norm is not None:
        torch.testing.assert_close(found["mlp reads"].view(shape), norm(states["x" if record.parallel else "y"]))
    for name in record.parts:
        assert torch.equal(found[f"{name} reads"].view(shape), found[f"{name} read"].view(shape))


@pytest.mark.parametrize("family", pico.EVERY)
@torch.no_grad()
def test_norms_scale_as_the_record_says(family):
    model, record = pico.lively(pico.model(family, layers=2)), FAMILIES[family]
    norm, h = final_norm(model), 2 + 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x = h - h.mean(dim=-1, keepdim=True) if record.mean_free else h
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
    bias = getattr(norm, "bias", None)
    expected = x * (norm.weight + record.gain_offset) + (0 if bias is None else bias)
    torch.testing.assert_close(norm(h), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", pico.EVERY)
def test_names_of_entries_are_those_of_the_configuration(family):
    model, record = pico.model(family, layers=2), FAMILIES[family]
    assert record.entry(model.config, "intermediate_size") == 64 and record.entry(model.config, "hidden_size") == 32
    assert activation_of(model) == {"opt": "relu", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh",
                                    "gpt_neox": "gelu", "gpt2": "gelu_new"}.get(family, "silu")
    assert record.norms_first(model.config) and record.one_width(model.config)
    names = dict(model.named_modules())
    heads = {name for name in names if name.endswith(("q_norm", "k_norm"))}
    assert bool(heads) == bool(record.head_norms)
    widths = {names[name].weight.shape[0] for name in heads}
    assert widths == {"": set(), "each": {8}, "all": {32, 16}}[record.head_norms]
    readers = record.parts["mlp"].readers
    assert sum(map(len, readers.values())) == (2 if record.gated else 1)
    linear = names[f"{record.prefix}0.{next(iter(readers))}"]
    assert is_linear(linear) and record.transposed == (linear.weight.shape[0] == 32)
    assert matrix(linear).shape[1] == 32 and torch.equal(as_weight(linear, matrix(linear)), linear.weight)


def test_opt_350m_has_norms_after_the_sum_and_two_widths():
    config = type(pico.model("opt", layers=2).config)
    assert not family_of("opt").norms_first(config(do_layer_norm_before=False))
    assert not family_of("opt").one_width(config(word_embed_proj_dim=16))
    assert not family_of("opt").one_width(config(_remove_final_layer_norm=True))


def test_the_family_of_models_configurations_mappings_and_names():
    model = pico.model("opt", layers=2)
    for given in (model, model.config, model.config.to_dict(), "opt", PREFIX + "opt"):
        assert family_of(given) is FAMILIES["opt"]
    assert type_of(model) == "opt" and is_known(model) and not is_known(PREFIX + "opt")
    assert not is_known(GPTJConfig())
    with pytest.raises(FamilyError, match="family 'gptj' is not supported; choose a model of llama, mistral"):
        family_of(GPTJConfig())


def test_gemma_alone_begins_with_a_token_of_its_own():
    assert {name: first_token(pico.model(name, layers=1).config) for name in pico.EVERY} == \
        {name: 0 if name.startswith("gemma") else None for name in pico.EVERY}
