"""Mean and spread over calibration seeds by hand."""
import math

import pytest

from kdp_core.results import seeds
from kdp_core.results.summary import summarise
from tests.kdp_core import points


def test_mean_and_spread_over_seeds_by_hand():
    made = [points.pruned("kdp", points.scores(ppl, acc, 0.65), calib=calib) for calib, ppl, acc in
            (("news", 20.0, 0.45), ("news-s1", 26.0, 0.41), ("news-s2", 29.0, 0.37), ("other", 99.0, 0.1))]
    summary = summarise([points.dense(), *made])
    frame = seeds.over_seeds(summary, {"news": "news", "news-s1": "news", "news-s2": "news"})
    assert frame["method"].tolist() == ["dense", "kdp"] and frame["calib"].tolist() == ["", "news"]
    kdp = frame.iloc[1]
    assert kdp["seeds"] == 3 and kdp["ppl"] == pytest.approx(25.0)
    assert kdp["ppl_spread"] == pytest.approx(math.sqrt((25 + 1 + 16) / 2))
    assert kdp["acc"] == pytest.approx(0.53) and kdp["acc_spread"] == pytest.approx(0.02)
    assert kdp["acc_stderr"] == pytest.approx(math.sqrt(2) * 0.01 / 2)
    assert kdp["ppl_stderr"] == pytest.approx(0.01 * math.sqrt((20 ** 2 + 26 ** 2 + 29 ** 2) / 3))
    text = seeds.render(frame, "md")
    assert "53.0 ± 2.0" in text and "**" not in text and "<u>" not in text and "–" in text.splitlines()[2]
    assert r"\resizebox" in seeds.render(frame, "tex")
    assert "ppl_spread" in seeds.render(frame, "csv").splitlines()[0]
