"""The public names of the package, and a whole pruning in one call."""
import doctest
import subprocess
import sys

import pytest
import torch

import kdp_core
from kdp_core import methods
from kdp_core.base import texts
from kdp_core.base.options import OptionError
from kdp_core.base.texts import TextError
from kdp_core.model import checkpoints
from kdp_core.prune import fold, pruning
from kdp_core.states import hidden, similarity
from tests import pico
from tests.test_structure import ROOT

DOCUMENTS = pico.documents(160)
SMALL = {"documents": DOCUMENTS, "length": 24, "sequences": 40, "ratio": 0.2}
IDS_ST = torch.arange(2, 26).view(2, 12)


@pytest.fixture(scope="module")
def dense(llama_folder):
    return checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder)


def test_the_example_of_the_docstring_runs(llama_folder):
    example, = doctest.DocTestFinder().find(pruning.prune_model, "prune_model",
                                            globs={"folder": llama_folder,
                                                                                 "documents": pico.documents(400)})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted == 5 and result.failed == 0


def test_one_call_gives_the_bits_of_the_stages_one_by_one(dense, llama_folder, tmp_path):
    model, tokenizer = dense
    pruned = kdp_core.prune_model(model, tokenizer, **SMALL, method="linear_prefix", out=tmp_path / "out")
    tokens = texts.pack(tokenizer, [texts.Part("documents", DOCUMENTS, 40)], length=24, seed=0)
    hidden.extract(model, tokens, tmp_path / "hidden.zarr")
    states = hidden.read(tmp_path / "hidden.zarr")
    plan = methods.run("linear_prefix", llama_folder, states, tokens, similarity.similarity(states),
                       checkpoints.facts(model, source="", sha256=""), ratio=0.2, k_max=3, options={})
    fold.fold(plan, llama_folder, tmp_path / "stages")
    with torch.no_grad():
        assert torch.equal(pruned(IDS_ST).logits, checkpoints.load_model(tmp_path / "stages")(IDS_ST).logits)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "stages/model.safetensors").read_bytes()


def test_the_given_model_stays_and_the_pruned_one_is_usable_after_its_folder_is_gone(dense):
    model, tokenizer = dense
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = kdp_core.prune_model(model, tokenizer, **SMALL, method="deepest")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(pruned.model.layers) < len(model.model.layers) and not pruned.training
    assert pruned(IDS_ST).logits.isfinite().all()


@pytest.mark.parametrize("given, error, message", [
    ({"method": "prune"}, OptionError, "'prune' is unknown; choose one of"),
    ({"method": "linear", "options": {"fit": {"rigde": 1}}}, OptionError, "'rigde' is unknown"),
    ({"sequences": 100_000}, TextError, "documents"),
])
def test_bad_input_is_refused_before_the_model_is_written(dense, monkeypatch, given, error, message):
    model, tokenizer = dense
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_, **__: pytest.fail("the model was written"))
    with pytest.raises(error, match=message):
        kdp_core.prune_model(model, tokenizer, **SMALL | given)


def test_public_names_are_there_and_documented():
    assert set(kdp_core.__all__) == set(kdp_core.PUBLIC)
    for name in kdp_core.__all__:
        assert getattr(kdp_core, name).__doc__, name
    with pytest.raises(AttributeError, match="no 'prunes'; its public names are METHODS"):
        kdp_core.prunes  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, kdp_core; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
