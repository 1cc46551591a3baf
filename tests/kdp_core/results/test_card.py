"""The model card is written from the records: what it says is what they hold, and nothing of the machine."""
import re

import pytest
import yaml

from kdp_core.base.measurements import Score, Scores
from kdp_core.base.records import ModelFacts, PrunedFacts
from kdp_core.results.card import PLUS_MINUS, Made, Measured, card, table
from tests.kdp_core import points

FACTS = ModelFacts("llama", 12, 64, 384, 10**8, [10**6] * 12, 1, "hf:someone/small-llama@main", "ab" * 32, "apache-2.0")
PRUNED = PrunedFacts("kdp", 12, 3, 10**8, 76 * 10**6, 10**6, 0.24, [(5, 8)], [], 0)
MADE = Made("kdp", "kdp_wide", 0.25, "    kdp prune hf:someone/small-llama@main --out DIR",
            {"versions": {"torch": "2.13.0"}, "git": {"commit": "c0ffee", "changed": True},
             "seeds": {"calibration news": 7}, "inputs": {"calibration tokens": "cd" * 32}}, False)


def scores(*given):
    return Scores([Score(task, metric, value, stderr, 40, metric != "ppl", "share") for task, metric, value, stderr
                   in given], 1.0, {})


MEASURED = Measured(scores(("lee", "ppl", 20.0, 0.5), ("piqa", "acc", 0.6, 0.05)),
                    scores(("lee", "ppl", 31.5, 1.25), ("piqa", "acc", 0.55, 0.05), ("arc", "acc", 0.25, None)),
                    points.efficiency(0.2))


def entries(text):
    """The block of YAML that the hub reads."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def cells(text, name):
    """The cells of the line of a table that begins with this name."""
    line, = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.replace(PLUS_MINUS, " ± ").strip("|").split("|")]


def test_a_card_says_what_the_records_hold():
    text = card(FACTS, PRUNED, MADE, MEASURED)
    assert entries(text) == {"library_name": "transformers", "pipeline_tag": "text-generation",
                             "tags": ["pruned", "kdp", "kdp"], "base_model": "someone/small-llama",
                             "base_model_relation": "finetune", "license": "apache-2.0"}
    assert "# someone/small-llama without 24.0% of its parameters" in text
    assert cells(text, "parameters")[1].startswith("76,000,000, of which 1,000,000 were added; 100,000,000")
    assert cells(text, "layers")[1] == "9 of 12"
    assert cells(text, "lee") == ["lee", "ppl (lower is better)", "20 ± 0.5", "31.5 ± 1.2", "40"]
    assert cells(text, "arc")[2:4] == ["", "0.25"]
    assert cells(text, "seed of calibration news")[1] == "7" and cells(text, "torch")[1] == "2.13.0"
    assert "`c0ffee`, with changes" in text and "cd" * 32 in text and MADE.again in text
    assert "trust_remote_code=True" in text and "1.25 times as fast" in text


def test_what_is_not_known_is_said():
    text = card(FACTS._replace(licence="", source="model.gguf"), PRUNED, MADE._replace(stock=True), None)
    assert "name no licence" in text and "has not been scored" in text and "trust_remote_code" not in text
    assert not {"license", "base_model"} & set(entries(text))


@pytest.mark.parametrize("place", ["/home/someone/models/m.gguf", "~/models/m.gguf", "../someone/m.gguf",
                                   "C:\\Users\\someone\\m.gguf"])
def test_a_card_has_no_path_of_a_user(place):
    made = MADE._replace(provenance={**MADE.provenance, "versions": {"file": place}})
    text = card(FACTS._replace(source=place), PRUNED, made._replace(again=place), MEASURED)
    assert "someone/" not in text and "someone\\" not in text and "m.gguf" in text


def test_a_cell_keeps_its_line():
    assert table(["a"], [["x|y\nz"]]).splitlines() == ["| a |", "| --- |", "| x\\|y z |"]
