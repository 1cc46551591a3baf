"""Step 1: the training does what it promises, and a wrong option is refused."""
import itertools
import math

import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.methods._train import TrainingFailed
from kdp_core.methods.kdp import kernel
from kdp_core.methods.kdp.kernel import KernelCollapsed
from kdp_core.states.block import FitError, load
from tests.kdp_core import stored

SMALL = dict(features=16, rank=2, epochs=3, batch_sequences=4, lr=0.05, heldout=0.2)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("drift") / "h.zarr", stored.drift())


@pytest.fixture(scope="module")
def pico_states(tmp_path_factory):
    return stored.of_pico(tmp_path_factory.mktemp("pico") / "h.zarr")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(record):
    return {name: value for name, value in record._asdict().items() if isinstance(value, torch.Tensor)}


def same_bits(one, other):
    return all(torch.equal(tensor, getattr(other, name)) for name, tensor in tensors(one).items())


# training

def test_training_lowers_the_loss_it_fits_and_the_one_it_does_not(drifting):
    found = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 25})
    first, last = found.curve[0], found.curve[-1]
    assert last["loss"] < 0.8 * first["loss"] and last["heldout_mse"] < 0.8 * first["heldout_mse"]
    assert found.stats["decode_error"] < 1 and found.stats["decode_error_true_features"] < found.stats["decode_error"]


def test_record_says_what_the_glossary_promises(pico_states):
    found = kernel.fit(pico_states, (4, 6), **SMALL, lift="rms")
    assert found.block == (4, 6) and found.lift_input == "rms" and found.omega_DM.shape == (32, 8)
    assert found.operators_KFF.shape == (2, 16, 16) and found.b_M.shape == (8,)
    assert [row["epoch"] for row in found.curve] == [1, 2, 3]
    assert all(set(row) == {"epoch", "seconds", "lr", "loss", "mse", "cos", "heldout_loss", "heldout_mse",
                            "heldout_cos", "phi_variance", "phi_norm", "operator_norm"} for row in found.curve)
    assert all(0 <= row["phi_variance"] <= 1 and row["phi_norm"] <= 2 for row in found.curve)
    assert all(len(row["operator_norm"]) == 2 for row in found.curve)
    assert found.stats["ridge"] == 1e-6 and found.stats["tokens"] <= 13 * 24
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in tensors(found).values())


def test_heldout_figures_and_final_operators_by_hand(drifting):
    found = kernel.fit(drifting, (0, 3), **SMALL, massive="raw", weight="none")
    split = load(drifting, (0, 3), massive="raw", heldout=0.2, seed=0)
    phi = {}
    for name in ("train", "heldout"):
        angle = split.h_KSTD[:, getattr(split, name)].flatten(1, 2).double().numpy() @ found.omega_DM.double().numpy()
        angle += found.b_M.double().numpy()
        phi[name] = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / math.sqrt(8)
    mse = 0.0
    for i, a_FF in enumerate(found.operators_KFF.double().numpy()):
        x, y = phi["train"][i:i + 2]
        level = 1e-6 * np.mean(np.sum(x ** 2, axis=0))
        rows, goal = np.vstack([x, math.sqrt(level) * np.eye(16)]), np.vstack([y, np.zeros((16, 16))])
        np.testing.assert_allclose(x @ a_FF.T, x @ np.linalg.lstsq(rows, goal, rcond=None)[0], atol=1e-4)
        mse += np.mean(np.sum((phi["heldout"][i] @ a_FF.T - phi["heldout"][i + 1]) ** 2, axis=-1))
    assert found.stats["heldout_mse"] == pytest.approx(mse, rel=1e-3)
    assert found.stats["phi_variance"] == pytest.approx(phi["heldout"][0].var(axis=0).sum(), rel=1e-3)
    assert found.stats["tokens"] == len(phi["train"][0])


def test_same_seed_same_bits_and_random_numbers_stay_fixed_while_training(drifting):
    before = torch.random.get_rng_state()
    one, other = (kernel.fit(drifting, (0, 2), **SMALL) for _ in range(2))
    assert same_bits(one, other) and [row["loss"] for row in one.curve] == [row["loss"] for row in other.curve]
    longer = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 6})
    assert torch.equal(longer.b_M, one.b_M) and not torch.equal(longer.omega_DM, one.omega_DM)
    assert not torch.equal(kernel.fit(drifting, (0, 2), **SMALL, seed=1).b_M, one.b_M)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_decoded_state_judged_while_training_is_that_of_a_shorter_run_and_changes_nothing(drifting):
    plain = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 4}, final_ols=False)
    judged = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 4}, final_ols=False, decode_every=2)
    shorter = kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 2}, final_ols=False)
    assert same_bits(plain, judged) and ["decode_error" in row for row in judged.curve] == [False, True, False, True]
    for row, run in ((judged.curve[1], shorter), (judged.curve[3], plain)):
        assert {key: row[key] for key in ("decode_error", "decode_error_true_features")} == {
            key: run.stats[key] for key in ("decode_error", "decode_error_true_features")}
    assert all(one["seconds"] < two["seconds"] for one, two in itertools.pairwise(judged.curve))


def test_the_chained_loss_trains_the_lift_for_the_last_state(drifting):
    steps, chained = (kernel.fit(drifting, (0, 3), **SMALL | {"epochs": 6}, loss=loss) for loss in ("steps", "chain"))
    assert chained.curve[-1]["loss"] < chained.curve[0]["loss"] and not same_bits(steps, chained)
    # of one step there is nothing to chain
    steps, chained = (kernel.fit(drifting, (0, 1), **SMALL, loss=loss) for loss in ("steps", "chain"))
    assert [row["loss"] for row in chained.curve] == pytest.approx([row["loss"] for row in steps.curve], rel=1e-4)


@pytest.mark.parametrize("every", ["iteration", "epoch", "start"])
def test_every_schedule_of_least_squares_trains(drifting, every):
    found = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 6}, ols_every=every, final_ols=False)
    assert found.curve[-1]["loss"] < found.curve[0]["loss"]
    # Adam moves gamma only where least squares does not set the operators each time
    assert torch.equal(found.gamma_K, torch.ones(2)) == (every == "iteration")
    assert found.stats["heldout_loss"] == found.curve[-1]["heldout_loss"]


def test_minibatches_leave_no_small_remainder(drifting):
    """10 training sequences by 9: a remainder of one sequence would be fitted exactly by 24 features."""
    found = kernel.fit(drifting, (0, 2), **SMALL | {"features": 24, "batch_sequences": 9, "epochs": 1}, weight="none")
    whole = kernel.fit(drifting, (0, 2), **SMALL | {"features": 24, "batch_sequences": 10, "epochs": 1}, weight="none")
    assert found.curve[0]["loss"] > 0.5 * whole.curve[0]["loss"]
    assert found.curve[0]["heldout_loss"] < 3 * whole.curve[0]["heldout_loss"]


def test_learning_rate_halves_after_patience(drifting):
    found = kernel.fit(drifting, (0, 2), **SMALL | {"epochs": 8, "lr": 1e-7, "batch_sequences": 100}, patience=2)
    # no epoch after the first is better by a ten-thousandth: epochs 2 to 4, then 5 to 7, are one more than patience
    assert [row["lr"] for row in found.curve] == pytest.approx([1e-7] * 4 + [5e-8] * 3 + [2.5e-8])


def test_bandwidth_is_counted_in_median_distances(tmp_path):
    """Ten times larger states with the median as unit: the same features; with unit bandwidth: others."""
    h_LSTD = stored.drift()
    small, large = (stored.write(tmp_path / f"{s}.zarr", s * h_LSTD) for s in (1.0, 10.0))
    one, ten = (kernel.fit(h, (0, 2), **SMALL | {"epochs": 0}) for h in (small, large))
    torch.testing.assert_close(one.omega_DM, 10 * ten.omega_DM)
    torch.testing.assert_close(one.operators_KFF, ten.operators_KFF, atol=1e-3, rtol=1e-3)
    unit = [kernel.fit(h, (0, 2), **SMALL | {"epochs": 0}, bandwidth="unit").omega_DM for h in (small, large)]
    assert torch.equal(*unit)


def test_heldout_sequences_are_never_fitted(tmp_path):
    h_LSTD = stored.drift()
    heldout = load(stored.write(tmp_path / "a.zarr", h_LSTD), (0, 2), massive="raw", heldout=0.2, seed=0).heldout
    assert len(heldout) == 2
    other = h_LSTD.clone()
    other[:, heldout] = torch.randn(other[:, heldout].shape, generator=seeded(21))
    one, two = (kernel.fit(stored.write(tmp_path / f"{name}.zarr", h), (0, 2), **SMALL, massive="raw")
                for name, h in (("b", h_LSTD), ("c", other)))
    assert same_bits(one, two) and one.stats["heldout_loss"] != two.stats["heldout_loss"]


def test_massive_tokens_are_left_out_of_the_fit_by_default(tmp_path):
    fits = []
    for name, direction in (("a", 1.0), ("b", -1.0)):
        h_LSTD = stored.drift()
        h_LSTD[1:, :, 0] = direction * 1000.0  # massive in the block's last states only
        fits.append(stored.write(tmp_path / f"{name}.zarr", h_LSTD))
    bypassed = [kernel.fit(h, (1, 3), **SMALL) for h in fits]
    assert same_bits(*bypassed) and bypassed[0].stats["tokens"] == 10 * 23
    assert bypassed[0].bypass_above == pytest.approx(8 * fits[0].state(1).norm(dim=-1).median().item())
    raw = [kernel.fit(h, (1, 3), **SMALL, massive="raw") for h in fits]
    assert not same_bits(*raw) and raw[0].stats["tokens"] == 10 * 24 and raw[0].bypass_above is None


# refusals

def test_collapse_is_named_with_its_remedy(drifting):
    with pytest.raises(KernelCollapsed, match=r"epoch 1: .* nearly constant.*lower kernel\.bandwidth_scale"):
        kernel.fit(drifting, (0, 2), **SMALL, bandwidth_scale=1e4)


@pytest.mark.parametrize("every", ("iteration", "epoch", "start"))
def test_divergence_is_named_with_its_remedy(drifting, every):
    with pytest.raises(TrainingFailed, match=r"lower kernel\.lr"):
        kernel.fit(drifting, (0, 2), **SMALL | {"lr": 3e37, "epochs": 60}, ols_every=every)


def test_broken_states_are_refused(tmp_path):
    h_LSTD = stored.drift()
    h_LSTD[1, 3, 5, 2] = float("nan")
    with pytest.raises(FitError, match=r"state 1 .*not finite"):
        kernel.fit(stored.write(tmp_path / "h.zarr", h_LSTD), (0, 2), **SMALL)


@pytest.mark.parametrize("options, message", [
    ({"features": 15}, r"features is 15; give a number that is a multiple of 2"),
    ({"features": 0}, r"features is 0; give a number at least 2"),
    ({"bandwidth": "mean"}, r"bandwidth is 'mean'; choose one of median, unit"),
    ({"loss": "sum"}, r"loss is 'sum'; choose one of steps, chain"),
    ({"weight": "last"}, r"weight is 'last'; choose one of none"),
    ({"ols_every": "hour"}, r"ols_every is 'hour'; choose one of iteration"),
    ({"massive": "drop"}, r"massive is 'drop'; choose one of bypass, raw"),
    ({"heldout": 0.0}, r"heldout is 0\.0; give a number above 0"),
    ({"lift": "log"}, r"lift is 'log'; choose one of raw, rms"),
])
def test_options_no_fit_can_work_with(drifting, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        kernel.fit(drifting, (0, 2), **SMALL | options)
