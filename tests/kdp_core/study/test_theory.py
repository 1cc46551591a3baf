"""Theorems 1 and 2 on systems whose errors and bounds are known in closed form."""
import itertools
import math

import numpy as np
import pytest
import torch

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import KernelMap
from kdp_core.methods.kdp import kernel
from kdp_core.study import theory
from kdp_core.study.theory import TheoryError
from tests.kdp_core import stored

WIDTH, FEATURES = 6, 32
SHIFT = torch.linspace(-0.4, 0.6, WIDTH)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A smooth nonlinear recursion of four steps."""
    return stored.write(tmp_path_factory.mktemp("drift") / "h.zarr", stored.drift(states=5, sequences=40))


@pytest.fixture(scope="module")
def fitted(states):
    return kernel.fit(states, (0, 4), features=FEATURES, epochs=0, heldout=0.2)


@pytest.fixture(scope="module")
def measured(states, fitted):
    return theory.measure(states, fitted, heldout=0.2, feature_counts=[16, 64], bandwidth_scales=[3.0, 30.0, 300.0],
                          shares=[1.0, 0.5], gaps=[1, 4], operator_ridges=[1e-6, 1e-2])


def shifted(path, states=4):
    """h_{l+1} = h_l + c: random Fourier features turn, each frequency by its own angle."""
    h_STD = torch.randn(12, 24, WIDTH, generator=torch.Generator().manual_seed(3))
    return stored.write(path, torch.stack([h_STD + step * SHIFT for step in range(states)]))


def turning(scale=1.0, steps=3):
    """The kernel map that is exact for `shifted`, each operator times `scale`."""
    generator = torch.Generator().manual_seed(5)
    omega_DM = 0.3 * torch.randn(WIDTH, FEATURES // 2, generator=generator)
    b_M = 2 * math.pi * torch.rand(FEATURES // 2, generator=generator)
    cos_MM, sin_MM = (torch.diag(f(SHIFT @ omega_DM)) for f in (torch.cos, torch.sin))
    # cos(u + a) = cos a cos u - sin a sin u,  sin(u + a) = sin a cos u + cos a sin u
    a_FF = scale * torch.cat((torch.cat((cos_MM, -sin_MM), 1), torch.cat((sin_MM, cos_MM), 1)))
    return KernelMap((0, steps), omega_DM, b_M, a_FF.repeat(steps, 1, 1), torch.ones(steps), "raw", None, [], {})


def test_constants_and_errors_by_numpy(states, fitted, measured):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    train = sorted(order[8:].tolist())
    omega_DM, b_M, a_KFF = (t.double().numpy() for t in (fitted.omega_DM, fitted.b_M, fitted.operators_KFF))
    phi = []
    for layer in range(5):
        angle_NM = states.state(layer)[train].double().numpy().reshape(-1, WIDTH) @ omega_DM + b_M
        phi.append(np.hstack((np.cos(angle_NM), np.sin(angle_NM))) / np.sqrt(FEATURES / 2))
    assert states.massive_LST.sum() == 0 and measured.tokens == len(phi[0]) and measured.sequences == 32
    steps = [np.mean([np.sum((y - a_KFF[i] @ x) ** 2) for x, y in zip(phi[i], phi[i + 1], strict=True)])
             for i in range(4)]
    np.testing.assert_allclose(measured.step_mse, steps, rtol=1e-4)
    assert measured.l_erm == max(measured.step_mse)
    np.testing.assert_allclose(measured.operator_norms, [np.linalg.svd(a_FF)[1][0] for a_FF in a_KFF], rtol=1e-5)
    assert measured.b_a == max(measured.operator_norms) and measured.r_phi == pytest.approx(1, abs=1e-6)
    rows = {(row["start"], row["horizon"]): row for row in measured.horizons}
    assert sorted(rows) == [(start, k) for start in range(4) for k in range(1, 5 - start)]
    product_FF = a_KFF[3] @ a_KFF[2] @ a_KFF[1]
    assert rows[1, 3]["train_rms"] == pytest.approx(
        np.sqrt(np.mean(np.sum((phi[4] - phi[1] @ product_FF.T) ** 2, axis=1))), rel=1e-4)
    spectral = [np.linalg.norm(a_KFF[3] @ a_KFF[2], 2), np.linalg.norm(a_KFF[3], 2), 1]
    assert rows[1, 3]["bound_products"] == pytest.approx(np.dot(spectral, np.sqrt(steps[1:])), rel=1e-4)


def test_bounds_hold_and_stand_in_order(measured):
    for row in measured.horizons:
        ladder = [row[name] for name in ("train_rms", "bound_products", "bound_steps", "bound_erm", "bound",
                                         "bound_equation_9")]
        assert all(low <= high * (1 + 1e-5) for low, high in itertools.pairwise(ladder)), row
        assert row["rms"] <= row["largest"] <= row["trivial"] and row["p99"] <= row["largest"]
        assert row["vacuous"] == (row["bound"] >= row["trivial"]) and row["vacuous_erm"] <= row["vacuous"]


def test_operators_of_other_ridges_trade_the_fit_against_the_norm(measured):
    same, strong = measured.ridges
    whole, = (row for row in measured.horizons if (row["start"], row["horizon"]) == (0, 4))
    # step 1 has solved with 1e-6 too
    assert all(same[name] == pytest.approx(whole[name], rel=1e-3) for name in same if name in whole)
    assert same["b_a"] == pytest.approx(measured.b_a, rel=1e-3) and same["l_erm"] == pytest.approx(measured.l_erm, 1e-3)
    assert strong["b_a"] < same["b_a"] and strong["l_erm"] > same["l_erm"] and strong["train_rms"] > same["train_rms"]
    assert all(row["train_rms"] <= row["bound_erm"] for row in measured.ridges)


def test_one_token_may_exceed_what_bounds_the_mean(measured):
    # equation 12 speaks of every token; of a mean it cannot
    assert any(row["largest"] > row["bound_erm"] and row["beyond"] > 0 for row in measured.horizons)


def test_an_exact_system_has_no_error_and_errors_add_up_at_norm_1(tmp_path):
    found = theory.measure(shifted(tmp_path / "h.zarr"), turning(), heldout=0.25)
    assert found.b_a == pytest.approx(1, abs=1e-6) and found.l_erm < 1e-10
    assert all(row["rms"] < 1e-5 and row["bound_erm"] < 1e-4 for row in found.horizons)
    assert [row["accumulation"] for row in found.horizons if row["start"] == 0] == pytest.approx([1, 2, 3], abs=1e-5)
    # without an intercept no linear map can shift; the decoder's intercept can
    rows = {row["space"]: row for row in found.risks if row["gap"] == 1}
    assert rows["identity"]["risk"] > 0.1 and rows["learned"]["relative_risk"] < 1e-5
    assert rows["identity"]["state_error"] < 1e-6


@pytest.mark.parametrize("scale", [0.8, 1.1])
def test_the_bound_is_attained_where_each_step_shrinks_or_grows(tmp_path, scale):
    found = theory.measure(shifted(tmp_path / "h.zarr"), turning(scale), heldout=0.25)
    for row in found.horizons:
        # E_k = (1 - s^k) phi, and |1 - s| (s^k - 1) / (s - 1) is its norm
        want = abs(1 - scale ** row["horizon"])
        for name in ("train_rms", "rms", "largest", "bound_products", "bound_steps", "bound_erm"):
            assert row[name] == pytest.approx(want, rel=1e-4), name


def test_a_linear_system_has_no_risk_in_its_own_space(tmp_path):
    generator = torch.Generator().manual_seed(1)
    m_DD = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
    h_STD = torch.randn(20, 24, WIDTH, generator=generator)
    found = theory.measure(stored.write(tmp_path / "h.zarr", torch.stack([h_STD, h_STD @ m_DD.T])),
                           turning(steps=1), heldout=0.25, ridge=1e-12)
    row, = (row for row in found.risks if row["space"] == "identity")
    assert row["relative_risk"] < 1e-9 and row["state_error"] < 1e-9
    assert row["operator_norm"] == pytest.approx(np.linalg.norm(m_DD.numpy(), 2), rel=1e-5)
    # then no margin is left, and nothing is claimed or asked for
    assert all(not row["holds"] and row["samples_printed"] is None and not row["better_state"]
               for row in found.conditions)


def test_a_wider_kernel_lowers_the_risk_of_theorem_2_but_not_the_error_of_the_state(measured):
    rows = {row["bandwidth_scale"]: row for row in measured.risks
            if (row["space"], row["features"], row["share"], row["gap"]) == ("random", FEATURES, 1.0, 4)}
    assert rows[300.0]["risk"] < 0.02 * rows[30.0]["risk"] and rows[30.0]["risk"] < 0.02 * rows[3.0]["risk"]
    # 1e-4 of the risk, and nothing gained
    assert rows[300.0]["state_error"] > 0.5 * rows[3.0]["state_error"]


def test_the_excess_is_over_the_linear_map_on_as_many_tokens(measured):
    plain = {(row["gap"], row["share"]): row["state_error"] for row in measured.risks if row["space"] == "identity"}
    for row in measured.risks:
        assert row["state_excess"] == pytest.approx(row["state_error"] - plain[row["gap"], row["share"]], abs=1e-6)
        assert (row["state_excess_stderr"] == 0) == (row["space"] == "identity")


def test_designs_change_one_thing_at_a_time(measured):
    rows = [(row["space"], row["features"], row["bandwidth_scale"], row["share"])
            for row in measured.risks if row["gap"] == 1]
    assert rows == [("identity", WIDTH, None, 1.0), ("identity", WIDTH, None, 0.5), ("random", 32, 3.0, 1.0),
                    ("random", 32, 3.0, 0.5), ("random", 16, 3.0, 1.0), ("random", 64, 3.0, 1.0),
                    ("random", 32, 30.0, 1.0), ("random", 32, 300.0, 1.0), ("learned", 32, None, 1.0)]
    assert {row["tokens"] for row in measured.risks if row["share"] == 0.5} == {16 * 24}
    assert len(measured.conditions) == len(measured.risks) - 2 * 2


def test_conditions_say_what_needs_no_fit(tmp_path, fitted):
    # states of a unit a hundred times smaller: the risk of the identity class grows, that of the features cannot
    small, large = (stored.write(tmp_path / f"{scale:g}.zarr", scale * stored.drift(states=5, sequences=12))
                    for scale in (0.01, 100.0))
    found = {}
    for name, states in (("small", small), ("large", large)):
        own = kernel.fit(states, (0, 4), features=FEATURES, epochs=0, heldout=0.25)
        found[name] = theory.measure(states, own, heldout=0.25, gaps=[1]).conditions[0]
    assert found["large"]["holds_without_fit"] and found["large"]["samples_printed"] == 0
    assert found["large"]["samples_proof"] > 0
    assert not found["small"]["holds_without_fit"] and not found["small"]["holds"]
    assert found["large"]["better_state"] == found["small"]["better_state"]


@pytest.mark.parametrize("options, words", [
    ({"delta": 1.0}, "delta is 1.0"), ({"gaps": [5]}, "the run has 4 layers; give 1 to 4"), ({"gaps": []}, "gaps"),
    ({"gaps": [0]}, "gaps is .* at least 1"), ({"feature_counts": [7]}, "feature_counts is .* a multiple of 2"),
    ({"bandwidth_scales": [0.0]}, "above 0"), ({"shares": [1.5]}, "at most 1"), ({"operator_ridges": [0.0]}, "above 0"),
])
def test_refused_before_any_state_is_read(states, fitted, options, words, monkeypatch):
    monkeypatch.setattr(theory, "load", None)
    with pytest.raises((TheoryError, OptionError), match=words):
        theory.measure(states, fitted, **options)


def test_the_same_bits_twice_and_the_record_on_disk(tmp_path, states, fitted, measured):
    again = theory.measure(states, fitted, heldout=0.2, feature_counts=[16, 64], bandwidth_scales=[3.0, 30.0, 300.0],
                           shares=[1.0, 0.5], gaps=[1, 4], operator_ridges=[1e-6, 1e-2])
    store.write(tmp_path / "theory.json", again)
    assert store.read(tmp_path / "theory.json")._replace(stats={}) == measured._replace(stats={})
