"""The stand-ins of a whole grid point: prefix, held-out sequences, joint training, parameters and options."""
from typing import Any, NamedTuple, get_args

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import ModelFacts, Plan, Selection
from kdp_core.methods import settings
from kdp_core.methods.kdp_residual.closed_form import fit_alone, fit_stand_in
from kdp_core.methods.kdp_residual.compose import compose, compose_linear, linear_params, module_params
from kdp_core.methods.kdp_residual.dictionaries import Fit, Kind
from kdp_core.model import checkpoints
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.methods.kdp_residual.examples import FIT, made_up, randn

BLOCKS = [(1, 3), (4, 6)]


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    model = pico.model("llama", layers=8)
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


def selection(*blocks):
    return Selection(list(blocks), [0.0] * len(blocks), "divergence", 0.2, 0.2, 0.5, 3, [],
                     sum(stop - start for start, stop in blocks))


def composed(dense, blocks=BLOCKS, **options):
    given = {"dictionary": "none", "epochs": 0, "heldout": 0.25, **options}
    return compose(dense.folder, dense.hidden, stored.tokens(), selection(*blocks), **given)


def kept_of(dense, heldout=0.25, seed=0):
    order = torch.randperm(dense.hidden.sequences, generator=torch.Generator().manual_seed(seed))
    return order[round(heldout * dense.hidden.sequences):].sort().values


def assert_same(module, other, **tolerance):
    assert module.block == other.block and set(module.tensors) == set(other.tensors)
    for name, tensor in module.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, **tolerance)


@pytest.mark.parametrize("dictionary", get_args(Kind))
def test_without_prefix_each_block_is_fitted_on_the_dense_models_states(dense, dictionary):
    made = composed(dense, dictionary=dictionary, entries=8, prefix=False)
    fit = Fit(dictionary, 8, 3.0, 1e-4, "inverse_norm", "rms", 8.0, 4, 0)
    for module, block in zip(made.plan.modules, BLOCKS, strict=True):
        assert_same(module, fit_alone(dense.model, dense.hidden, block, kept_of(dense), fit), atol=0, rtol=0)
    assert made.curve == [] and made.plan.tensors == {} and [row["block"] for row in made.fits] == BLOCKS


def test_with_prefix_a_block_is_fitted_on_what_the_pruned_model_feeds_it(dense, tmp_path):
    """Beside the states of a checkpoint in which the blocks before it are folded."""
    with_prefix, without = composed(dense), composed(dense, prefix=False)
    assert_same(with_prefix.plan.modules[0], without.plan.modules[0], atol=0, rtol=0)
    first = with_prefix.plan.modules[0]
    fold(Plan("made_up", [(1, "whole"), (2, "whole")], [first], {}), dense.folder, tmp_path / "out")
    # layers 0, 3, 4 ... are left: state 4 of the dense model is state 2 here
    fed_STD, = boundary_states(checkpoints.load_model(tmp_path / "out"), stored.tokens().ids_ST, [2])
    kept, fit = kept_of(dense), Fit("none", 0, 3.0, 1e-4, "inverse_norm", "rms", 8.0, 4, 0)
    expected = fit_stand_in((4, 6), None, fed_STD[kept], dense.hidden.state(6)[kept], fit)
    assert_same(with_prefix.plan.modules[1], expected, atol=1e-3, rtol=1e-3)
    apart = with_prefix.plan.modules[1].tensors["linear.weight"] - without.plan.modules[1].tensors["linear.weight"]
    assert apart.abs().max() > 0.01


def test_the_prefix_mends_what_earlier_blocks_broke(dense):
    blocks = [(1, 2), (3, 4), (5, 6)]
    with_prefix, without = composed(dense, blocks), composed(dense, blocks, prefix=False)
    first, *later = ((a["heldout_error"], b["heldout_error"]) for a, b in zip(with_prefix.fits, without.fits,
                                                                              strict=True))
    assert first[0] == first[1] and all(ours < theirs for ours, theirs in later)


def test_held_out_sequences_are_never_fitted_on(dense, tmp_path):
    h_LSTD = torch.stack([dense.hidden.state(k) for k in dense.hidden.layers])
    held = [s for s in range(16) if s not in kept_of(dense).tolist()]
    assert len(held) == 4
    h_LSTD[:, held] = randn(9, 4, 24, 32, seed=50)
    changed = dense._replace(hidden=stored.write(tmp_path / "h.zarr", h_LSTD))
    before, after = (composed(case, prefix=False) for case in (dense, changed))
    for module, other in zip(before.plan.modules, after.plan.modules, strict=True):
        assert_same(module, other, atol=1e-5, rtol=1e-5)
    assert before.fits[0]["heldout_error"] != pytest.approx(after.fits[0]["heldout_error"], rel=0.1)


def test_joint_training_comes_last_and_no_weight_of_the_model_changes(dense):
    weights = (dense.folder / "model.safetensors").read_bytes()
    start, made = (composed(dense, dictionary="neurons", entries=4, epochs=epochs, lr=1e-2) for epochs in (0, 2))
    assert [row["epoch"] for row in made.curve] == [0, 1, 2] and made.plan.tensors == {}
    assert min(row["heldout_loss"] for row in made.curve) < made.curve[0]["heldout_loss"]
    assert made.fits == start.fits, "errors of the closed form"
    for module, other in zip(start.plan.modules, made.plan.modules, strict=True):
        assert module.options == other.options
        assert not torch.equal(module.tensors["linear.weight"], other.tensors["linear.weight"])
    assert (dense.folder / "model.safetensors").read_bytes() == weights


def test_the_linear_variant_is_the_linear_part_alone(dense):
    made = compose_linear(dense.folder, dense.hidden, stored.tokens(), selection(*BLOCKS), heldout=0.25, ridge=1e-3)
    expected = composed(dense, ridge=1e-3)
    for module, other in zip(made.plan.modules, expected.plan.modules, strict=True):
        assert_same(module, other, atol=0, rtol=0)
        assert set(module.tensors) == {"linear.weight", "linear.bias"} and module.options["entries"] == 0


@pytest.mark.parametrize("family, dictionary", [("llama", "neurons"), ("opt", "neurons"), ("llama", "rff"),
                                                ("opt", "rff_learned"), ("qwen3", "none")])
def test_parameters_are_known_before_the_fit(family, dictionary):
    kind = {"neurons": "mlp" if family == "opt" else "glu", "none": None}.get(dictionary, "rff")
    module = fit_stand_in((0, 1), kind and made_up(kind), randn(4, 9, 5), randn(4, 9, 5, seed=1), FIT)
    facts = ModelFacts(family, 8, 5, 384, 0, [], 0, "made", "")
    assert module_params(facts, {"compose": {"dictionary": dictionary, "entries": 6}}) == \
        sum(tensor.numel() for tensor in module.tensors.values())
    assert module_params(facts, {}) == module_params(facts, {"compose": settings(compose, {})})
    assert linear_params(facts, {}) == module_params(facts, {"compose": {"dictionary": "none"}}) == 30


@pytest.mark.parametrize("options, message", [
    ({"dictionary": "words"}, r"dictionary is 'words'; choose one of neurons, rff,"),
    ({"token_weight": "all"}, r"token_weight is 'all'; choose one of inverse_norm, none"),
    ({"dictionary": "rff", "entries": 0}, r"entries is 0; give a number at least 1"),
    ({"heldout": 0.0}, r"heldout is 0\.0; give a number above 0"), ({"heldout": 0.99}, r"compose\.heldout 0\.99 of 16"),
    ({"epochs": -1}, r"epochs is -1; give a number at least 0"),
    ({"epochs": 1, "positions": 0}, "positions is 0; give a number at least 1"),
])
def test_options_that_cannot_be_are_named(dense, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        composed(dense, **options)


def test_states_that_are_not_stored_are_named(dense, tmp_path):
    hidden.extract(dense.model, stored.tokens(), tmp_path / "h.zarr", layers=[1, 3, 4, 6])
    with pytest.raises(FitError, match=r"lacks states \(stored: \[1, 3, 4, 6\]\); set hidden\.layers to all"):
        composed(dense._replace(hidden=hidden.read(tmp_path / "h.zarr")))
