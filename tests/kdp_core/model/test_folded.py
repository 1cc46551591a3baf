"""Folded classes: what they inherit, and the file that defines them in a checkpoint."""
import ast
import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kdp_core.model import folded
from kdp_core.model.families import FAMILIES
from kdp_core.model.folded import FOLDED, joined, source
from tests import pico
from tests.kdp_core.model.random_weights import logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_folded_classes_are_registered_subclasses(family):
    config_class, model_class = FOLDED[family]
    base_config, base_model = (getattr(transformers, name) for name in (FAMILIES[family].config_class,
                                                                          FAMILIES[family].model_class))
    assert issubclass(config_class, base_config) and issubclass(model_class, base_model)
    assert config_class.model_type == f"kdp_{family}" and model_class.config_class is config_class
    assert isinstance(AutoConfig.for_model(config_class.model_type), config_class)
    assert AutoModelForCausalLM._model_mapping[config_class] is model_class
    assert getattr(folded, model_class.__name__) is model_class
    assert config_class().stand_ins == [] and config_class().widths == []


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_folded_class_without_stand_ins_is_the_base_class(family):
    base = pico.model(family)
    config_class, model_class = FOLDED[family]
    folded = model_class(config_class(**{key: value for key, value in base.config.to_dict().items()
                                         if key != "model_type"})).eval()
    folded.load_state_dict(base.state_dict())
    assert torch.equal(logits(folded), logits(base))


def test_a_copied_folded_model_computes_the_same():
    config_class, model_class = FOLDED["llama"]
    given = {key: value for key, value in pico.model("llama", layers=2).config.to_dict().items() if key != "model_type"}
    model = model_class(config_class(**given, sliced={"attention": [32] * 2, "mlp": [32] * 2, "final": 32})).eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / 8
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_the_file_of_a_checkpoint_needs_no_kdp_and_defines_each_name_once():
    tree = ast.parse(source())
    imported = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert {"torch", "transformers"} <= imported and "kdp_core" not in imported
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    stored = [target for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)
              for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names += [node.id for target in stored for node in ast.walk(target) if isinstance(node, ast.Name)]
    assert len(set(names)) == len(names) and {"Family", "RffMlp", "attach", "SlicedNorm", "FOLDED"} <= set(names)


def test_joined_modules_lose_the_imports_between_them():
    first = '"""One."""\nimport ast\n\nx = 1\n'
    second = '"""Two."""\nimport ast\nfrom kdp_core.one import (\n    x,\n)\n\ny = x\n'
    assert joined([first, second]) == '"""Two."""\nimport ast\n\n\nx = 1\n\n\ny = x\n'
