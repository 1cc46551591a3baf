"""Single-step statistics against formulas written out with SciPy; their two ends: an equal and a scrambled model."""
import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Plan, Selection
from kdp_core.methods import slicegpt
from kdp_core.model import checkpoints
from kdp_core.prune import fold
from kdp_core.states import hidden
from kdp_core.study import single_step
from kdp_core.study.single_step import CHANGES, SingleStepError
from tests import pico
from tests.kdp_core import stored


def ids(windows=4, tokens=12):
    return torch.randint(8, 384, (windows, tokens), generator=torch.Generator().manual_seed(0))


def scrambled(family="llama", seed=1):
    """A model whose matrices are drawn anew."""
    return pico.model(family, seed=seed)


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_a_model_that_equals_the_dense_one_changes_nothing(family):
    found = single_step.compare(pico.model(family), pico.model(family), ids()).values
    assert {name: found[name] for name in CHANGES} == pytest.approx(dict.fromkeys(CHANGES, 0.0), abs=1e-12)
    assert {name: found[f"last_{name}"] for name in CHANGES} == pytest.approx(dict.fromkeys(CHANGES, 0.0), abs=1e-12)


def test_statistics_are_those_of_the_logits():
    dense, other, ids_ST = pico.model("llama"), scrambled(), ids()
    found = single_step.compare(dense, other, ids_ST)
    with torch.no_grad():
        z, w = (model(ids_ST).logits[:, 1:].flatten(0, 1).double().numpy() for model in (dense, other))
    logp, logq = log_softmax(z, axis=1), log_softmax(w, axis=1)
    p, d, rows = np.exp(logp), w - z, np.arange(len(z))
    first = z.argmax(1)
    margins = [np.array([logs[row, first[row]] - np.delete(logs[row], first[row]).max() for row in rows])
               for logs in (logp, logq)]
    expected = {
        "kl": (p * (logp - logq)).sum(1).mean(),
        "estimate_kl": ((p * d ** 2).sum(1) - (p * d).sum(1) ** 2).mean() / 2,
        "disagreement": (first != w.argmax(1)).mean(),
        "entropy_change": np.abs((np.exp(logq) * logq).sum(1) - (p * logp).sum(1)).mean(),
        "margin_lost": np.clip(margins[0] - margins[1], 0, None).mean(),
        "entropy": -(p * logp).sum(1).mean(), "margin": margins[0].mean()}
    assert {name: found.values[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    last = (p * (logp - logq)).sum(1).reshape(4, 11)[:, -1]
    assert found.values["last_kl"] == pytest.approx(last.mean(), rel=1e-4)
    assert found.stderr["last_kl"] == pytest.approx(last.std(ddof=1) / 2, rel=1e-4)
    assert (found.windows, found.positions) == (4, 11)


def test_a_scrambled_model_changes_more_than_a_slightly_moved_one():
    moved = pico.model("llama")
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter *= 1.01
    dense = pico.model("llama")
    small, large = (single_step.compare(dense, other, ids()).values for other in (moved, scrambled()))
    assert all(0 < small[name] < large[name] for name in CHANGES)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_states_of_a_sliced_model_are_turned_back(family, tmp_path):
    """A slicing that keeps every direction is the dense model in another basis."""
    model, data = pico.lively(pico.model(family, layers=4)), stored.tokens()
    pico.tokenizer().save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense")
    hidden.extract(model, data, tmp_path / "h.zarr", layers=[0], dtype="float32")
    selection, found = Selection([], [], "weights", 0.1, 0.1, 0.9, 3, [], 0), {}
    for share in (0.0, 0.25):
        composed = slicegpt.compose(tmp_path / "dense", hidden.read(tmp_path / "h.zarr"), data, selection,
                                    slicing=share)
        fold.fold(composed.plan, tmp_path / "dense", tmp_path / str(share))
        found[share] = single_step.measure(tmp_path / "dense", tmp_path / str(share), ids(), windows=4).values
    assert found[0.0]["angle_h"] < 1e-5 < 1e-3 < found[0.25]["angle_h"] < 1


def test_known_dense_states_give_the_same(llama_folder):
    dense, other = pico.model("llama"), scrambled()
    known = single_step.compare(dense, other, ids(), single_step.last_states(dense, ids()))
    assert known == single_step.compare(dense, other, ids())


def test_a_checkpoint_is_measured_from_its_folder(llama_folder, tmp_path):
    fold.fold(Plan("test", [(layer, "whole") for layer in (3, 4)], [], {}), llama_folder, tmp_path / "cut")
    found = single_step.measure(llama_folder, tmp_path / "cut", ids(), windows=3)
    other = single_step.compare(checkpoints.load_model(llama_folder), checkpoints.load_model(tmp_path / "cut"),
                                ids()[:3])
    assert found == other and found.values["kl"] > 0
    store.write(tmp_path / "step.json", found)
    assert store.read(tmp_path / "step.json") == found


@pytest.mark.parametrize("given, error, message", [
    ({"windows": 5}, SingleStepError, "windows is 5, but the text has 4"),
    ({"windows": 0}, OptionError, "windows"),
])
def test_wrong_windows_are_refused_before_a_model_is_loaded(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        single_step.measure(tmp_path / "none", tmp_path / "none", ids(), **given)


def test_models_of_two_vocabularies_are_refused():
    other = pico.model("llama")
    other.resize_token_embeddings(400)
    with pytest.raises(SingleStepError, match="384 tokens and the pruned one 400"):
        single_step.compare(pico.model("llama"), other, ids())
