"""Distances in three spaces: literal NumPy for every measure, and estimates that are exact to second order."""
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import rel_entr, softmax

from kdp_core.study import distances


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_measures_are_the_literal_formulas():
    h_ND, other_ND, z_NV, other_NV = drawn(4, 6), drawn(4, 6, seed=1), drawn(4, 9, seed=2), drawn(4, 9, seed=3)
    found = distances.measures(h_ND, other_ND, z_NV, other_NV, 0.5)
    for n in range(4):
        a, b, z, y = (x[n].double().numpy() for x in (h_ND, other_ND, z_NV, other_NV))
        p, q, d = softmax(z / 0.5), softmax(y / 0.5), y - z
        along = (b - a) @ a / (a @ a)
        r = p ** 2 / (p ** 2).sum()
        five = np.argsort(-p)[:5]
        expected = {
            "angle_h": cosine(a, b), "angle_z": cosine(z, y), "angle_p": cosine(p, q), "kl": rel_entr(p, q).sum(),
            "parallel_h": abs(along), "orthogonal_h": np.linalg.norm(b - a - along * a) / np.linalg.norm(a),
            "estimate_p": (r @ d ** 2 - (r @ d) ** 2) / 0.5, "estimate_kl": (p @ d ** 2 - (p @ d) ** 2) / 0.5,
            "estimate_uniform": d.var() / 0.5, "estimate_top5": d[five].var() / 0.5,
            "agreement": float(p.argmax() == q.argmax())}
        for name, value in expected.items():
            assert found[name][n].item() == pytest.approx(value, rel=1e-6, abs=1e-12), name
        # |D|^2 = |D along a|^2 + |D_o|^2
        norm = np.linalg.norm(b - a) / np.linalg.norm(a)
        assert math.hypot(found["parallel_h"][n], found["orthogonal_h"][n]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_estimates_are_exact_to_second_order(temperature):
    z_NV, d_NV = drawn(3, 50).double(), drawn(3, 50, seed=1).double()
    h_ND, e_ND = drawn(3, 8, seed=2).double(), drawn(3, 8, seed=3).double()
    for space in ("h", "z", "p", "kl"):
        gaps = []
        for size in (1e-2, 1e-3):
            found = distances.measures(h_ND, h_ND + size * e_ND, z_NV, z_NV + size * d_NV, temperature)
            measured = found["kl" if space == "kl" else f"angle_{space}"]
            gaps.append(((measured - found[f"estimate_{space}"]).abs() / measured).max().item())
        # the relative gap is of first order: ten times smaller where the change is
        assert gaps[1] < 2e-2 and gaps[1] == pytest.approx(gaps[0] / 10, rel=0.3), space


def test_a_shift_of_all_logits_changes_nothing_in_p():
    z_NV = drawn(3, 20)
    found = distances.outputs(z_NV, z_NV + 7, 1.0)
    assert found["kl"].max() < 1e-9 and found["angle_p"].max() < 1e-9 and found["estimate_kl"].max() < 1e-9
    assert found["agreement"].tolist() == [1, 1, 1]


def test_small_angles_keep_their_digits():
    a_ND = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for size in (1e-4, 1e-7):
        assert distances.angle(a_ND, torch.tensor([[1.0, size]])).item() == pytest.approx(size ** 2 / 2, rel=1e-5)


def test_averages_and_their_errors_over_windows():
    row = distances.averaged({"kl": torch.tensor([1.0, 3.0, 5.0, 7.0])}, 2)
    assert row == {"kl": 4.0, "kl_stderr": pytest.approx(2.0)}  # windows' means 2 and 6
    assert distances.averaged({"kl": torch.ones(3)}, 1) == {"kl": 1.0, "kl_stderr": None}


def test_candidates_alone_beside_all_tokens():
    z_NV, other_NV = drawn(1, 12, scale=3), drawn(1, 12, seed=1, scale=3)
    found = distances.restricted(z_NV, other_NV, [2, 5, 7], 1.0)
    p, q = (softmax(x[0].double().numpy()) for x in (z_NV, other_NV))
    few_p, few_q = (x[[2, 5, 7]] / x[[2, 5, 7]].sum() for x in (p, q))
    expected = {"kl": rel_entr(p, q).sum(), "kl_candidates": rel_entr(few_p, few_q).sum(),
                "angle_p_candidates": cosine(few_p, few_q), "mass": p[[2, 5, 7]].sum(),
                "mass_other": q[[2, 5, 7]].sum(),
                "rank": 1 + (p > p[[2, 5, 7]].max()).sum(),
                "agreement_candidates": float(few_p.argmax() == few_q.argmax())}
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
