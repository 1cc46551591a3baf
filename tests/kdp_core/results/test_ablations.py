"""Ablations: the numbers of chosen points, who lies on which line, one task's score, and refusals."""
import io
import math

import pandas as pd
import pytest

from kdp_core.results import ablations
from kdp_core.results.ablations import Ablation, AblationError
from kdp_core.results.summary import summarise, tidy
from tests.kdp_core import points


def key(method, calib="news", ratio="0.2", k_max="3"):
    """A point as the workflow names it: wildcards, hence texts."""
    return {"model": "tiny", "calib": calib, "method": method, "ratio": ratio, "k_max": k_max}


def made(x, chosen, *, metrics=("ppl", "acc"), settings=None, tokens=None):
    return Ablation("ablation-made", "Made up", list(x), list(metrics), chosen, settings or {}, tokens or {})


def read_back(frame):
    """A frame as the workflow reads it from CSV."""
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)), keep_default_na=False, na_values=[""])


def gathered(ablation, grid):
    return ablations.gather(read_back(summarise(grid)), read_back(tidy(grid)), ablation)


SIZES = {"small": 256, "kdp": 1024, "large": 2048}


def of_sizes():
    return [points.dense(), points.pruned("kdp", points.scores(25.0, 0.45, 0.65)),
            points.pruned("small", points.scores(60.0, 0.25, 0.45)),
            points.pruned("large", points.scores(24.0, 0.46, 0.66), share=0.15),
            points.pruned("other", points.scores(99.0, 0.1, 0.1))]


def sizes(metrics=("ppl", "acc")):
    return made(["kernel.features"], [key(name) for name in ("kdp", "small", "large")], metrics=metrics,
                settings={name: {"kernel.features": value} for name, value in SIZES.items()})


def test_an_option_of_the_variants_is_a_column():
    found = gathered(sizes(), of_sizes())
    assert found.axes == ["kernel.features"] and list(found.frame.method) == ["dense", "kdp", "small", "large"]
    assert found.frame["kernel.features"].tolist()[1:] == [1024, 256, 2048]
    assert math.isnan(found.frame["kernel.features"][0])
    assert found.frame.ppl.tolist() == pytest.approx([20, 25, 60, 24])
    assert found.frame.ppl_stderr.tolist() == pytest.approx([0.2, 0.25, 0.6, 0.24])


def test_points_stand_by_ratio_as_tables_are_grouped():
    chosen = [key(name, ratio=ratio) for name in ("kdp", "remove") for ratio in ("0.4", "0.2")]
    found = gathered(made(["ratio"], chosen), points.grid())
    assert list(zip(found.frame.method, found.frame.ratio, strict=True))[1:] == [
        ("kdp", 0.2), ("remove", 0.2), ("kdp", 0.4), ("remove", 0.4)]


def test_one_tasks_own_score_by_its_main_metric_or_by_name():
    found = gathered(sizes(["continuation", "continuation:acc", "text", "lastword:perplexity"]), of_sizes())
    assert found.frame.continuation.tolist() == pytest.approx([0.7, 0.65, 0.45, 0.66])
    assert found.frame["continuation_stderr"].tolist() == pytest.approx([0.01] * 4)
    assert found.frame["continuation:acc"].tolist() == pytest.approx([0.11] * 4)
    assert found.frame.text.tolist() == pytest.approx([20, 25, 60, 24])
    assert [found.columns[name].better for name in found.ablation.metrics] == [1, 1, -1, -1]
    assert (found.columns["continuation"].scale, found.columns["text"].scale) == (100, 1)


def test_accuracy_beside_the_first_point():
    found = gathered(sizes(["rp_reference"]), of_sizes())
    acc = (found.frame.acc / found.frame.acc[1] * 100).tolist()
    assert found.frame.rp_reference.tolist()[1:] == pytest.approx(acc[1:]) and acc[1] == pytest.approx(100)
    assert math.isnan(found.frame.rp_reference[0])
    assert found.frame.rp_reference_stderr[2] == pytest.approx(100 * found.frame.acc_stderr[2] / found.frame.acc[1])


def test_calibration_tokens():
    grid = [points.dense(), *(points.pruned("kdp", points.scores(ppl, 0.4, 0.6), calib=calib)
                              for calib, ppl in (("few", 40.0), ("news", 25.0)))]
    found = gathered(made(["tokens"], [key("kdp", "news"), key("kdp", "few")], tokens={"few": 500, "news": 4000}), grid)
    assert found.frame.tokens.tolist()[1:] == [4000, 500] and found.frame.ppl.tolist()[1:] == pytest.approx([25, 40])


def test_variants_that_are_lines_have_each_their_own_first_point():
    accs = {("kdp", "news"): 0.4, ("kdp", "few"): 0.2, ("linear", "news"): 0.5, ("linear", "few"): 0.4}
    grid = [points.dense(), *(points.pruned(variant, points.scores(25.0, acc, acc), calib=calib)
                              for (variant, calib), acc in accs.items())]
    chosen = [key(variant, calib) for calib in ("news", "few") for variant in ("kdp", "linear")]
    found = gathered(made(["tokens"], chosen, metrics=["rp_reference"], tokens={"few": 500, "news": 4000}), grid)
    assert found.frame.rp_reference.tolist()[1:] == pytest.approx([100, 100, 50, 80])


def test_of_several_options_a_variant_lies_where_it_differs_from_the_first():
    epochs = {"kdp": (10, 10), "short_1": (1, 10), "short_2": (10, 5), "both": (1, 1)}
    settings = {name: {"kernel.epochs": one, "inverse.epochs": two} for name, (one, two) in epochs.items()}
    ablation = made(["kernel.epochs", "inverse.epochs"], [key(name) for name in ("kdp", "short_1", "short_2")],
                    settings=settings)
    assert [ablations.lines_of(ablation, variant) for variant in ablations.variants_of(ablation)] == [
        ["kernel.epochs", "inverse.epochs"], ["kernel.epochs"], ["inverse.epochs"]]
    grid = [points.dense(), *(points.pruned(name, points.scores(30.0, 0.4, 0.6)) for name in epochs)]
    assert gathered(ablation, grid).axes == ["kernel.epochs", "inverse.epochs"]
    with pytest.raises(AblationError, match="variant both differs from kdp in more than one of"):
        gathered(ablation._replace(points=[key(name) for name in epochs]), grid)


def test_printed_with_every_error_and_only_what_varies():
    found = gathered(sizes(["ppl", "continuation"]), of_sizes())
    lines = ablations.render(found, "md").splitlines()
    assert lines[0] == "| Model | Target (%) | Method | Kernel size 2m | Removed (%) | Perplexity | continuation (%) |"
    assert lines[2] == "| tiny | – | dense | – | 0.0 | 20.00 ± 0.20 | 70.0 ± 1.0 |"
    assert lines[4] == "|  |  | small | 256 | 19.0 | 60.00 ± 0.60 | 45.0 ± 1.0 |"
    assert lines[5].endswith("| large | 2048 | 15.0 | **24.00** ± 0.24 | <u>66.0</u> ± 1.0 |")
    assert r"\caption{Made up}" in ablations.render(found, "tex")
    assert pd.read_csv(io.StringIO(ablations.render(found, "csv"))).shape == found.frame.shape


def test_blocks_are_printed_where_k_max_varies():
    grid = [points.dense(), points.pruned("kdp", points.scores(25.0, 0.4, 0.6), blocks=[(6, 8)]),
            points.pruned("kdp", points.scores(30.0, 0.4, 0.6), k_max=4, blocks=[(6, 9)])]
    lines = ablations.render(gathered(made(["k_max"], [key("kdp"), key("kdp", k_max="4")]), grid), "md").splitlines()
    assert "| K max |" in lines[0] and "| 3 | 19.0 | 6-8 |" in lines[3] and "| 4 | 19.0 | 6-9 |" in lines[4]


def test_options_that_are_no_numbers_are_names():
    settings = {"kdp": {"kernel.lift": "raw", "kernel.final_ols": True},
                "small": {"kernel.lift": "rms", "kernel.final_ols": True}}
    ablation = made(["kernel.lift"], [key("kdp"), key("small")], settings=settings)
    assert gathered(ablation, of_sizes()).frame["kernel.lift"].tolist()[1:] == ["raw", "rms"]
    assert "| rms |" in ablations.render(gathered(ablation, of_sizes()), "md")
    assert gathered(ablation._replace(x=["kernel.final_ols"]), of_sizes()).frame["kernel.final_ols"][1] == "True"


@pytest.mark.parametrize("change, words", [
    ({"points": []}, "ablation-made has no points"),
    ({"points": [key("kdp"), key("absent")], "x": ["variant"]}, "the summary lacks tiny/news/absent/0.2/3; run"),
    ({"metrics": ["beauty"]}, r"unknown metric 'beauty'; choose .*rp_reference, continuation, lastword, text"),
    ({"metrics": ["text:acc"]}, "task text has no metric 'acc'; it has ppl"),
    ({"x": ["kernel.rank"]}, "variant kdp does not set kernel.rank"),
    ({"x": ["kernel.features", "ratio"]}, "several axes must all be options"),
])
def test_refusals(change, words):
    with pytest.raises(AblationError, match=words):
        gathered(sizes()._replace(**change), of_sizes())
