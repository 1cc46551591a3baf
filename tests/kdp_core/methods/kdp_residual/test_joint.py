"""Joint training: what changes and what never does, which epoch is kept, and its figures by another route."""
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from kdp_core.base.records import Plan
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp_residual.closed_form import fit_alone
from kdp_core.methods.kdp_residual.dictionaries import closed_form_options
from kdp_core.methods.kdp_residual.joint import train
from kdp_core.model import checkpoints
from kdp_core.model.passes import Passes
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from tests import pico
from tests.kdp_core import stored

BLOCKS = [(1, 2), (3, 5)]
KEPT, HELD = torch.arange(12), torch.arange(12, 16)


class Start(NamedTuple):
    """Closed-form stand-ins of a pico model, and all that training reads."""
    folder: Any
    model: Any
    hidden: Any
    modules: Any


@pytest.fixture(scope="module", params=["llama", "opt"])
def start(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = pico.lively(pico.model(request.param, layers=6))
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    states = hidden.read(root / "h.zarr")
    fit = closed_form_options(model, states, dictionary="neurons", entries=4, seed=0)
    return Start(root / "model", model, states, [fit_alone(model, states, block, KEPT, fit) for block in BLOCKS])


def trained(start, modules=None, **options):
    given = {"epochs": 2, "lr": 1e-2, "batch_sequences": 4, "positions": 12, "kl_weight": 1.0, "seed": 0, **options}
    return train(Passes(start.model, start.hidden.tokens), start.hidden, stored.tokens(), modules or start.modules,
                 KEPT, HELD, **given)


def equal(modules, others):
    return all(torch.equal(tensor, other.tensors[name]) for module, other in zip(modules, others, strict=True)
               for name, tensor in module.tensors.items())


def test_only_stand_ins_change(start):
    weights = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    before = [module._replace(tensors={name: tensor.clone() for name, tensor in module.tensors.items()})
              for module in start.modules]
    modules, _ = trained(start)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in start.model.state_dict().items())
    assert all(parameter.grad is None for parameter in start.model.parameters())
    assert equal(before, start.modules), "the records given stay as they were"
    for module, other in zip(modules, before, strict=True):
        assert (module.block, module.kind, module.options) == (other.block, other.kind, other.options)
        assert not any(torch.equal(tensor, other.tensors[name]) for name, tensor in module.tensors.items())
        assert not any(tensor.requires_grad for tensor in module.tensors.values())


@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
@torch.no_grad()
def test_the_best_epoch_is_kept_and_its_figures_are_the_folded_models(start, tmp_path, kl_weight):
    """KL and cross-entropy from the logits of checkpoints, the trained one and the one it began from."""
    with torch.enable_grad():
        modules, curve = trained(start, epochs=3, kl_weight=kl_weight)
    best = min(curve, key=lambda row: row["heldout_loss"])
    assert best["epoch"] > 0
    assert kl_weight < 1 or best["heldout_kl"] < curve[0]["heldout_kl"]
    assert [row["epoch"] for row in curve] == [0, 1, 2, 3] and curve[0]["kl"] is None
    assert all(row["kl"] > 0 and row["seconds"] > 0 for row in curve[1:])
    ids_ST = stored.tokens().ids_ST[HELD]
    logp_NV = start.model(ids_ST).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    for name, row, made in (("start", curve[0], start.modules), ("best", best, modules)):
        fold(Plan("made_up", [(layer, "whole") for layer in (1, 3, 4)], made, {}), start.folder, tmp_path / name)
        logits_NV = checkpoints.load_model(tmp_path / name)(ids_ST).logits[:, :-1].flatten(0, 1)
        kl = kl_div(logits_NV.log_softmax(-1), logp_NV, log_target=True, reduction="sum").item() / len(logits_NV)
        ce = cross_entropy(logits_NV, ids_ST[:, 1:].flatten()).item()
        assert row["heldout_kl"] == pytest.approx(kl, rel=1e-3)
        assert row["heldout_loss"] == pytest.approx(kl_weight * kl + (1 - kl_weight) * ce, rel=1e-3)


def test_the_start_is_kept_where_nothing_beats_it(start):
    modules, curve = trained(start, epochs=1, lr=30.0)
    assert curve[1]["heldout_loss"] > curve[0]["heldout_loss"] and equal(modules, start.modules)


def test_same_seed_same_bits_and_torchs_own_generator_stays(start):
    before = torch.random.get_rng_state()
    (one, curve), (two, _), (other, _) = (trained(start, epochs=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(one, two) and not equal(one, other)
    assert math.isfinite(curve[-1]["kl"])


def test_more_positions_than_there_are_is_all_of_them(start):
    (all_of_them, _), (more, _) = (trained(start, epochs=1, positions=positions) for positions in (23, 500))
    assert equal(all_of_them, more) and not equal(all_of_them, trained(start, epochs=1, positions=1)[0])


def test_a_loss_that_is_no_number_stops_training(start):
    broken = start.modules[0]._replace(tensors={name: torch.full_like(tensor, float("nan"))
                                                for name, tensor in start.modules[0].tensors.items()})
    with pytest.raises(TrainingFailed, match=r"the loss is nan; lower compose\.lr"):
        trained(start, [broken, start.modules[1]])
