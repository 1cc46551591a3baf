"""Standard errors against the bootstrap, the jackknife and closed forms."""
import math
import random
import statistics

import numpy as np
import pytest
import torch

from kdp_core.score import metrics, standard_errors


def test_stderr_of_a_mean():
    values = [1.0, 2.5, 0.5, 4.0]
    assert standard_errors.mean(torch.tensor(values)) == pytest.approx(statistics.stdev(values) / 2)
    assert standard_errors.mean(torch.ones(1)) is None


def test_errors_of_independent_figures_add_in_squares():
    assert standard_errors.independent_mean([3.0, 4.0]) == 2.5
    assert math.isnan(standard_errors.independent_mean([]))


def test_stderr_agrees_with_the_bootstrap():
    rng = random.Random(1)
    weights = [rng.randint(5, 40) for _ in range(60)]
    items = [(-weight * rng.gauss(2.0, 0.3), weight) for weight in weights]
    draws = [metrics.ppl(rng.choices(items, k=len(items))) for _ in range(4000)]
    assert standard_errors.perplexity(items) == pytest.approx(statistics.stdev(draws), rel=0.1)


def test_stderr_of_bare_likelihoods_is_that_of_a_mean():
    items = [-1.0, -2.5, -0.5, -4.0]
    assert standard_errors.nats(items) == pytest.approx(statistics.stdev(items) / 2)
    assert standard_errors.nats([(-1.0, 3)]) is None and standard_errors.perplexity([-1.0]) is None


def test_stderr_of_the_area_under_the_curve_agrees_with_the_bootstrap():
    rng = random.Random(0)
    items = [(round(rng.gauss(0.6 * label, 1), 1), label) for label in [0, 1] * 60]
    draws = [metrics.auc(rng.choices(items, k=len(items))) for _ in range(600)]
    assert standard_errors.auc(items) == pytest.approx(statistics.stdev(draws), rel=0.15)
    assert standard_errors.auc([(1.0, 1), (0.0, 0)]) is None


def test_stderr_of_a_ratio_agrees_with_the_jackknife():
    generator = torch.Generator().manual_seed(0)
    sequence_N = torch.arange(4000) // 20
    below_N = 1 + torch.rand(4000, generator=generator)
    above_N = below_N * (0.2 + 0.05 * torch.randn(200, generator=generator)[sequence_N])
    above, below = (t.double().reshape(200, 20).sum(1).numpy() for t in (above_N, below_N))
    left = np.array([np.delete(above, s).sum() / np.delete(below, s).sum() for s in range(200)])
    assert standard_errors.ratio(above_N, below_N, sequence_N) == pytest.approx(
        np.sqrt(199 / 200 * np.sum((left - left.mean()) ** 2)), rel=0.01)
    assert standard_errors.ratio(2 * below_N, below_N, sequence_N) == pytest.approx(0, abs=1e-7)
    assert standard_errors.ratio(above_N, below_N, torch.zeros(4000, dtype=torch.int64)) is None
