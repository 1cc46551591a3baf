"""Every method on every family. What to expect of a method is derived from its record."""
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from safetensors import safe_open

from kdp_core import methods
from kdp_core.base import texts
from kdp_core.base.records import Composed, Module, Plan, Selection
from kdp_core.methods import (
    METHODS,
    MethodError,
    arguments,
    method_of,
    method_schema,
    option_schema,
    settings,
)
from kdp_core.methods._method import no_family, no_params
from kdp_core.methods._select import as_many, no_layer
from kdp_core.methods.kdp_narrow.budget import by_budget
from kdp_core.methods.searching.sets import as_many_replaced
from kdp_core.model import checkpoints, folded
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.stand_ins import MODULES
from kdp_core.prune.finetune import finetune
from kdp_core.prune.fold import fold
from tests import pico
from tests.kdp_core.methods.numbers import (
    IDS_ST,
    K_MAX,
    RATIO,
    Dense,
    expected,
    logits,
    numbers_of,
    prepared,
    recorded,
    run,
)

RECORDED = recorded()
REPRESENTATIVES = pico.FAMILIES
"""Families for what a method or fold does in the same way for all: tied and untied heads, both kinds of norms, gated
and plain MLPs, separate biases. Every family goes through every test of plan, counts, loading and generating."""
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def stand_ins(method):
    """Whether something new takes the place of each block."""
    return method.module_params is not no_params and not method.keeps


def fit_chooses(method):
    """Whether the selection names no blocks and the fit decides what is removed."""
    return method.select in (as_many, as_many_replaced, no_layer, by_budget)


def zeros(method):
    """Whether weights are set to zero and the shape of the model stays."""
    return method.group == "weights set to zero"


class Pruned(NamedTuple):
    """What came of a method."""
    dense: Dense
    plan: Any
    selection: Any
    facts: Any
    folder: Any


@pytest.fixture(scope="module", params=pico.EVERY)
def dense(request, tmp_path_factory):
    return prepared(request.param, tmp_path_factory.mktemp(request.param))


def skip_alike(dense):
    if dense.facts.family not in REPRESENTATIVES:
        pytest.skip("the same as in the families that represent it")


def skip_refused(name, dense):
    if METHODS[name].refuses(family_of(dense.facts.family)):
        pytest.skip("refused, which a test of its own checks")


OUTCOMES: dict[tuple[str, str], tuple[Any, Any]] = {}
"""(family, method) -> its plan and its selection, so that tests that change neither share one run."""


def outcome(name, dense):
    """The plan and the selection of one run of a method on a family."""
    if (key := (dense.facts.family, name)) not in OUTCOMES:
        made = {}
        plan = run(name, dense, keep=lambda record, make: made.setdefault(record, make()))
        OUTCOMES[key] = plan, made["plan"]
    return OUTCOMES[key]


@pytest.fixture(scope="module", params=METHODS)
def pruned(request, dense, tmp_path_factory):
    skip_refused(request.param, dense)
    (plan, selection), folder = outcome(request.param, dense), tmp_path_factory.mktemp("pruned") / "checkpoint"
    return Pruned(dense, plan, selection, fold(plan, dense.folder, folder), folder)


@pytest.fixture(scope="module")
def loaded(pruned):
    """The pruned model; tests must not change it."""
    return checkpoints.load_model(pruned.folder)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.refuses is not no_family])
def test_what_cannot_be_done_is_refused_by_name_before_any_work(dense, name, monkeypatch):
    if not METHODS[name].refuses(family_of(dense.facts.family)):
        pytest.skip("not refused")
    monkeypatch.setattr(checkpoints, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=dense.facts.family):
        run(name, dense)


def test_plan_drops_the_selected_blocks_and_fills_each(pruned):
    dropped = [(layer, "whole") for start, stop in pruned.selection.blocks for layer in range(start, stop)]
    method = METHODS[pruned.plan.method]
    if fit_chooses(method):
        assert not dropped and (pruned.plan.drop or pruned.plan.tensors)
    else:
        assert pruned.plan.drop == dropped[method.keeps:] and dropped
    assert [module.block for module in pruned.plan.modules] == \
        (pruned.selection.blocks if stand_ins(method) else [])
    for module in pruned.plan.modules:
        assert set(MODULES[module.kind](**module.options).state_dict()) == set(module.tensors)
        assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in module.tensors.values())


def test_ratio_and_parameters_are_as_reported(pruned):
    facts, count, method = pruned.facts, len(pruned.selection.blocks), METHODS[pruned.plan.method]
    with safe_open(pruned.folder / "model.safetensors", framework="pt") as file:
        stored_params = sum(file.get_tensor(name).numel() for name in file.keys())
    assert facts.params_after == stored_params and facts.params_before == pruned.dense.facts.params_total
    assert facts.params_removed == pytest.approx(1 - (stored_params - facts.params_zeroed) / facts.params_before)
    assert bool(facts.params_zeroed) == zeros(method)
    assert facts.params_added == (count * method.module_params(pruned.dense.facts, method.example)
                                   if stand_ins(method) else 0)
    assert facts.layers_removed == len(whole_layers(pruned.plan))
    if fit_chooses(method):
        assert abs(facts.params_removed - pruned.selection.ratio_planned) < 0.04, "a layer here is a tenth of the model"
    else:
        assert facts.params_removed == pytest.approx(pruned.selection.ratio_planned)
        # neighbours without stand-ins are one run
        assert layers_in(facts.blocks) == whole_layers(pruned.plan)
        assert whole_layers(pruned.plan) == layers_in(pruned.selection.blocks)[method.keeps:]
    assert abs(facts.params_removed - RATIO) < 0.12


def layers_in(blocks):
    return [layer for start, stop in blocks for layer in range(start, stop)]


def whole_layers(plan):
    return [layer for layer, part in plan.drop if part == "whole"]


def test_checkpoint_loads_computes_and_generates_alike_with_cache(pruned, loaded):
    assert logits(loaded).isfinite().all()
    assert len(decoder_layers(loaded)) == 10 - len(whole_layers(pruned.plan))
    runs = [loaded.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=8, min_new_tokens=8,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)
    assert checkpoints.load_tokenizer(pruned.folder).decode(runs[0][0])


def test_checkpoint_saves_and_reloads_with_the_same_bits(pruned, loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(checkpoints.load_model(tmp_path / "again")), logits(loaded))
    if family_of(loaded).in_files:
        # transformers writes the names of its old files, fold those of the module
        return
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (pruned.folder / "model.safetensors").read_bytes()


def test_checkpoint_holds_no_pickle(pruned):
    skip_alike(pruned.dense)
    for path in pruned.folder.iterdir():
        assert path.suffix in (".json", ".safetensors", ".py", ".jinja", ".txt", ".model"), path
        assert not path.read_bytes().startswith(PICKLED), path


def test_checkpoint_can_be_fine_tuned(pruned, loaded, tmp_path):
    """Its fine-tuned variant, by the one stage that all methods share; one tied and one separate head are enough."""
    if pruned.dense.facts.family not in ("llama", "qwen3"):
        pytest.skip("another family, same heads")
    facts, record = finetune(pruned.dense.folder, pruned.folder, tmp_path / "tuned", pruned.dense.tokens, pruned.facts,
                             rank=2, lr=0.005, epochs=1, kl_weight=1.0, heldout=0.2)
    model = checkpoints.load_model(tmp_path / "tuned")
    assert facts.params_after == model.num_parameters() and logits(model).isfinite().all()
    assert facts.params_zeroed == pruned.facts.params_zeroed
    assert record.epoch == min(record.curve, key=lambda epoch: epoch["heldout_kl_nats"])["epoch"]
    assert torch.equal(logits(model), logits(loaded)) == (record.epoch == 0)


def test_the_numbers_are_those_recorded(pruned, loaded):
    """What is removed is the same, and the logits differ by a part in a thousand at most, as processors round."""
    name, family = pruned.plan.method, pruned.dense.facts.family
    if name not in RECORDED.get(family, {}):
        pytest.skip("no numbers are recorded for it, which a test of its own finds")
    kept, found = RECORDED[family][name], numbers_of(pruned.plan, pruned.facts, loaded)
    assert (found["drop"], found["params_after"]) == (kept["drop"], kept["params_after"])
    assert found["params_removed"] == pytest.approx(kept["params_removed"])
    assert found["logits_size"] == pytest.approx(kept["logits_size"], rel=1e-3)
    assert found["logits_sum"] == pytest.approx(kept["logits_sum"], abs=1e-3 * kept["logits_size"])


def test_numbers_are_recorded_of_every_method_on_every_family_that_it_takes():
    """`python -m tests.kdp_core.methods.numbers` records those that are missing."""
    assert {(family, name) for family, mine in RECORDED.items() for name in mine} == expected()


def test_same_bits_twice(pruned):
    skip_alike(pruned.dense)
    again = run(pruned.plan.method, pruned.dense)
    assert again.drop == pruned.plan.drop and set(again.tensors) == set(pruned.plan.tensors)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in pruned.plan.tensors.items())
    for module, other in zip(pruned.plan.modules, again.modules, strict=True):
        assert (module.block, module.kind, module.options) == (other.block, other.kind, other.options)
        assert set(module.tensors) == set(other.tensors)
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in module.tensors.items())


@pytest.mark.parametrize("name", ["kdp", "kdp_residual"])
def test_plan_does_not_touch_torchs_own_generator(dense, name):
    skip_alike(dense)
    before = torch.random.get_rng_state()
    run(name, dense)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["linear", "linear_sequential", "linear_prefix", "kdp_residual"])
def test_fitted_stand_ins_come_closer_to_the_model_than_nothing_for_the_same_blocks(dense, tmp_path, name):
    """On text that no fit has seen. What stands in for neurons depends on the family, the linear parts do not."""
    if name != "kdp_residual":
        skip_alike(dense)
    plan, _ = outcome(name, dense)
    fold(plan, dense.folder, tmp_path / "filled")
    fold(plan._replace(modules=[]), dense.folder, tmp_path / "empty")
    tokens = texts.pack(pico.tokenizer(), [texts.Part("other", pico.documents(20, seed=9), 8)], length=24, seed=0)
    model = checkpoints.load_model(dense.folder)
    with torch.no_grad():
        expected = model(tokens.ids_ST).logits
        filled, empty = ((checkpoints.load_model(tmp_path / which)(tokens.ids_ST).logits - expected).norm()
                         for which in ("filled", "empty"))
    assert filled < 0.95 * empty


# options

FUNCTIONS = sorted({function for row in METHODS.values() for function in methods.parts(row).values()},
                   key=lambda function: (function.__module__, function.__name__))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_every_option_has_a_type_a_default_and_a_description(function):
    schema, defaults = option_schema(function), settings(function, {})
    assert set(schema["properties"]) == set(arguments(function)) == set(defaults)
    for name, words in schema["properties"].items():
        kinds = words.get("anyOf", [words])
        assert {kind["type"] for kind in kinds} <= {"integer", "number", "string", "boolean", "array", "null"}, name
        assert len(words["description"]) > 10 and words["description"][-1] == ".", name
        assert defaults[name] is not inspect.Parameter.empty, name
    jsonschema.validate(defaults, schema)
    assert not set(arguments(function)) & set(methods.GRID_ARGUMENTS)


@pytest.mark.parametrize("name", METHODS)
def test_schema_of_a_method_takes_its_case_and_refuses_the_rest(name):
    schema = method_schema(name)
    assert set(schema["properties"]) == {"block", *METHODS[name].steps,
                                         *(key for key in ("search", "compose") if getattr(METHODS[name], key))}
    jsonschema.validate(METHODS[name].example, schema)
    jsonschema.validate({"block": {"sized_as": "kdp"}}, schema)
    for wrong in ({"blok": {}}, {"block": {"protekt": 0.2}}, {"block": {"sized_as": 0.2}}, {"block": {"ratio": 0.2}},
                  *({part: {"colour": 1}} for part in methods.parts(METHODS[name]))):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_settings_are_defaults_overridden_by_what_is_given():
    fit = METHODS["kdp"].steps["kernel"]
    defaults = settings(fit, {})
    assert settings(fit, {"features": 64, "lr": 0.5}) == defaults | {"features": 64, "lr": 0.5}
    assert defaults["features"] == 1024 and defaults["lr"] == 0.01 and defaults["patience"] == 3
    with pytest.raises(MethodError, match=r"'gama' is unknown to kdp_core\.methods\.kdp\.kernel\.fit; it knows fea"):
        settings(fit, {"gama": 1})


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(MethodError, match="'prune' is unknown; choose one of angular, deepest, remove, lorp"):
        method_of("prune")


def test_steps_one_by_one_are_the_whole_method(dense):
    skip_alike(dense)
    (whole, _), fitted = outcome("kdp", dense), {}
    for module in whole.modules:
        fitted[module.block] = []
        for step, options in METHODS["kdp"].example.items():
            record = methods.fit_step("kdp", step, dense.hidden, module.block, fitted[module.block], **options)
            fitted[module.block].append(record)
    selection = METHODS["kdp"].select(dense.similarity, dense.facts, ratio=RATIO, k_max=K_MAX, module_params=0)
    again = methods.plan("kdp", selection._replace(blocks=[module.block for module in whole.modules]), fitted)
    assert again.drop == whole.drop
    for module, other in zip(whole.modules, again.modules, strict=True):
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in module.tensors.items())


@pytest.mark.parametrize("name, options, message", [
    ("linear", {"fit": {"rigde": 1.0}}, r"'rigde' is unknown to kdp_core\.methods\.kdp\.linear\.direct; it knows r"),
    ("remove", {"block": {"protekt": 0.1}}, r"'protekt' is unknown to kdp_core\.methods\._select\.most_similar"),
    ("kdp", {"kernl": {}}, "method kdp has no part 'kernl'; it has block, kernel, inverse"),
    ("kdp_residual", {"compose": {"entrys": 8}}, r"'entrys' is unknown to .*kdp_residual\.compose\.compose; it knows"),
    ("kdp_residual", {"search": {"k_max": 3}}, r"'k_max' is unknown to .*kdp_residual\.search\.by_divergence"),
    ("kdp_residual", {"fit": {}}, "method kdp_residual has no part 'fit'; it has block, search, compose"),
    ("linear_prefix", {"compose": {"epochs": 1}}, r"'epochs' is unknown to .*kdp_residual\.compose\.compose_linear"),
    ("replaceme_lstsq", {"search": {}}, "method replaceme_lstsq has no part 'search'; it has block, compose"),
])
def test_unknown_options_are_refused_before_any_work(name, options, message):
    with pytest.raises(MethodError, match=message):
        methods.run(name, None, None, None, None, None, ratio=RATIO, k_max=K_MAX, options=options)


# methods that fit a grid point at once

def test_a_composed_plan_gets_its_name_and_the_layers_of_its_blocks():
    module = Module((4, 6), "affine", {"width": 2}, {})
    composed = Composed(Plan("other", [], [module], {"a": torch.zeros(1)}), [], [], {})
    selection = Selection([(1, 2), (4, 6)], [0.0, 0.0], "divergence", 0.2, 0.2, 0.5, 3, [], 3)
    plan = methods.whole("linear_prefix", selection, composed)
    assert plan.method == "linear_prefix" and plan.drop == [(1, "whole"), (4, "whole"), (5, "whole")]
    assert plan.modules == [module] and plan.tensors is composed.plan.tensors


def test_replaceme_adds_no_parameter_and_needs_no_code_of_ours(dense, tmp_path):
    skip_refused("replaceme_lstsq", dense)
    facts = fold(outcome("replaceme_lstsq", dense)[0], dense.folder, tmp_path / "out")
    assert facts.params_added == 0 and not (tmp_path / "out" / folded.FILE).exists()
    assert checkpoints.load_model(tmp_path / "out").config.model_type == dense.facts.family


def test_importing_the_table_loads_no_transformers():
    """Rules and most steps read it at every start; the models cost seconds."""
    code = "import sys, kdp_core.methods; sys.exit(any(name.startswith('transformers') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(methods.__file__).parents[2]).returncode == 0
