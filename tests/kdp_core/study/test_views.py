"""Kernel-space views against NumPy, held-out sequences never fitted, straightness of paths with known answers."""
import math

import numpy as np
import pytest
import torch

from kdp_core.methods.kdp import kernel
from kdp_core.states.block import load
from kdp_core.study import views
from kdp_core.study.views import ViewError
from tests.kdp_core import stored

SMALL = dict(features=16, rank=2, epochs=1, batch_sequences=4, heldout=0.2)


@pytest.fixture(scope="module")
def drifting(tmp_path_factory):
    return stored.write(tmp_path_factory.mktemp("drift") / "h.zarr", stored.drift())


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return stored.of_pico(tmp_path_factory.mktemp("pico") / "h.zarr")


@pytest.fixture(scope="module")
def found(pico):
    """Paths of pico states, one t-SNE for all tests."""
    return views.paths(pico, samples=10, perplexity=5.0)


def numpy_features(record, h):
    angle = h.double().numpy() @ record.omega_DM.double().numpy() + record.b_M.double().numpy()
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / math.sqrt(len(record.b_M))


# the kernel space

def test_rows_are_numpys_and_belong_to_a_sequence_never_fitted(drifting):
    record = kernel.fit(drifting, (0, 3), **SMALL, seed=2)
    view = views.kernel_view(drifting, record, 0.2, 2, positions=[0, 7])
    split = load(drifting, (0, 3), massive="bypass", heldout=0.2, seed=2)
    assert view.sequence == int(split.heldout[0]) and view.sequence not in split.train
    h_LTD = split.h_KSTD[:, view.sequence]
    z = numpy_features(record, h_LTD[0, view.positions])
    for a in record.operators_KFF.double().numpy():
        z = z @ a.T
    true = numpy_features(record, h_LTD[-1, view.positions])
    mean = numpy_features(record, split.tokens(split.train)[-1]).mean(0)
    np.testing.assert_allclose(view.mean_F, mean, atol=1e-5)
    np.testing.assert_allclose(view.predicted_PF, z - mean, atol=1e-5)
    np.testing.assert_allclose(view.true_PF, true - mean, atol=1e-5)
    np.testing.assert_allclose(view.error_raw_P, ((z - true) ** 2).sum(-1), rtol=1e-3)  # |phi| is 1


def test_the_mean_flatters_a_wide_kernel(drifting):
    record = kernel.fit(drifting, (0, 1), **SMALL | {"epochs": 0}, bandwidth_scale=30.0)
    view = views.kernel_view(drifting, record, 0.2)
    assert view.mean_share > 0.99
    assert all(raw < 0.01 * error for raw, error in zip(view.error_raw_P, view.error_P, strict=True))
    assert 0 < view.error < view.error_unchanged


def test_a_block_that_changes_nothing_is_predicted_by_the_identity(tmp_path):
    still = stored.write(tmp_path / "h.zarr", stored.drift()[:1].expand(3, -1, -1, -1).clone())
    record = kernel.fit(still, (0, 2), **SMALL | {"epochs": 0}, final_ols=False)
    view = views.kernel_view(still, record, 0.2)
    assert view.error == 0 == view.error_unchanged and view.error_P == [0.0]
    assert torch.equal(view.predicted_PF, view.true_PF)


def test_positions_are_the_next_that_count(tmp_path):
    h_LSTD = stored.drift(length=30)
    h_LSTD[:, :, 0] *= 1000
    hidden = stored.write(tmp_path / "h.zarr", h_LSTD)
    record = kernel.fit(hidden, (0, 2), **SMALL)
    assert views.kernel_view(hidden, record, 0.2).positions == [1, 25]  # 50 is beyond the end
    assert views.kernel_view(hidden, record, 0.2, positions=[1, 0]).positions == [1]
    raw = kernel.fit(hidden, (0, 2), **SMALL, massive="raw")
    assert views.kernel_view(hidden, raw, 0.2).positions == [0, 25]
    with pytest.raises(ViewError, match=r"positions is \[30\].*has 30 tokens"):
        views.kernel_view(hidden, record, 0.2, positions=[30])


def test_defaults_hold_out_what_step_1_holds_out():
    assert views.kernel_view.__defaults__ == tuple(kernel.fit.__kwdefaults__[name] for name in ("heldout", "seed"))


# paths

def test_paths_hold_the_last_ordinary_token(tmp_path):
    h_LSTD = stored.drift()
    h_LSTD[1, 3, -1] *= 1000
    hidden = stored.write(tmp_path / "h.zarr", h_LSTD)
    found = views.paths(hidden, samples=10, perplexity=5.0)
    assert found.tokens == [23] * 3 + [22] + [23] * 6 and found.layers == [0, 1, 2, 3]
    for sample, token in enumerate(found.tokens):
        torch.testing.assert_close(found.h_SLD[sample], h_LSTD[:, sample, token])
    assert found.xz_SL2.shape == found.walk_xz_SL2.shape == (10, 4, 2)
    torch.testing.assert_close(found.walk_SLD.diff(dim=1).norm(dim=-1), found.h_SLD.diff(dim=1).norm(dim=-1))


def test_same_seed_same_paths(pico, found):
    again = views.paths(pico, samples=10, perplexity=5.0)
    for name in ("xz_SL2", "walk_xz_SL2"):
        assert torch.equal(getattr(found, name), getattr(again, name)) and getattr(found, name).isfinite().all()


def test_neighbours_stay_neighbours_in_the_plane(found):
    # two points of one sample at neighbouring layers lie nearer than points of different samples do, as in the states
    step = found.xz_SL2.diff(dim=1).norm(dim=-1).median()
    apart = torch.pdist(found.xz_SL2[:, 5]).median()
    assert step < apart


def test_too_few_points_and_sequences_without_an_ordinary_token(pico, tmp_path):
    with pytest.raises(ViewError, match=r"perplexity is 30, but 5 samples at 11 layers are 55 points"):
        views.paths(pico, samples=5)
    h_LSTD = stored.drift()
    h_LSTD[:, 4] *= 1000
    with pytest.raises(ViewError, match="sequence 4 has no token"):
        views.paths(stored.write(tmp_path / "h.zarr", h_LSTD), perplexity=5.0)


# straightness

def test_a_line_is_straight_whatever_its_pace():
    pace_L = torch.tensor([0.0, 1, 1.5, 4, 9])
    line_SLD = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0)) * pace_L[:, None]
    assert views.straightness(line_SLD) == pytest.approx((1, 1, 1), abs=1e-5)


def test_a_square_by_hand():
    square_SLD = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    # ends 1 apart after 3; every turn a right angle; both axes alike
    assert views.straightness(square_SLD) == pytest.approx((1 / 3, 0, 0.5))


def test_unrelated_steps_keep_lengths_and_meet_their_closed_forms():
    generator = torch.Generator().manual_seed(0)
    line_SLD = torch.ones(50, 25, 2000).cumsum(1)
    walk_SLD = views.unrelated_walk(line_SLD, generator)
    torch.testing.assert_close(walk_SLD.diff(dim=1).norm(dim=-1), line_SLD.diff(dim=1).norm(dim=-1), rtol=1e-4, atol=0)
    assert torch.equal(walk_SLD[:, 0], line_SLD[:, 0])
    found = views.straightness(walk_SLD)
    assert found.chord == pytest.approx(1 / math.sqrt(24), rel=0.02)
    assert found.turn == pytest.approx(0, abs=4 / math.sqrt(2000 * 50 * 23))
    assert found.axis == pytest.approx(6 / math.pi ** 2, abs=0.02)


def test_two_points_have_no_bend():
    with pytest.raises(ViewError, match="2 points"):
        views.straightness(torch.zeros(1, 2, 3))


def test_table_measures_spaces_and_runs(found):
    rows = views.straightness_table(found)
    assert [(row["space"], row["run"]) for row in rows] == [
        (space, run) for space in ("states", "t-SNE") for run in ("all", "inner", *(f"{k} steps" for k in range(3, 7)))]
    inner = rows[1]
    assert (inner["layer_first"], inner["layer_last"]) == (1, 9)
    assert inner["chord"] == views.straightness(found.h_SLD[:, 1:10]).chord
    windows = [views.straightness(found.h_SLD[:, start:start + 4]).turn for start in range(1, 7)]
    assert rows[2]["turn"] == pytest.approx(np.mean(windows), rel=1e-6)
    assert rows[6]["axis_unrelated"] == views.straightness(found.walk_xz_SL2).axis
    assert rows[0]["chord_unrelated"] == views.straightness(found.walk_SLD).chord


def test_own_neighbour_by_hand(found):
    h_SLD = torch.tensor([[[0.0], [1], [10]], [[10.1], [20], [21]]])
    # 10 and 10.1 are nearest to each other, over the border of samples
    assert views.own_neighbour(found._replace(h_SLD=h_SLD)) == pytest.approx(4 / 6)
