"""Metrics by another route."""
import math
import random

import pytest
from sklearn.metrics import roc_auc_score

from kdp_core.score import metrics


def test_ppl_weighs_items_by_their_tokens():
    items = [(-2.0, 1), (-3.0, 3)]
    # four tokens, five nats
    assert metrics.ppl(items) == pytest.approx(math.exp(5 / 4), rel=1e-12)
    assert metrics.ppl([-1.0, -3.0]) == pytest.approx(math.exp(2), rel=1e-12)
    assert metrics.ppl([(-1e6, 1)]) == math.inf
    assert math.isnan(metrics.ppl([(math.nan, 1), (-1.0, 1)]))


def test_area_under_the_curve_is_that_of_scikit_learn():
    rng = random.Random(0)
    items = [(round(rng.gauss(0.6 * label, 1), 1), label) for label in [0, 1] * 60]
    margins, labels = zip(*items, strict=True)
    assert metrics.auc(items) == pytest.approx(roc_auc_score(labels, margins))
    assert math.isnan(metrics.auc(items[::2])), "one kind of items"


@pytest.mark.parametrize(("metric", "unit"), [("word_perplexity", "ppl"), ("bits_per_byte", "bits/byte"),
                                              ("acc_norm", "share"), ("rouge1", "share"), ("bleu", "score")])
def test_units(metric, unit):
    assert metrics.unit_of(metric) == unit
