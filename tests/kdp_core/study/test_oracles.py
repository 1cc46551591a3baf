"""Published choices: internally consistent, and remade by the methods that they name."""
import pytest
import torch

from kdp_core.methods import check_options
from kdp_core.model import checkpoints
from kdp_core.states import hidden
from kdp_core.states.similarity import similarity
from kdp_core.study.oracles import ORACLES, Oracle, agreement, choose
from tests import pico
from tests.kdp_core import stored

LAYERS_OF = {"LLaMA-2-7B": 32, "LLaMA-3-8B": 32, "Mistral-7B": 32, "Mistral-7B-Instruct-v0.2": 32, "LLaMA-2-13B": 40}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What a choice is made from, and the angular distances it may rest on."""
    root = tmp_path_factory.mktemp("oracles")
    folder = pico.save(root / "dense")
    model = checkpoints.load_model(folder)
    hidden.extract(model, stored.tokens(), root / "hidden.zarr")
    states = hidden.read(root / "hidden.zarr")
    return folder, states, stored.tokens(), similarity(states, treatment="raw"), checkpoints.facts(
        model, source="pico", sha256="")


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: f"{oracle.method}-{oracle.model}-{len(oracle.layers)}")
def test_a_published_choice_can_be_one(oracle):
    assert len(set(oracle.layers)) == len(oracle.layers)
    assert set(oracle.layers) <= set(range(LAYERS_OF[oracle.model]))
    assert oracle.ordered or oracle.layers == sorted(oracle.layers)
    check_options(oracle.method, oracle.options)


def test_agreement_tells_sets_from_orders():
    oracle = Oracle("a", "shortgpt", "b", [5, 3], True, {})
    assert agreement(oracle, [5, 3, 4, 1])[:2] == (1.0, True)
    assert agreement(oracle, [3, 5, 4, 1]) == (1.0, False, [3, 5])
    assert agreement(oracle, [3, 4, 5]) == (0.5, False, [3, 4])
    assert agreement(oracle._replace(ordered=False), [5, 3]).same_order is None
    paper, code = (oracle for oracle in ORACLES if oracle.method == "shortgpt")
    assert agreement(code, paper.layers)[:2] == (1.0, False), "the code's set is the paper's"


@pytest.mark.parametrize("method", sorted({oracle.method for oracle in ORACLES}))
def test_our_methods_choose_as_many_layers(given, method):
    oracle = next(oracle for oracle in ORACLES if oracle.method == method)
    chosen = choose(oracle._replace(layers=[5, 6, 7]), *given)
    assert len(set(chosen)) == len(chosen) >= 3 and set(chosen) <= set(range(10))


def test_choices_are_those_of_the_methods_by_hand(given):
    """Angular: the run of three over which the last token turns least. Attentions: by the cosine around each."""
    folder, states, _, alike, _ = given
    run = choose(Oracle("a", "angular", "b", [1, 2, 3], False, {"block": {"keep_first": 1}}), *given)
    angles = [alike.angular_last_LL[start, start + 3].item() for start in range(1, 8)]
    assert run == [1 + angles.index(min(angles)) + step for step in range(3)]
    model, cosines = checkpoints.load_model(folder), []
    for layer, block in enumerate(model.model.layers):
        x_STD = states.state(layer)
        with torch.no_grad():
            positions = torch.arange(x_STD.shape[1])[None]
            turned = model.model.rotary_emb(x_STD, positions)
            added_STD, _ = block.self_attn(block.input_layernorm(x_STD), position_embeddings=turned,
                                           attention_mask=None)
        cosines.append(torch.cosine_similarity(x_STD, x_STD + added_STD, dim=-1).mean().item())
    attentions = choose(Oracle("a", "attn_drop", "b", [1, 2, 3], True, {}), *given)
    assert attentions[:3] == sorted(range(10), key=lambda layer: -cosines[layer])[:3]
