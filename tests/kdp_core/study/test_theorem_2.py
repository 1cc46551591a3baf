"""Risks and conditions of Theorem 2 by other routes."""
import math

import numpy as np
import pytest
import torch

from kdp_core.study import theorem_2


def problem(count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_2NF = torch.randn(2, count, 5, generator=generator) + 0.5
    h_ND = torch.tanh(z_2NF[1] @ torch.randn(5, 3, generator=generator)) + 0.1 * z_2NF[0, :, :3]
    return z_2NF, h_ND


def test_sample_condition():
    root = lambda count, inside: math.sqrt(count * math.log(inside))  # noqa: E731
    printed, proof = theorem_2.sample_condition(1.5, 1.0, 0.5, 64, 6, 0.05, 0.2)
    assert printed == pytest.approx(16 * (1.5 ** 2 * (root(64, 64 / 0.05) - 0.25 * root(6, 6 / 0.05))) ** 2 / 0.04)
    assert proof == pytest.approx(16 * (1.5 ** 2 * root(64, 128 / 0.05)) ** 2 / 0.04)
    # states of large norm: as printed no sample is needed, by the proof very many
    printed, proof = theorem_2.sample_condition(1.5, 1.0, 100.0, 64, 6, 0.05, 0.2)
    assert printed == 0 and proof == pytest.approx(16 * (1.5 ** 2 * 1e4 * root(6, 12 / 0.05)) ** 2 / 0.04)
    assert theorem_2.sample_condition(1.5, 1.0, 1.0, 64, 6, 0.05, 0.0) is None


def test_risk_by_numpy():
    (z_2NF, h_ND), (judged_2NF, judged_ND) = problem(), problem(count=120, seed=1)
    found, error_N = theorem_2.risk(z_2NF, h_ND, judged_2NF, judged_ND, torch.arange(120) // 10, ridge=1e-10)
    x, y, h, jx, jy, jh = (t.double().numpy() for t in (*z_2NF, h_ND, *judged_2NF, judged_ND))
    a = np.linalg.lstsq(x, y, rcond=None)[0].T
    assert found["risk"] == pytest.approx(np.mean(np.sum((jy - jx @ a.T) ** 2, axis=1)), rel=1e-4)
    assert found["operator_norm"] == pytest.approx(np.linalg.svd(a)[1][0], rel=1e-4)
    with_one = lambda z: np.hstack((z, np.ones((len(z), 1))))  # noqa: E731
    for name, before, judged in (("state_error", x @ a.T, jx @ a.T), ("direct_error", x, jx)):
        decoded = with_one(judged) @ np.linalg.lstsq(with_one(before), h, rcond=None)[0]
        assert found[name] == pytest.approx(np.sum((decoded - jh) ** 2) / np.sum((jh - jh.mean(0)) ** 2), rel=1e-4)
        if name == "state_error":
            np.testing.assert_allclose(error_N, np.sum((decoded - jh) ** 2, axis=1), rtol=1e-2, atol=1e-5)


def test_small_features_have_a_small_risk_and_the_same_state():
    # Theorem 2's comparison can be had for nothing: divide the features by ten
    (z_2NF, h_ND), (judged_2NF, judged_ND) = problem(), problem(count=120, seed=1)
    whole, tenth = (theorem_2.risk(scale * z_2NF, h_ND, scale * judged_2NF, judged_ND, torch.arange(120) // 10, 1e-8)[0]
                    for scale in (1.0, 0.1))
    assert tenth["risk"] == pytest.approx(whole["risk"] / 100, rel=1e-4)
    for name in ("relative_risk", "state_error", "direct_error", "operator_norm"):
        assert tenth[name] == pytest.approx(whole[name], rel=1e-4)
