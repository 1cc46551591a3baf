"""Low-rank changes of all linear layers: what is trained, merged and kept, in every family and with stand-ins."""
import shutil

import pytest
import torch

from kdp_core.model import checkpoints
from kdp_core.model.distil import distillation_loss, final_states, head_of
from kdp_core.prune import lora
from kdp_core.prune.finetune import FinetuneError, finetune, put
from kdp_core.prune.fold import fold
from kdp_core.states.block import split
from tests import pico
from tests.kdp_core import stored
from tests.kdp_core.prune.test_finetune import logits, plan, tensors

OPTIONS = dict(targets="linear", rank=2, lr=0.003, epochs=2, kl_weight=0.9, batch_sequences=4, heldout=0.25)


@pytest.fixture(scope="module")
def tokens():
    return stored.tokens(sequences=16, length=16)


@pytest.fixture(scope="module", params=pico.EVERY)
def made(request, tmp_path_factory, tokens):
    """For each family: folder, facts of fold, facts and record of finetune. The pruned model has a stand-in."""
    root = tmp_path_factory.mktemp(request.param)
    pico.save(root / "dense", request.param)
    facts = fold(plan([(5, 7)]), root / "dense", root / "pruned")
    return root, facts, *finetune(root / "dense", root / "pruned", root / "tuned", tokens, facts, **OPTIONS)


def test_a_better_epoch_is_kept_and_no_parameter_added(made):
    root, facts, after, record = made
    losses = [row["heldout_loss"] for row in record.curve]
    assert record.place == "linear" and record.epoch > 0 and losses[record.epoch] == min(losses) < losses[0] - 0.001
    assert after == facts and record.params_added == 0
    assert checkpoints.load_model(root / "tuned").num_parameters() == facts.params_after


def test_every_linear_layer_changes_by_the_rank_and_nothing_else_does(made):
    root, _, _, _ = made
    before, after = tensors(root / "pruned"), tensors(root / "tuned")
    names = {f"{name}.weight" for name in lora.linear_layers(checkpoints.load_model(root / "pruned"))}
    assert any("stand_in" in name for name in names) and len(names) > 20
    assert before.keys() == after.keys()
    assert {name for name in after if not torch.equal(before[name], after[name])} == names
    for name in sorted(names)[::7]:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3) == OPTIONS["rank"]


def test_the_checkpoint_has_the_held_out_loss_that_chose_it(made, tokens):
    root, _, _, record = made
    held, _ = split(len(tokens.ids_ST), OPTIONS["heldout"], 0)
    dense, model = (checkpoints.load_model(root / name) for name in ("dense", "tuned"))
    losses = distillation_loss(final_states(model, tokens.ids_ST[held]), final_states(dense, tokens.ids_ST[held]),
                               head_of(model), head_of(dense), tokens.ids_ST[held], kl_weight=OPTIONS["kl_weight"])
    assert losses.loss.item() == pytest.approx(record.curve[record.epoch]["heldout_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokens):
    root = tmp_path_factory.mktemp("llama")
    pico.save(root / "dense")
    return root, fold(plan([(5, 7)]), root / "dense", root / "pruned")


def test_same_bits_again_whatever_was_drawn_before(llama, tokens, tmp_path):
    root, facts = llama
    for name in ("one", "other"):
        torch.rand(3)
        finetune(root / "dense", root / "pruned", tmp_path / name, tokens, facts, **OPTIONS)
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (logits(tmp_path / "one") - logits(root / "pruned")).abs().max() > 1e-3


def test_zeros_are_not_filled(llama, tokens, tmp_path):
    root, facts = llama
    with pytest.raises(FinetuneError, match="would fill the weights that this method sets to zero; use targets: head"):
        finetune(root / "dense", root / "pruned", tmp_path / "out", tokens, facts._replace(params_zeroed=8), **OPTIONS)


def test_states_that_are_not_finite_are_named(llama, tokens, tmp_path):
    root, facts = llama
    shutil.copytree(root / "pruned", tmp_path / "broken")
    name, weight = next(one for one in tensors(root / "pruned").items() if one[0].endswith("down_proj.weight"))
    put(tmp_path / "broken", {name: torch.full_like(weight, torch.nan)})
    with pytest.raises(FinetuneError, match="broken: final states are not finite"):
        finetune(root / "dense", tmp_path / "broken", tmp_path / "out", tokens, facts, **OPTIONS)
