"""The results of a run, tested at its end by the rule `check`: nothing is missing, and no number is impossible.

The rule names in KDP_RUN a JSON file with the folder, the models, the grid points and the figures of the run. Records
are read as plain JSON here, so that an error of the library's reader does not hide an error of its writer.
"""
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from kdp_core.score.metrics import PPL_CEILING

NAMED = os.environ.get("KDP_RUN")
pytestmark = pytest.mark.skipif(not NAMED, reason="the rule `check` names a run in KDP_RUN")
RUN = json.loads(Path(NAMED).read_text(encoding="utf-8")) if NAMED else {}
KEYS = ["model", "calib", "method", "ratio", "k_max"]
STARTS = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-", "csv": b""}
"""Kind of a figure's file -> the bytes that it begins with."""


def results(*parts):
    """A file of the results."""
    return Path(RUN["folder"], "results", *parts)


def table(name):
    """A CSV file of the results. Only an empty field is read as a missing value."""
    return pd.read_csv(results(name), keep_default_na=False, na_values=[""],
                       dtype=dict.fromkeys(KEYS[:3], str)).fillna({"calib": ""})


def record(path):
    """The fields of a record."""
    return json.loads(path.read_text(encoding="utf-8"))["fields"]


def key(point):
    """What names a grid point in a table."""
    return point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"])


def models():
    """The keys of the dense models and of the grid points."""
    return [(model, "", "dense", 0.0, 0) for model in RUN["models"]] + [key(point) for point in RUN["points"]]


@pytest.mark.parametrize("name", ["summary.csv", "scores.csv"])
def test_a_table_has_every_model_of_the_grid_and_no_other(name):
    found = [tuple(row) for row in table(name)[KEYS].itertuples(index=False)]
    assert set(found) == set(models())
    if name == "summary.csv":
        assert len(found) == len(models()), "a model has several rows"


def test_parameters_are_conserved():
    """What is removed and what is put in explain the size of every pruned model, and its measurement finds that size.

    Parts, channels and zeros leave a model whose size does not follow from the layers that are removed.
    """
    shares = table("summary.csv").set_index(KEYS).params_removed
    for point in RUN["points"]:
        at = Path(RUN["folder"], point["folder"])
        dense, pruned = record(results(point["model"], "facts.json")), record(at / "pruned.json")
        assert pruned["params_before"] == dense["params_total"], key(point)
        assert record(at / "efficiency.json")["params"] == pruned["params_after"], key(point)
        left = (pruned["params_after"] - pruned["params_zeroed"]) / pruned["params_before"]
        assert pruned["params_removed"] == pytest.approx(1 - left) == shares[key(point)], key(point)
        if pruned["blocks"] and not pruned["parts"]:
            gone = sum(sum(dense["params_per_layer"][start:stop]) for start, stop in pruned["blocks"])
            assert pruned["params_before"] - gone + pruned["params_added"] == pruned["params_after"], key(point)


def test_accuracies_are_shares():
    scores = table("scores.csv")
    shares = scores[scores.unit == "share"]
    assert shares[~shares.value.between(0, 1)].to_dict("records") == []
    assert table("summary.csv").acc.dropna().between(0, 1).all()


def test_perplexities_are_numbers():
    """A perplexity is at least 1. One of text, `ppl`, must lie below the value that stands for no number."""
    scores = table("scores.csv")
    found = scores[scores.unit == "ppl"]
    high = found.metric.map(lambda metric: PPL_CEILING if metric == "ppl" else float("inf"))
    assert found[~((found.value >= 1) & (found.value < high))].to_dict("records") == []


@pytest.mark.parametrize("suffix", STARTS)
def test_every_figure_is_there_and_not_empty(suffix):
    paths = [results("figures", f"{name}.{suffix}") for name in RUN["figures"]]
    lacking = [str(path) for path in paths if not path.is_file() or path.stat().st_size <= len(STARTS[suffix])]
    assert lacking == []
    assert [str(path) for path in paths if not path.read_bytes().startswith(STARTS[suffix])] == []
