"""Formulas of Theorem 1 by other routes."""
import numpy as np
import pytest

from kdp_core.study import theorem_1


@pytest.mark.parametrize("b_a, k, factor", [(1.0, 5, 5.0), (2.0, 4, 15.0), (0.5, 3, 1.75), (0.0, 3, 1.0), (7.0, 1, 1)])
def test_accumulation(b_a, k, factor):
    assert theorem_1.accumulation(b_a, k) == pytest.approx(factor)
    if b_a != 1:
        assert theorem_1.accumulation(b_a, k) == pytest.approx((b_a ** k - 1) / (b_a - 1))


def test_accumulation_converges_below_1_and_is_continuous_at_1():
    assert theorem_1.accumulation(0.9, 500) == pytest.approx(1 / (1 - 0.9))
    assert theorem_1.accumulation(1 + 1e-9, 6) == pytest.approx(theorem_1.accumulation(1.0, 6), rel=1e-7)


def test_generalisation_by_numpy():
    want = 1.3 ** 2 * 0.9 ** 2 * np.sqrt(64 * np.log(64 / 0.05) / 1000)
    assert theorem_1.generalisation(1.3, 0.9, 64, 1000, 0.05) == pytest.approx(want)
    assert theorem_1.generalisation(1.3, 0.9, 64, 4000, 0.05) == pytest.approx(want / 2)
    want = 2 * (2 * 2.3 * 0.9) * (1.3 * 0.9 * np.sqrt(64 / 1000)) + 2.3 ** 2 * 0.9 ** 2 * np.sqrt(np.log(20) / 2000)
    assert theorem_1.generalisation_equation_9(1.3, 0.9, 64, 1000, 0.05) == pytest.approx(want)


def test_samples_needed_bring_the_bound_to_the_error():
    n = theorem_1.samples_needed(2.0, 0.01, 1.1, 1.0, 64, 0.05, 3)
    assert theorem_1.bound(0.01, theorem_1.generalisation(1.1, 1.0, 64, n, 0.05), 1.1, 3) == pytest.approx(2.0)
    # three steps of 0.1 at B_A = 1 err by 0.3 whatever n is
    assert theorem_1.samples_needed(0.3, 0.01, 1.0, 1.0, 64, 0.05, 3) is None
