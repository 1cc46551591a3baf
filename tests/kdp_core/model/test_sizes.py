"""Sizes: arithmetic and count agree, whoever asks gets the same number, and a configuration needs no torch."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from kdp_core import methods
from kdp_core.base.records import Module, Plan, Search
from kdp_core.methods._select import in_order
from kdp_core.model import checkpoints
from kdp_core.model.families import FamilyError
from kdp_core.model.sizes import count_params, params_of
from kdp_core.prune import fold as fold_module
from kdp_core.prune.fold import fold
from kdp_core.score import efficiency
from kdp_core.study import planner
from tests import pico

ODD = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 12, "tie_word_embeddings": False}],
    "mistral": [{"head_dim": 4}, {"num_key_value_heads": 4, "tie_word_embeddings": True}],
    "qwen3": [{"attention_bias": True, "head_dim": 16}],
    "qwen2": [{"tie_word_embeddings": True}],
    "smollm3": [{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}],
    "gemma2": [{"attention_bias": True, "tie_word_embeddings": False}],
    "gemma3_text": [{"attention_bias": True, "tie_word_embeddings": False}],
    "olmo2": [{"attention_bias": True, "num_key_value_heads": 4}, {"tie_word_embeddings": True}],
    "phi3": [{"tie_word_embeddings": True}],
    "gpt_neox": [{"attention_bias": False, "tie_word_embeddings": True}],
    "gpt2": [{"n_inner": None}, {"tie_word_embeddings": False}],
    "opt": [{"enable_bias": False}, {"layer_norm_elementwise_affine": False}, {"_remove_final_layer_norm": True},
            {"word_embed_proj_dim": 16}, {"do_layer_norm_before": False}, {"tie_word_embeddings": False}],
}
"""Entries that change which parameters a model has."""


def counted(config):
    return count_params(checkpoints.on_meta(config))


@pytest.mark.parametrize("family, changed", [(family, changed) for family in pico.EVERY
                                             for changed in [{}, *ODD[family]]])
def test_arithmetic_is_the_count(family, changed, tmp_path):
    """Of a whole configuration, and of its file, which leaves out what is a default."""
    config = pico.model(family, layers=2).config
    config = type(config).from_dict({**config.to_dict(), **changed})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert params_of(config.to_dict()) == params_of(written) == counted(config)
    assert params_of({"model_type": "outer", "text_config": written}) == params_of(written)


@pytest.mark.parametrize("name", planner.PUBLISHED)
def test_arithmetic_is_the_count_of_published_models(name):
    assert params_of(planner.PUBLISHED[name]) == counted(AutoConfig.for_model(**planner.PUBLISHED[name]))


@pytest.mark.parametrize("family", pico.EVERY)
def test_defaults_of_the_record_are_those_of_the_class(family):
    """A file without the entries that the record gives a default for."""
    config = pico.model(family, layers=2).config
    left = {key: value for key, value in config.to_dict().items()
            if key not in {"tie_word_embeddings", "attention_bias", "mlp_bias", "num_key_value_heads", "head_dim",
                           "enable_bias", "max_position_embeddings", "n_positions", "n_inner"}}
    assert params_of(left) == counted(type(config).from_dict(left))


@pytest.mark.parametrize("family", pico.EVERY)
def test_whoever_asks_gets_the_same_number(family, tmp_path):
    dense = pico.save(tmp_path / "dense", family, layers=2)
    expected = sum(parameter.numel() for parameter in pico.model(family, layers=2).parameters())
    folded = fold(Plan("m", [(1, "whole")], [], {}), dense, tmp_path / "pruned")
    costs = efficiency.measure(dense, tmp_path / "pruned", tokens=4, decode_steps=1, repeats=1)
    facts = checkpoints.facts(checkpoints.load_model(dense), source="", sha256="")
    assert {params_of(json.loads((dense / "config.json").read_text())), folded.params_before, costs.params_dense,
            facts.params_total, planner.facts_of(str(dense), Path("nowhere")).params_total} == {expected}
    assert folded.params_after == costs.params < expected


REAL = {"Qwen/Qwen2.5-7B": 7_615_616_512, "meta-llama/Llama-3.1-8B": 8_030_261_248}
"""Parameters of real models, as their cards on the hub have them."""


@pytest.mark.parametrize("name, total", REAL.items())
def test_a_real_model_is_planned_counted_and_folded_without_its_weights(name, total):
    config, facts = AutoConfig.for_model(**planner.PUBLISHED[name]), planner.facts_of(f"hf:{name}", Path("nowhere"))
    assert total == params_of(planner.PUBLISHED[name]) == counted(config) == facts.params_total
    layer, = set(facts.params_per_layer)
    assert facts.params_total - facts.layers * layer == 2 * config.vocab_size * config.hidden_size + config.hidden_size

    search = Search(list(range(3, facts.layers - 1, 2)), [0.0] * len(range(3, facts.layers - 1, 2)), "", 3, {}, 0, {})
    selection = in_order(search, facts, ratio=0.2, k_max=3, module_params=0)
    plan = methods.plan("shortened_ppl", selection, {})
    removed = len(plan.drop)
    assert removed == round(0.2 * total / layer) and selection.ratio_planned == pytest.approx(removed * layer / total)
    width = facts.width
    affine = Module((3, 4), "affine", {"width": width}, {})
    for own, expected in ((plan, total - removed * layer),
                          (Plan("m", [(3, "whole")], [affine], {}), total - layer + width * width + width),
                          (Plan("m", [(3, "mlp")], [], {}), total - 3 * width * config.intermediate_size - width)):
        assert counted(fold_config(own, config)) == expected
    # without the last key-value head of every layer, its query heads and one channel
    kv, group, length = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, 128
    narrow = {"heads": (kv - 1) * group, "kv_heads": kv - 1, "intermediate": config.intermediate_size - 1}
    rows, bias = (group + 2) * length, name.startswith("Qwen")
    lost = rows * (width + bias) + group * length * width + 3 * width
    assert counted(fold_config(Plan("m", [], [], {}, shape={"widths": [narrow] * facts.layers}), config)) == \
        total - facts.layers * lost


def fold_config(plan, config):
    """The configuration of the pruned model, as fold writes it."""
    return fold_module._config(plan, config, fold_module._kept_layers(plan, config))


def test_unknown_family_is_named():
    with pytest.raises(FamilyError, match=r"family 'gpt_j' is not supported; choose a model of llama, "):
        params_of({"model_type": "gpt_j"})


def test_a_configuration_needs_neither_torch_nor_transformers():
    code = "import sys; from kdp_core.model.sizes import params_of; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "set()"
