"""Diagnosis: states and outputs against plain NumPy on transformers' own outputs, on pico models of every family."""
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints, distil
from kdp_core.prune import fold
from kdp_core.score import diagnose
from kdp_core.states.block import relative_error
from tests import pico

LAYERS, WIDTH, MASSIVE_ID = 10, 32, 7


def ids(windows: int = 6, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids without the one that a test makes massive."""
    return torch.randint(8, 384, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def affine(start: int, stop: int, seed: int) -> Module:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"map.weight": torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=generator),
               "map.bias": 0.1 * torch.randn(WIDTH, generator=generator)}
    return Module((start, stop), "affine", {"width": WIDTH, "bypass_above": None}, tensors)


def pruned(dense, out, dropped, modules=()):
    fold.fold(Plan("test", [(layer, "whole") for layer in dropped], list(modules), {}), dense, out)
    return out


def states_of(folder, ids_ST) -> dict[int, np.ndarray]:
    """Pre-norm states 0 .. L - 1 as transformers itself returns them, flattened over tokens, float64."""
    with torch.no_grad():
        found = checkpoints.load_model(folder)(ids_ST, output_hidden_states=True).hidden_states
    return {k: h.flatten(0, 1).double().numpy() for k, h in enumerate(found[:-1])}


def logits_of(folder, ids_ST) -> np.ndarray:
    with torch.no_grad():
        return checkpoints.load_model(folder)(ids_ST).logits.double().numpy()


def expected_error(other_ND: np.ndarray, h_ND: np.ndarray) -> float:
    return ((other_ND - h_ND) ** 2).sum() / ((h_ND - h_ND.mean(axis=0)) ** 2).sum()


def expected_cosine(other_ND: np.ndarray, h_ND: np.ndarray) -> float:
    return float(np.mean([a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(other_ND, h_ND, strict=True)]))


def test_states_of_a_model_with_layers_removed(pico_folder, tmp_path):
    ids_ST, dropped = ids(), [3, 4, 7]
    out = pruned(pico_folder, tmp_path / "out", dropped)
    got = diagnose.diagnose(pico_folder, out, ids_ST, dropped=dropped, windows=6)
    assert got.states == [0, 1, 2, 5, 6, 8, 9, 10] and got.dropped == dropped and got.masked == [0] * 8
    assert (got.windows, got.tokens, got.predictions) == (6, 72, 66)
    dense, other = states_of(pico_folder, ids_ST), states_of(out, ids_ST)
    for own, state in enumerate(got.states[:-1]):
        assert got.error[own] == pytest.approx(expected_error(other[own], dense[state]), rel=1e-4)
        assert got.cosine[own] == pytest.approx(expected_cosine(other[own], dense[state]), abs=1e-6)
    assert got.error[:3] == [0, 0, 0] and got.cosine[:3] == pytest.approx([1, 1, 1])
    assert min(got.error[3:]) > 0


def test_outputs_against_the_models_own_logits(pico_folder, tmp_path):
    ids_ST = ids()
    out = pruned(pico_folder, tmp_path / "out", [5, 6], [affine(5, 7, 0)])
    got = diagnose.diagnose(pico_folder, out, ids_ST, dropped=[5, 6], windows=6)
    logits, others = logits_of(pico_folder, ids_ST)[:, :-1], logits_of(out, ids_ST)[:, :-1]
    logp, logq = log_softmax(logits, axis=-1), log_softmax(others, axis=-1)
    kl_S = rel_entr(np.exp(logp), np.exp(logq)).sum(-1).mean(-1)
    assert got.kl_nats == pytest.approx(kl_S.mean(), rel=1e-4) and got.kl_nats > 0
    assert got.kl_nats_stderr == pytest.approx(kl_S.std(ddof=1) / math.sqrt(6), rel=1e-3)
    assert got.agreement == pytest.approx((logits.argmax(-1) == others.argmax(-1)).mean())
    after = ids_ST.numpy()[:, 1:, None]
    dense_S, pruned_S = (-np.take_along_axis(table, after, -1).mean((1, 2)) for table in (logp, logq))
    for name, values_S in (("dense", dense_S), ("pruned", pruned_S), ("increase", pruned_S - dense_S)):
        assert getattr(got, f"nll_{name}_nats") == pytest.approx(values_S.mean(), rel=1e-3, abs=1e-5)
        assert getattr(got, f"nll_{name}_nats_stderr") == pytest.approx(values_S.std(ddof=1) / math.sqrt(6), rel=1e-3)


@pytest.mark.parametrize("blocks", [[(3, 6)], [(8, 10)], [(3, 6), (8, 10)], [(0, 2)], [(2, 4), (4, 6)]])
def test_a_boundary_is_read_after_its_stand_in(llama_folder, tmp_path, blocks):
    """Up to the first block both models agree, so what follows it is the stand-in applied to the dense state."""
    modules = [affine(*block, seed) for seed, block in enumerate(blocks)]
    dropped = [layer for start, stop in blocks for layer in range(start, stop)]
    got = diagnose.diagnose(llama_folder, pruned(llama_folder, tmp_path / "out", dropped, modules), ids(),
                            dropped=dropped, windows=6)
    start, stop = blocks[0][0], blocks[1][1] if len(blocks) > 1 and blocks[1][0] == blocks[0][1] else blocks[0][1]
    with_last = diagnose.boundary_states(checkpoints.load_model(llama_folder), ids(), [start, stop])
    h_ND, target_ND = (state.flatten(0, 1).double().numpy() for state in with_last)
    for module in modules:
        if module.block[1] <= stop:
            weight_DD, bias_D = (module.tensors[f"map.{name}"].double().numpy() for name in ("weight", "bias"))
            h_ND = h_ND @ weight_DD.T + bias_D
    place = got.states.index(stop)
    assert got.error[:place] == [0] * place
    assert got.error[place] == pytest.approx(expected_error(h_ND, target_ND), rel=1e-4)
    assert got.cosine[place] == pytest.approx(expected_cosine(h_ND, target_ND), abs=1e-6)


def test_a_model_beside_itself(pico_folder):
    got = diagnose.diagnose(pico_folder, pico_folder, ids(), dropped=[], windows=6)
    assert got.states == list(range(LAYERS + 1)) and got.error == [0] * (LAYERS + 1)
    assert got.cosine == pytest.approx([1] * (LAYERS + 1), abs=1e-9)
    assert (got.kl_nats, got.agreement, got.nll_increase_nats, got.nll_increase_nats_stderr) == (0, 1, 0, 0)


def test_error_of_one_is_the_constant_mean():
    """A model that gives every token the mean state has error 1, whatever the size of the mean."""
    h_BTD = 5 + torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    sums = diagnose.state_sums([h_BTD], [h_BTD.mean((0, 1)).expand_as(h_BTD)], 8.0)
    outputs_4S = torch.zeros(4, 3, dtype=torch.float64)
    assert diagnose._record([4], [], sums, outputs_4S, 3, 8, 8.0).error == pytest.approx([1.0], rel=1e-6)


def test_error_from_sums_over_batches_is_the_relative_error_of_all_tokens():
    h_BTD, noise_BTD = torch.randn(2, 6, 8, 16, generator=torch.Generator().manual_seed(2))
    h_BTD, other_BTD = h_BTD + 3, h_BTD + 3 + 0.2 * noise_BTD
    parts = [diagnose.state_sums([h_BTD[at:at + 2]], [other_BTD[at:at + 2]], 8.0) for at in (0, 2, 4)]
    sums = diagnose.StateSums(*(sum(values) for values in zip(*parts, strict=True)))
    found = diagnose._record([4], [], sums, torch.zeros(4, 6, dtype=torch.float64), 6, 8, 8.0)
    whole = relative_error(other_BTD.flatten(0, 1).double(), h_BTD.flatten(0, 1).double())
    assert found.error == pytest.approx([whole], rel=1e-9)


def test_massive_tokens_are_left_out_and_counted(tmp_path):
    model = pico.model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[MASSIVE_ID] *= 1000
    model.save_pretrained(tmp_path / "dense")
    dropped, ids_ST = [3, 4], ids()
    ids_ST[0, 0] = ids_ST[2, 5] = ids_ST[2, 6] = MASSIVE_ID
    out = pruned(tmp_path / "dense", tmp_path / "out", dropped)
    got = diagnose.diagnose(tmp_path / "dense", out, ids_ST, dropped=dropped, windows=6)
    assert got.masked == [3] * 9 and got.tokens == 72
    counted_N = (ids_ST != MASSIVE_ID).flatten().numpy()
    dense, other = states_of(tmp_path / "dense", ids_ST)[5], states_of(out, ids_ST)[3]
    place = got.states.index(5)
    assert got.error[place] == pytest.approx(expected_error(other[counted_N], dense[counted_N]), rel=1e-4)
    assert got.error[place] > 10 * expected_error(other, dense)  # all tokens counted, the error would all but vanish
    assert got.predictions == 66  # the outputs are judged on all tokens


def test_neither_batch_nor_chunk_changes_the_result(llama_folder, tmp_path, monkeypatch):
    dense = checkpoints.load_model(llama_folder)
    other = checkpoints.load_model(pruned(llama_folder, tmp_path / "out", [5, 6]))
    whole = diagnose.compare(dense, other, ids(), dropped=[5, 6], batch=6)
    monkeypatch.setattr(distil, "CHUNK_NUMBERS", 384 * 5)  # 5 tokens at a time, which does not divide a batch
    parts = diagnose.compare(dense, other, ids(), dropped=[5, 6], batch=4)
    for name, value in whole._asdict().items():
        assert getattr(parts, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_only_the_first_windows_count(llama_folder, tmp_path):
    out = pruned(llama_folder, tmp_path / "out", [5])
    few = diagnose.diagnose(llama_folder, out, ids(), dropped=[5], windows=2)
    assert few == diagnose.diagnose(llama_folder, out, ids()[:2], dropped=[5], windows=2) and few.windows == 2
    one = diagnose.diagnose(llama_folder, out, ids(), dropped=[5], windows=1)
    assert one.kl_nats > 0 and one.kl_nats_stderr is None and one.nll_increase_nats_stderr is None


def gemma() -> torch.nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=2.0, initializer_range=0.5))


def mistral() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2))


@pytest.mark.parametrize("make", [gemma, mistral, *(lambda f=f: pico.model(f) for f in pico.FAMILIES)],
                         ids=["gemma3_text", "mistral", *pico.FAMILIES])
def test_log_probabilities_are_the_models_own(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    with torch.no_grad():
        h_BTD, = diagnose.boundary_states(model, ids(2), [model.config.num_hidden_layers])
        got = diagnose.log_probabilities(model, h_BTD)
        torch.testing.assert_close(got, model(ids(2)).logits.float().log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_diagnosis_to_disk_and_back(llama_folder, tmp_path):
    got = diagnose.diagnose(llama_folder, pruned(llama_folder, tmp_path / "out", [5]), ids(), dropped=[5], windows=6)
    store.write(tmp_path / "diagnosis.json", got)
    assert store.read(tmp_path / "diagnosis.json") == got


@pytest.mark.parametrize("change, message", [
    ({"dropped": [3, 10]}, r"dropped \[3, 10\]: the dense model has layers 0 to 9"),
    ({"dropped": [3, 3]}, "each once"),
    ({"dropped": [3]}, "dropped names 1 of 10 layers and the pruned model has 8, not 9"),
    ({"windows": 7}, "windows is 7, but there are 6"),
    ({"ids_ST": ids(6, 1)}, "no next token"),
    ({"ids_ST": ids() + 100}, "the vocabulary has 384"),
])
def test_what_does_not_fit_is_refused_before_loading(llama_folder, tmp_path, monkeypatch, change, message):
    out = pruned(llama_folder, tmp_path / "out", [3, 4])
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("loaded a model"))
    options = {"ids_ST": ids(), "dropped": [3, 4], "windows": 6} | change
    with pytest.raises(diagnose.DiagnoseError, match=message):
        diagnose.diagnose(llama_folder, out, options.pop("ids_ST"), **options)


@pytest.mark.parametrize("change, message", [
    ({"windows": 0}, "windows is 0; give a number at least 1"), ({"batch": 0}, "batch is 0; give a number at least 1"),
    ({"massive_factor": 1.0}, "massive_factor is 1.0; give a number above 1")])
def test_values_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(OptionError, match=message):
        diagnose.diagnose(tmp_path / "none", tmp_path / "none", ids(), dropped=[], **change)


def test_models_of_other_shape_are_refused(llama_folder, tmp_path):
    config = json.loads((pico.save(tmp_path / "other", width=64) / "config.json").read_text())
    assert config["hidden_size"] == 64
    with pytest.raises(diagnose.DiagnoseError, match="hidden_size is 32 in the dense model and 64"):
        diagnose.diagnose(llama_folder, tmp_path / "other", ids(), dropped=[], windows=6)


def test_states_that_mean_nothing_are_refused(llama_folder):
    dense, broken = checkpoints.load_model(llama_folder), checkpoints.load_model(llama_folder)
    with torch.no_grad():
        broken.model.layers[3].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(diagnose.DiagnoseError, match=r"state 4 .* of the pruned model is not finite"):
        diagnose.compare(dense, broken, ids(), dropped=[])
    with pytest.raises(diagnose.DiagnoseError, match="state 0 of the dense model is the same for all"):
        diagnose.compare(dense, dense, torch.full((2, 8), 9), dropped=[])
