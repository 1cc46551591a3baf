"""The whole method on pico models: sizes, weights that stay, states that are met, training, refusals."""
import functools
from typing import NamedTuple

import pytest
import torch

from kdp_core.base.resume import Resume, Stopped
from kdp_core.methods import METHODS
from kdp_core.methods._outputs import Compared
from kdp_core.methods._select import BlockError
from kdp_core.methods.kdp_narrow import fit, parts
from kdp_core.methods.kdp_narrow.budget import by_budget
from kdp_core.methods.kdp_narrow.compose import compose
from kdp_core.methods.kdp_narrow.fit import Closed, Part
from kdp_core.methods.kdp_narrow.ladders import ladder, ladders
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

QUICK = {"sequences": 8, "epochs": 0, "heldout": 0.2, "positions": 8}
LADDERS = {"fit_sequences": 8, "judge_sequences": 2}
CHANNELS = 64


class Dense(NamedTuple):
    """What the method starts from."""
    folder: object
    hidden: object
    facts: object
    search: object


def searched(root, family, layers=10, **options):
    """A pico model of a family, its states and its search."""
    folder = pico.save(root / "dense", family, layers=layers)
    model = checkpoints.load_model(folder)
    hidden.extract(model, stored.tokens(), root / "hidden.zarr")
    states, facts = hidden.read(root / "hidden.zarr"), checkpoints.facts(model, source="pico", sha256="")
    return Dense(folder, states, facts, ladders(folder, states, stored.tokens(), facts, k_max=3,
                                                **{**LADDERS, **options}))


@pytest.fixture(scope="module")
def of_family(tmp_path_factory):
    return functools.cache(lambda family: searched(tmp_path_factory.mktemp(family), family))


def selection(dense, ratio):
    return by_budget(dense.search, dense.facts, ratio=ratio, k_max=3, module_params=0)


def composed(dense, ratio=0.2, **options):
    return compose(dense.folder, dense.hidden, stored.tokens(), selection(dense, ratio), **{**QUICK, **options})


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.25])
def test_the_ratio_is_met_to_half_a_channel(of_family, tmp_path, ratio):
    dense = of_family("llama")
    found = composed(dense, ratio)
    facts = fold(found.plan, dense.folder, tmp_path / "pruned")
    channel = count_params(checkpoints.load_model(dense.folder)) * ratio - facts.params_before + facts.params_after
    assert abs(channel) <= 3 * pico.model("llama").config.hidden_size / 2 + 1
    assert found.stats["share"] == pytest.approx(facts.params_removed)


def test_without_solving_and_training_every_kept_weight_is_the_dense_models(of_family):
    dense = of_family("llama")
    weights = checkpoints.load_model(dense.folder).state_dict()
    for name, tensor in composed(dense, solve=False).plan.tensors.items():
        rows = {row.numpy().tobytes() for row in (weights[name] if tensor.shape[1] == weights[name].shape[1]
                                                  else weights[name].T.contiguous())}
        for row in tensor if tensor.shape[1] == weights[name].shape[1] else tensor.T.contiguous():
            assert row.numpy().tobytes() in rows


def test_only_writers_change(of_family):
    dense = of_family("llama")
    weights = checkpoints.load_model(dense.folder).state_dict()
    for name, tensor in composed(dense, epochs=1).plan.tensors.items():
        if tensor.shape == weights[name].shape and not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("family", pico.DIFFERENT)
def test_what_a_part_is_fed_and_adds_is_what_the_layer_does(of_family, family):
    dense = of_family(family)
    passes = Passes(checkpoints.load_model(dense.folder), dense.hidden.tokens)
    h_STD = dense.hidden.state(1)
    given = parts.fed(passes, 1, "mlp", h_STD, 4)
    made = parts.after(passes, 1, "mlp", given, 4)
    assert torch.allclose(made, passes.run_batches(h_STD, [1], 4), atol=1e-5, rtol=1e-4)
    # the old matrix is what the target asks for where nothing was removed
    u_NTD, _ = parts.target(passes, 1, "mlp", given, made)
    writer = parts.writer_of(passes, 1, "mlp")
    old = given.f_STF @ writer.weight.T
    assert torch.allclose(u_NTD, old, atol=1e-3 * old.abs().max().item())
    assert torch.equal(parts.after(passes, 1, "mlp", given, 4, in_place=True), made)
    assert torch.equal(given.base_STD, made)


def test_solving_on_the_pruned_prefix_meets_the_dense_states_better(of_family):
    dense, errors, which = of_family("llama"), {}, torch.arange(16)
    sizes = [(Part(layer, part, units, 1), count) for layer in range(2, 6)
             for part, units, count in (("attention", 2, 1), ("mlp", CHANNELS, 32))]
    for solve in (True, False):
        passes = Passes(checkpoints.load_model(dense.folder).requires_grad_(False), dense.hidden.tokens)
        errors[solve] = [error for *_, error in fit.in_order(passes, dense.hidden, sizes, which, which,
                                                              Closed(1e-3, solve, 4))]
    assert all(solved < kept for solved, kept in zip(errors[True], errors[False], strict=True))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_parts_and_layers_without_units_are_taken_out(of_family, tmp_path, family):
    """The folded model gives the outputs of the dense model in which the writers of these parts give nothing."""
    dense, ids_ST = of_family(family), stored.tokens().ids_ST[:2]
    chosen = selection(dense, 0.1)
    emptied = {(2, "attention"), (4, "mlp"), (5, "attention"), (5, "mlp")}
    chosen = chosen._replace(candidates=[
        {**one, "kept": 0 if (one["layer"], one["part"]) in emptied else one["of"]} for one in chosen.candidates])
    found = compose(dense.folder, dense.hidden, stored.tokens(), chosen, **QUICK, solve=False)
    assert found.plan.drop == [(2, "attention"), (4, "mlp"), (5, "whole")]
    fold(found.plan, dense.folder, tmp_path / "pruned")
    model = checkpoints.load_model(dense.folder)
    passes = Passes(model, ids_ST.shape[1])
    with torch.no_grad():
        for layer, part in emptied:
            writer = parts.writer_of(passes, layer, part)
            writer.weight.zero_()
            if writer.bias is not None:
                writer.bias.zero_()
        expected = model(ids_ST, use_cache=False).logits
        pruned = checkpoints.load_model(tmp_path / "pruned")
        assert pruned.config.num_hidden_layers == dense.facts.layers - 1
        assert torch.allclose(pruned(ids_ST, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
        cached = pruned.generate(ids_ST[:1, :5], max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, pruned.generate(ids_ST[:1, :5], max_new_tokens=4, do_sample=False, use_cache=False))


def test_training_lowers_the_held_out_loss_or_keeps_the_closed_form(of_family):
    curve = composed(of_family("llama"), epochs=2, lr=3e-3).curve
    assert [row["epoch"] for row in curve] == [0, 1, 2]
    assert min(row["heldout_loss"] for row in curve[1:]) < curve[0]["heldout_loss"]


def test_all_matrices_of_narrow_parts_may_be_trained(of_family):
    dense = of_family("llama")
    writers, trained = (composed(dense, epochs=1, lr=1e-3, trained=which) for which in ("writers", "all"))
    assert set(writers.plan.tensors) == set(trained.plan.tensors)
    assert writers.curve[0]["heldout_loss"] == trained.curve[0]["heldout_loss"] > trained.curve[1]["heldout_loss"]
    for name, tensor in trained.plan.tensors.items():
        assert not torch.equal(tensor, writers.plan.tensors[name])


def test_a_ladder_leaves_the_model_as_it_was_and_rises(of_family):
    dense = of_family("llama")
    model = checkpoints.load_model(dense.folder).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passes, which, judged = Passes(model, dense.hidden.tokens), torch.arange(8), torch.arange(8, 12)
    part = Part(2, "mlp", CHANNELS, 1)
    compared = Compared(passes, dense.hidden.state(dense.facts.layers)[judged], 4)
    found = ladder(passes, dense.hidden, part, which, judged, compared, Closed(1e-3, True, 4))
    assert sorted(found) == [0, 16, 32, 48] and found[0] > found[16] > found[32] > found[48] > 0
    assert all(torch.allclose(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_stopped_training_goes_on_to_the_same_bits(of_family, tmp_path):
    dense = of_family("llama")
    whole = composed(dense, epochs=2).plan.tensors
    stopped = Resume(tmp_path / "state", "key", every_s=0.0)
    stopped.asked = True
    with pytest.raises(Stopped):
        composed(dense, epochs=2, resume=stopped)
    again = composed(dense, epochs=2, resume=Resume(tmp_path / "state", "key", every_s=1e9)).plan.tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_what_cannot_be_done_is_said_with_the_remedy(of_family):
    dense = of_family("llama")
    with pytest.raises(BlockError, match=r"ratio 0\.99 is too high"):
        selection(dense, 0.99)
    with pytest.raises(FitError, match="judge_sequences 40 of 16 sequences"):
        ladders(dense.folder, dense.hidden, stored.tokens(), dense.facts, k_max=3, judge_sequences=40)
    with pytest.raises(FitError, match=r"set hidden\.layers to all"):
        ladders(dense.folder, dense.hidden._replace(layers=[0, 3]), stored.tokens(), dense.facts, k_max=3)


def test_the_selection_says_what_each_part_keeps_and_the_model_has_it(of_family):
    dense = of_family("llama")
    chosen, found = selection(dense, 0.2), composed(dense, 0.2)
    assert [(one["layer"], one["part"]) for one in chosen.candidates] == \
        [(layer, part) for layer in range(dense.facts.layers) for part in ("attention", "mlp")]
    gone = {(layer, part) for layer, which in found.plan.drop
            for part in (("attention", "mlp") if which == "whole" else (which,))}
    for one in chosen.candidates:
        width = found.plan.shape["widths"][one["layer"]]
        kept = width["kv_heads" if one["part"] == "attention" else "intermediate"]
        assert one["kept"] == (0 if (one["layer"], one["part"]) in gone else kept)
    assert chosen.ratio_planned == pytest.approx(found.stats["share"]) and chosen.ratio_largest > 0.25


def test_the_price_of_attentions_decides_how_much_of_them_is_kept(of_family):
    dense = of_family("llama")

    def kept(price):
        chosen = by_budget(dense.search, dense.facts, ratio=0.2, k_max=3, module_params=0, attention_price=price)
        assert chosen.ratio_planned == pytest.approx(0.2, abs=0.005)
        return [one["kept"] / one["of"] for one in chosen.candidates if one["part"] == "attention"]

    cheap, dear = kept(1e-3), kept(1e3)
    assert all(share == 1 for share in dear) and sum(cheap) < sum(dear)


def test_parallel_families_are_refused_by_the_record():
    refuses = METHODS["kdp_narrow"].refuses
    assert not refuses(family_of("llama")) and refuses(family_of("llama")._replace(parallel=True))
