"""LLM-Drop: scores by hooks on the whole model, the order, the ratio, and its limits."""
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods import METHODS
from kdp_core.methods._select import BlockError, as_drops
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

ADDING = {"llama": ("self_attn", "mlp"), "opt": ("self_attn", "fc2"),
          "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm")}

ATTN_DROP, MLP_DROP, JOINT_DROP = (METHODS[name].compose for name in ("attn_drop", "mlp_drop", "joint_drop"))


class Dense(NamedTuple):
    folder: Any
    model: Any
    hidden: Any


@pytest.fixture(scope="module", params=ADDING)
def dense(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = pico.lively(pico.model(request.param, layers=6))
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


def selection(ratio):
    return Selection([], [], "weights", ratio, ratio, 0.7, 3, [], 0)


def dropped(dense, method, ratio, **options):
    return method(dense.folder, dense.hidden, stored.tokens(), selection(ratio), **options)


@torch.no_grad()
def literal(model, ids_ST, gone=()):
    """Mean cosine of every sublayer from hooks on what it adds; what is gone adds zeros."""
    names = dict(zip(("attention", "mlp"), ADDING[model.config.model_type], strict=True))
    added, states = {}, {}

    def keep(unit):
        def hook(_, args, output):
            value = output[0] if isinstance(output, tuple) else output
            value = torch.zeros_like(value) if unit in gone else value
            added[unit] = value.view(*ids_ST.shape, -1).double()
            return (value, *output[1:]) if isinstance(output, tuple) else value
        return hook

    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        hooks += [layer.get_submodule(names[part]).register_forward_hook(keep((number, part))) for part in names]
        hooks.append(layer.register_forward_pre_hook(
            lambda _, args, kwargs, n=number: states.__setitem__(n, (args[0] if args else kwargs["hidden_states"])
                                                                 .double()), with_kwargs=True))
    model(ids_ST, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {}
    for number, x in states.items():
        y = x + added[number, "attention"]
        for part, one, other in (("attention", x, y), ("mlp", y, y + added[number, "mlp"])):
            found[number, part] = ((one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))).mean().item()
    return found


@pytest.mark.parametrize("parts, method", [(("attention",), ATTN_DROP), (("mlp",), MLP_DROP),
                                           (("attention", "mlp"), JOINT_DROP)])
def test_the_most_redundant_go_first(dense, parts, method):
    scores = {unit: value for unit, value in literal(dense.model, stored.tokens().ids_ST).items() if unit[1] in parts}
    found = dropped(dense, method, 0.1)
    order = [(row["layer"], row["part"]) for row in found.stats["order"]]
    assert order == sorted(scores, key=lambda unit: (-scores[unit], unit[0]))[:len(order)] and order
    assert [row["cosine"] for row in found.stats["order"]] == pytest.approx([scores[unit] for unit in order], abs=1e-5)


def test_one_shot_takes_what_the_extraction_saw_and_loads_no_weights(dense, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    half = literal(dense.model, stored.tokens().ids_ST[:8])
    row = dropped(dense, JOINT_DROP, 0.05, sequences=8).stats["order"][0]
    assert (row["layer"], row["part"]) == max(half, key=lambda unit: (half[unit], -unit[0]))
    assert row["cosine"] == pytest.approx(half[row["layer"], row["part"]], abs=1e-5)


def test_states_that_end_before_the_last_layer_are_refused(dense, tmp_path):
    hidden.extract(dense.model, stored.tokens(), tmp_path / "h.zarr", layers=[0, 4])
    few = dense._replace(hidden=hidden.read(tmp_path / "h.zarr"))
    with pytest.raises(FitError, match=r"has the sublayers of the first 4 of 6 layers; set hidden\.layers"):
        dropped(few, MLP_DROP, 0.1)


def test_iterative_scores_what_is_left_of_the_model(dense):
    ids_ST, gone = stored.tokens().ids_ST, []
    for row in dropped(dense, JOINT_DROP, 0.3, iterative=True).stats["order"]:
        scores = {unit: value for unit, value in literal(dense.model, ids_ST, gone).items() if unit not in gone}
        assert (row["layer"], row["part"]) == max(scores, key=lambda unit: (scores[unit], -unit[0]))
        assert row["cosine"] == pytest.approx(scores[row["layer"], row["part"]], abs=1e-5)
        gone.append((row["layer"], row["part"]))
    assert len(gone) > 2


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.2])
@pytest.mark.parametrize("method", [ATTN_DROP, MLP_DROP, JOINT_DROP])
def test_the_folded_share_is_as_near_as_one_more_or_less_allows(dense, tmp_path, method, ratio):
    found, rows = dropped(dense, method, ratio), None
    rows = found.stats["order"]
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    assert facts.params_removed == pytest.approx(rows[-1]["share"])
    shares = [row["share"] for row in dropped(dense, method, ratio, match="reach").stats["order"]]
    assert shares[-1] >= ratio and all(share < ratio for share in shares[:-1])
    nearest = min([*shares], key=lambda share: abs(share - ratio))
    assert abs(facts.params_removed - ratio) <= abs(nearest - ratio) + 1e-12


def test_a_layer_that_loses_both_parts_goes_whole():
    assert as_drops([(3, "mlp"), (1, "attention"), (3, "attention")]) == [(1, "attention"), (3, "whole")]


def test_refusals(dense):
    with pytest.raises(BlockError, match=r"ratio 0\.6 is too high: all that attn_drop can remove is 0\.\d+ of all"):
        dropped(dense, ATTN_DROP, 0.6)
    with pytest.raises(OptionError, match="match is 'exact'; choose one of nearest, reach"):
        dropped(dense, MLP_DROP, 0.1, match="exact")
    with pytest.raises(FitError, match=r"compose\.sequences 17: there are 16"):
        dropped(dense, MLP_DROP, 0.1, sequences=17)


def test_a_model_whose_norms_follow_the_sum_is_refused(tmp_path):
    """As OPT-350M."""
    model = pico.model("opt", layers=2)
    model.config.do_layer_norm_before = False
    model.save_pretrained(tmp_path / "model")
    hidden.extract(checkpoints.load_model(tmp_path / "model"), stored.tokens(), tmp_path / "h.zarr")
    with pytest.raises(FitError, match="attn_drop cannot remove parts of this opt model"):
        ATTN_DROP(tmp_path / "model", hidden.read(tmp_path / "h.zarr"), stored.tokens(), selection(0.1))
