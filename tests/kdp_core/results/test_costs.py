"""Costs of the paper's six models against the paper's own figures, public parameter counts and weight shapes."""
import math

import pytest

from kdp_core.results import costs


@pytest.fixture(scope="module")
def table_10():
    return costs.table_10()


@pytest.fixture(scope="module")
def table_12():
    return costs.table_12()


def row(frame, model, **keys):
    found = frame[frame["model"] == model]
    for name, value in keys.items():
        found = found[found[name] == value]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize("model, params", [
    ("LLaMA-2-7B", 6_738_415_616), ("LLaMA-2-13B", 13_015_864_320), ("LLaMA-3-8B", 8_030_261_248),
    ("LLaMA-3.1-8B", 8_030_261_248), ("OPT-2.7B", 2_651_596_800), ("OPT-6.7B", 6_658_473_984)])
def test_parameters_are_those_of_the_published_checkpoints(model, params):
    assert costs.size(model).params == params


def test_counts_of_a_llama_layer_by_its_shapes():
    counts = costs.size("LLaMA-3-8B")
    attention, mlp = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336
    assert counts.layer_macs == attention + mlp and counts.layer_params == attention + mlp + 2 * 4096
    assert counts.macs == 32 * (attention + mlp) + 4096 * 128256
    # projection, then 1,024 features to 2,000 to the state
    assert counts.fold_macs == 4096 * 512 + 1024 * 2000 + 2000 * 4096
    assert counts.fold_params == counts.fold_macs + 512 + 2000 + 4096


@pytest.mark.parametrize("model, method", [
    ("LLaMA-2-7B", "dense"), ("LLaMA-2-7B", "SLEB"), ("LLaMA-2-7B", "ShortGPT"), ("LLaMA-2-7B", "Streamline"),
    ("LLaMA-2-7B", "SliceGPT"), ("LLaMA-2-13B", "dense"), ("LLaMA-2-13B", "SLEB"), ("LLaMA-2-13B", "ShortGPT"),
    ("LLaMA-2-13B", "SliceGPT")])
def test_these_rows_of_table_10_come_out_to_the_digit(table_10, model, method):
    found = row(table_10, model, method=method)
    assert round(found["flops_giga"], 2) == found["printed_flops_giga"]


def test_the_rows_that_do_not_are_explained(table_10):
    kdp = row(table_10, "LLaMA-2-7B", method="KDP")
    assert kdp["flops_giga"] == pytest.approx(650.06, abs=0.04) and "four blocks" in kdp["explanation"]
    larger = row(table_10, "LLaMA-2-13B", method="KDP")
    assert larger["flops_giga"] == pytest.approx(1255.99, abs=0.09)
    odd = row(table_10, "LLaMA-2-13B", method="Streamline")
    # a layer is 2.5 % of the model: nothing is nearer than 0.7 %
    assert odd["off_percent"] == pytest.approx(-0.746, abs=0.001) and "whole number" in odd["explanation"]
    alike = row(table_10, "LLaMA-2-7B", method="KDP, counted alike")
    fold = 4096 * 512 + 1024 * 2000 + 2000 * 4096
    assert alike["flops_giga"] == pytest.approx(845.7059 - 128e-9 * (10 * 202_375_168 - 5 * fold), abs=1e-3)
    assert math.isnan(alike["printed_flops_giga"])


def test_what_the_notes_say_is_what_the_numbers_say(table_10):
    seven = costs.size("LLaMA-2-7B")
    share = seven.layer_params / seven.params
    assert [round(100 * n * share, 1) for n in (7, 6)] == [21.0, 18.0]
    assert round(100 * 9 * share, 1) == 27.0
    # listed change: a speed-up less one, or a reduction
    for method in ("SLEB", "ShortGPT"):
        found = row(table_10, "LLaMA-2-7B", method=method)
        assert round(100 * (found["speedup"] - 1), 2) == found["printed_change_percent"]
    assert round(row(table_10, "LLaMA-2-7B", method="Streamline")["reduction_percent"], 2) == 30.63
    assert round(row(table_10, "LLaMA-2-7B", method="SliceGPT")["removed_percent"]) == 15
    assert round(row(table_10, "LLaMA-2-7B", method="KDP")["removed_percent"], 1) == 23.3
    assert round(row(table_10, "LLaMA-2-7B", method="KDP, counted alike")["removed_percent"]) == 29
    five = 845.7059 - 128e-9 * (10 * seven.layer_macs - 5 * seven.fold_printed)
    assert round(five, 1) == 601.1 and "601.1 G" in costs.NOTES_10["h"]
    thirteen = costs.size("LLaMA-2-13B")
    assert round(100 * 9 * thirteen.layer_params / thirteen.params, 1) == 21.9 and "21.9 %" in costs.NOTES_10["c"]


def test_table_12(table_12):
    for model in costs.TABLE_12:
        for k in (2, 3):
            found = row(table_12, model, k=k)
            # listed FLOPs are cut after two digits
            assert math.floor(100 * found["block_giga"]) / 100 == pytest.approx(found["printed_block_giga"])
            assert round(found["block_millions"], 2) == found["printed_block_millions"]
            assert found["kept_percent"] < found["printed_kept_percent"]
    small, large = (row(table_12, model, k=2) for model in costs.TABLE_12)
    assert round(small["fold_giga_paper_count"], 2) == 2.89 and round(large["fold_giga_paper_count"], 1) == 3.4
    # what the listed shares imply
    assert [round(100 * 2.897 / value, 2) for value in (51.808, 77.712)] == [5.59, 3.73]
    assert [round(100 * 3.399 / value, 2) for value in (81.202, 121.803)] == [4.19, 2.79]
    for width, listed, rank in ((4096, 12.40, 269), (5120, 14.83, 289)):
        # appendix I: d (1 + r) + (2m)^2 + 1 + H (2m + d + 1) + d
        rest = 1024 ** 2 + 1 + 2000 * (1024 + width + 1) + width
        assert round((listed * 1e6 - rest) / width - 1) == rank and f"{rank} on" in costs.NOTE_12


def test_every_model_has_its_rows(table_10, table_12):
    assert list(dict.fromkeys(table_10["model"])) == list(dict.fromkeys(table_12["model"])) == list(costs.MODELS)
    assert (table_10.groupby("model")["speedup"].first() == 1).all() and len(table_12) == 12
    listed = table_10[table_10["printed_ratio_percent"].notna()]
    assert len(listed) == len(costs.TABLE_10)
    assert row(table_10, "LLaMA-3-8B", method="KDP, counted alike")["printed_ratio_percent"] == 25.8


@pytest.mark.parametrize("number", [10, 12])
def test_print(table_10, table_12, number):
    frame = table_10 if number == 10 else table_12
    lines = costs.render(frame, number, "md").splitlines()
    assert len({line.count("|") for line in lines[:len(frame) + 2]}) == 1 and lines[-1].startswith(("a: ", "The"))
    text = costs.render(frame, number, "tex")
    assert text.count(r"\begin{") == text.count(r"\end{") and "nan" not in text and "%" in text.splitlines()[0]
    assert not any(line.replace(r"\%", "").count("%") for line in text.splitlines() if line.endswith(r"\\"))
    assert costs.render(frame, number, "csv").count("\n") == len(frame) + 1
