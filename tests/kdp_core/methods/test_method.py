"""A method is one file: it is found, checked, run and folded without any other edit."""
import sys

import jsonschema
import pytest

from kdp_core import methods
from kdp_core.methods import GROUPS, METHODS, MethodError, find, method_schema, one_device
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, decoder_layers
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.similarity import similarity
from tests import pico
from tests.kdp_core import stored

FILE = '''"""Every second layer is removed."""
from kdp_core.base.records import Search
from kdp_core.methods._method import Method
from kdp_core.methods._select import in_order

def search(dense, hidden, tokens, facts, *, k_max: int, first: int = 1) -> Search:
    """first: the first layer to remove."""
    order = list(range(first, facts.layers, 2))
    return Search(order, [0.0] * len(order), "parity", k_max, {}, 0, {})

METHODS = (Method("every_second", "a test", "layers removed", in_order, search=search),)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that the package searches beside its own."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("kdp_core.methods.zz_")]:
        del sys.modules[name]


def test_a_new_file_is_a_new_method(folder, tmp_path, monkeypatch):
    (folder / "zz_second.py").write_text(FILE, encoding="utf-8")
    found = find()
    assert set(found) == {*METHODS, "every_second"}
    assert [name for name in found if name != "every_second"] == list(METHODS)
    monkeypatch.setattr(methods, "METHODS", found)
    schema = method_schema("every_second")
    jsonschema.validate({"search": {"first": 2}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"search": {"second": 2}}, schema)
    assert schema["x-group"] == "layers removed" and schema["x-one-device"] == "search"

    dense = pico.save(tmp_path / "dense", "llama")
    model = checkpoints.load_model(dense)
    hidden.extract(model, stored.tokens(), tmp_path / "hidden.zarr")
    states, facts = hidden.read(tmp_path / "hidden.zarr"), checkpoints.facts(model, source="pico", sha256="")
    plan = methods.run("every_second", dense, states, stored.tokens(), similarity(states, tokens=256, batch=64), facts,
                       ratio=0.25, k_max=3, options={"search": {"first": 2}})
    removed = fold(plan, dense, tmp_path / "pruned").layers_removed
    assert [layer for layer, part in plan.drop] == list(range(2, 2 + 2 * removed, 2)) and removed >= 2
    assert len(decoder_layers(checkpoints.load_model(tmp_path / "pruned"))) == facts.layers - removed


def test_two_methods_of_one_name_are_refused(folder):
    (folder / "zz_again.py").write_text(FILE.replace("every_second", "sleb"), encoding="utf-8")
    with pytest.raises(MethodError, match="two methods are called 'sleb'"):
        find()


def test_a_file_without_methods_is_named(folder):
    (folder / "zz_empty.py").write_text('"""Nothing."""\n', encoding="utf-8")
    with pytest.raises(MethodError, match="zz_empty has no METHODS"):
        find()


def test_methods_come_by_group_then_by_file():
    groups = [list(GROUPS).index(method.group) for method in METHODS.values()]
    assert groups == sorted(groups)
    assert [name for name, method in METHODS.items() if method.group == "layers merged"] == ["laco", "sliding_merge"]


def test_what_runs_the_whole_model_on_one_device():
    expected = {"remove": "", "kdp": "", "shortgpt": "", "block_drop": "", "lorp": "", "sleb": "search",
                "shortened_magnitude": "search", "attn_drop": "compose", "kdp_residual": "compose"}
    assert {name: one_device(METHODS[name]) for name in expected} == expected


def test_families_that_are_refused():
    refused = {name: {family for family, record in FAMILIES.items() if method.refuses(record)}
               for name, method in METHODS.items()}
    for family in ("gemma2", "gemma3_text"):
        assert {name for name, families in refused.items() if family in families} == {
            "replaceme_lstsq", "replaceme_cosine", "slicegpt"}
    assert {name for name, families in refused.items() if "gpt_neox" in families} == {
        "attn_drop", "fragility_parts", "joint_drop", "kdp_narrow", "mlp_drop", "slicegpt"}
    assert refused["llm_pruner"] == {"olmo2"} and {name for name in refused if "gpt2" in refused[name]} == {"slicegpt"}
    assert not any(refused[name] for name in ("kdp", "remove", "wanda"))
