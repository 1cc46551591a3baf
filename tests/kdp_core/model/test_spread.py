"""Models spread over several places: with layers on disk all states, scores and comparisons keep their bits.

No machine with several GPUs is needed: accelerate's hooks are the same between main memory and disk.
"""
import tempfile

import pytest
import torch

from kdp_core.methods import shortgpt
from kdp_core.model import checkpoints, distil
from kdp_core.model.checkpoints import ModelError
from kdp_core.model.families import decoder_layers
from kdp_core.model.sizes import count_params
from kdp_core.prune import fold
from kdp_core.score import diagnose, efficiency, evaluate, tasks
from kdp_core.states import hidden
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.prune.test_fold import affine, plan, rff_mlp

IDS_ST = stored.tokens(6, 12).ids_ST


@pytest.fixture(scope="module", params=pico.EVERY)
def any_folder(request, tmp_path_factory):
    """A pico checkpoint of every family in turn."""
    return pico.save(tmp_path_factory.mktemp(request.param) / "model", request.param)


def some_on_disk(folder, layers_held=4) -> str:
    """A device with room for the embedding, the head, so many layers, and one more that comes from disk."""
    model = checkpoints.load_model(folder)
    outside = model.get_input_embeddings().weight.numel() * (1 if model.config.tie_word_embeddings else 2)
    layers = max(map(count_params, decoder_layers(model)))
    return f"balanced:cpu={4 * (outside + (layers_held + 1) * layers) // 1024}KiB"


def held(model) -> dict[str, int]:
    """Layers in main memory and on disk."""
    on_disk = [any(parameter.is_meta for parameter in layer.parameters()) for layer in decoder_layers(model)]
    return {"cpu": on_disk.count(False), "disk": on_disk.count(True)}


@torch.inference_mode()
def test_states_and_outputs_keep_their_bits(any_folder):
    plain = checkpoints.load_model(any_folder)
    spread = checkpoints.load_model(any_folder, device=some_on_disk(any_folder))
    assert min(held(spread).values()) >= 2 and any(place.startswith("disk") for place in checkpoints.places(spread))
    for layers in ([0, 3, 10], [9]):
        # twice: what the first pass fetched from disk is put back
        for _ in range(2):
            for one, other in zip(hidden.boundary_states(plain, IDS_ST, layers),
                                  hidden.boundary_states(spread, IDS_ST, layers), strict=True):
                assert torch.equal(one, other)
    assert min(held(spread).values()) >= 2
    assert torch.equal(plain(IDS_ST).logits, spread(IDS_ST).logits)
    state = hidden.boundary_states(plain, IDS_ST, [10])[0]
    for model in (plain, spread):
        logits = distil.head_of(model)(distil.to_head(model, state))
        torch.testing.assert_close(logits, plain(IDS_ST).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [affine, rff_mlp])
@torch.inference_mode()
def test_a_folded_model_is_spread_with_its_stand_ins(tmp_path, make):
    dense = pico.save(tmp_path / "dense", "llama")
    # stand-ins before the first and the last of the layers left, and after the last
    fold.fold(plan(make=make, blocks=[(0, 2), (5, 7), (8, 10)]), dense, tmp_path / "pruned")
    plain = checkpoints.load_model(tmp_path / "pruned")
    spread = checkpoints.load_model(tmp_path / "pruned", device=some_on_disk(tmp_path / "pruned", 2))
    assert held(spread) == {"cpu": 2, "disk": 2}
    assert torch.equal(plain(IDS_ST).logits, spread(IDS_ST).logits)


def test_evaluation_diagnosis_and_costs_of_a_spread_model(llama_folder, tmp_path):
    device, pruned = some_on_disk(llama_folder), tmp_path / "pruned"
    fold.fold(plan([4, 5]), llama_folder, pruned)
    tasks.write_tasks(pico.documents(8, seed=3, words=90), tmp_path / "tasks", window=16, lastword_items=4,
                      continuation_items=4)
    scores = [evaluate.evaluate(llama_folder, tasks=["heldout"], task_folders=[tmp_path / "tasks"], device=where).scores
              for where in ("cpu", device)]
    assert scores[0] == scores[1] and scores[0]
    one, other = (diagnose.diagnose(llama_folder, pruned, IDS_ST, dropped=[4, 5], windows=6, device=where)
                  for where in ("cpu", device))
    assert one == other
    costs = efficiency.measure(llama_folder, pruned, tokens=8, decode_steps=1, repeats=1, device=device)
    assert costs.params == count_params(checkpoints.load_model(pruned))
    assert costs.device.startswith("cpu; pruned on cpu (") and ", disk (" in costs.device.split("; dense on ")[1]


def test_block_influence_reads_the_final_norm_of_a_spread_model(llama_folder, tmp_path):
    states = stored.of_pico(tmp_path / "h.zarr")
    facts = checkpoints.facts(checkpoints.load_model(llama_folder), source="pico", sha256="")
    one, other = (shortgpt.block_influence(llama_folder, states, stored.tokens(), facts, k_max=2, device=where,
                                            last_state="final_norm") for where in ("cpu", some_on_disk(llama_folder)))
    assert one.scores == other.scores


@torch.inference_mode()
def test_layers_on_disk_are_read_in_the_precision_asked_for(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(llama_folder.iterdir())
    plain = checkpoints.load_model(llama_folder, dtype="bfloat16")
    spread = checkpoints.load_model(llama_folder, dtype="bfloat16", device="balanced:cpu=80KiB")
    assert held(spread)["disk"] >= 2 and torch.equal(plain(IDS_ST).logits, spread(IDS_ST).logits)
    assert sorted(llama_folder.iterdir()) == before and not list(tmp_path.iterdir()), "it was written somewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_all_of_it_is_in_main_memory(llama_folder):
    model = checkpoints.load_model(llama_folder, device="balanced")
    assert checkpoints.resolve_device("balanced") == torch.device("cpu") and held(model)["disk"] == 0
    assert len(checkpoints.places(model)) == 1


@pytest.mark.parametrize("device, words", [
    ("balanced:cpu=1KiB", "has no room for the embedding; raise the model's max_memory"),
    ("balanced:99=1GiB,cpu=1GiB", "names GPU 99, which is not here"),
    ("balanced:disk=1GiB", "write balanced, or balanced:0=70GiB,cpu=200GiB"),
    ("balanced:cpu", "write balanced, or balanced:0"),
    ("balanced:cpu=much", "cannot load it"),
])
def test_places_that_cannot_hold_a_model_are_refused(llama_folder, device, words):
    with pytest.raises(ModelError, match=words):
        checkpoints.load_model(llama_folder, device=device)
