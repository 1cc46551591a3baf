"""LLM-Pruner: worths by loops, which heads and channels go, the ratio, and what the narrow model computes."""
import itertools
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods._judge import judge_of, picked
from kdp_core.methods._select import BlockError
from kdp_core.methods.heads_channels import llm_pruner
from kdp_core.methods.heads_channels.llm_pruner import Sizes, between, cut_for
from kdp_core.methods.heads_channels.units import coupled_of, no_single_heads
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, decoder_layers, family_of, final_norm, matrix, trunk
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_macs, count_params
from kdp_core.prune.finetune import finetune
from kdp_core.prune.fold import fold
from kdp_core.score import diagnose
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

LAYERS, SEQUENCES, HEADS, CHANNELS, HEAD = 6, 5, 4, 64, 8
PRUNED = range(1, 5)
OPTIONS = {"sequences": SEQUENCES, "keep_first": 1, "keep_last": 1, "batch_sequences": 2}
TOKENS = stored.tokens()
IDS_ST = torch.arange(2, 42).view(2, 20)
"""Longer than the sliding windows."""
IMPORTANCES = get_args(llm_pruner.Importance)
KINDS = list(itertools.product(IMPORTANCES, get_args(llm_pruner.Grouping)))


class Dense(NamedTuple):
    folder: Any
    model: Any
    groups: int
    """Key-value heads."""


@pytest.fixture(scope="module", params=pico.DIFFERENT)
def dense(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    model.save_pretrained(folder)
    return Dense(folder, model, HEADS if request.param == "opt" else 2)


def composed(dense, ratio, **options):
    selection = Selection([], [], "weights", ratio, ratio, 0.7, 3, [], 0)
    return llm_pruner.compose(dense.folder, None, TOKENS, selection, **OPTIONS | options)


def folded(dense, ratio, out, **options):
    found = composed(dense, ratio, **options)
    return found, fold(found.plan, dense.folder, out), checkpoints.load_model(out)


def logits(model):
    with torch.no_grad():
        return model(IDS_ST, use_cache=False).logits


# what units are worth

def names(family):
    """Of a layer's tensors: (rows of query heads, of key-value heads, columns of heads), (rows, columns of the MLP)."""
    bias = family == "opt"
    attention = [[f"self_attn.{which}_proj.{kind}" for kind in ("weight", "bias")[:1 + bias]] for which in "qkv"]
    rows = [f"fc1.{kind}" for kind in ("weight", "bias")] if bias else ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return ((attention[0], attention[1] + attention[2], [f"self_attn.{'out' if bias else 'o'}_proj.weight"]),
            (rows, ["fc2.weight" if bias else "mlp.down_proj.weight"]))


def literal(model, ids_ST, importance, grouping, groups):
    """Worths of all units of every layer, from the gradients that transformers' own loss gives, weight by weight."""
    family, gradients = model.config.model_type, []
    for ids_T in ids_ST:
        model.zero_grad()
        model(ids_T[None], labels=ids_T[None]).loss.backward()
        gradients.append({name: parameter.grad.double().numpy() for name, parameter in model.named_parameters()})
    model.zero_grad()

    def parts(layer, name, axis):
        """What each row (or column) of a tensor is worth."""
        name = f"{family_of(family).prefix}{layer}.{name}"
        w, each = model.get_parameter(name).detach().double().numpy(), [one[name] for one in gradients]
        g, a = np.mean(each, axis=0), np.mean(np.square(each), axis=0)
        s = {"first": w * g, "second": w * w * a, "mix": w * g - 0.5 * w * w * a}[importance]
        lines = s.T if axis else s
        return [abs(line.sum()) if grouping == "vector" else np.abs(line).sum() for line in lines]

    (query, shared, out), (inner, outer) = names(family)
    found, each = {}, HEADS // groups
    for layer in range(LAYERS):
        attention, mlp = [0.0] * groups, [0.0] * CHANNELS
        for group in range(groups):
            for name, axis in [*((name, 0) for name in query), *((name, 1) for name in out)]:
                for head in range(group * each, group * each + each):  # consecutive query heads
                    attention[group] += sum(parts(layer, name, axis)[head * HEAD:(head + 1) * HEAD])
            for name in shared:
                attention[group] += sum(parts(layer, name, 0)[group * HEAD:(group + 1) * HEAD])
        for name, axis in [*((name, 0) for name in inner), *((name, 1) for name in outer)]:
            mlp = [total + one for total, one in zip(mlp, parts(layer, name, axis), strict=True)]
        found[layer] = attention, mlp
    return found


@pytest.mark.parametrize("importance, grouping", KINDS)
def test_worths_and_the_choice_are_those_of_loops_over_the_whole_models_gradients(dense, importance, grouping):
    ids_ST = picked(TOKENS, SEQUENCES, 0)
    expected = literal(dense.model, ids_ST, importance, grouping, dense.groups)
    judge = judge_of(checkpoints.load_model(dense.folder).requires_grad_(False), ids_ST, 2)
    coupled = coupled_of(judge.passes.layers[0], dense.model.config)
    units = {"attention": dense.groups, "mlp": CHANNELS}
    for layer, worths in llm_pruner.worths_by_layer(judge, PRUNED, coupled, units, importance, grouping):
        for part, values in zip(units, expected[layer], strict=True):
            # a sum of signs that cancel is as exact as its terms
            assert worths[part].tolist() == pytest.approx(values, rel=1e-4, abs=1e-6 * max(values))
    found = composed(dense, 0.25, importance=importance, grouping=grouping)
    assert [row["layer"] for row in found.stats["layers"]] == list(PRUNED)
    prefix, (_, outer) = family_of(dense.model).prefix, names(dense.model.config.model_type)
    for row in found.stats["layers"]:
        attention, mlp = expected[row["layer"]]
        assert row["groups"] == sorted(np.argsort(attention, kind="stable")[:len(row["groups"])]) and row["groups"]
        kept = np.sort(np.argsort(mlp, kind="stable")[row["channels"]:]).tolist()
        name = f"{prefix}{row['layer']}.{outer[1][0]}"
        assert torch.equal(found.plan.tensors[name], dense.model.get_parameter(name)[:, kept])


def test_a_key_value_head_goes_with_the_consecutive_query_heads_that_read_it(tmp_path):
    """Query heads 2 and 3 read key-value head 1; its part of layer 2 is made worthless, heads 1 and 3 do not."""
    model = pico.model("llama", layers=LAYERS)
    attention = decoder_layers(model)[2].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 2 * HEAD:] = 0
    model.save_pretrained(tmp_path / "model")
    dense = Dense(tmp_path / "model", model, 2)
    found = composed(dense, 0.3)
    assert found.stats["layers"][1] == {"layer": 2, "groups": [1], "channels": found.stats["layers"][1]["channels"]}
    prefix, tensors = "model.layers.2.self_attn.", found.plan.tensors
    assert torch.equal(tensors[f"{prefix}q_proj.weight"], attention.q_proj.weight[:2 * HEAD])
    assert torch.equal(tensors[f"{prefix}k_proj.weight"], attention.k_proj.weight[:HEAD])
    assert torch.equal(tensors[f"{prefix}o_proj.weight"], attention.o_proj.weight[:, :2 * HEAD])


def test_ties_go_to_the_lowest_number_and_values_that_are_not_finite_are_named():
    assert llm_pruner._kept(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2, 5).tolist() == [0, 3]
    with pytest.raises(FitError, match="importances of layer 5 are not finite; try dtype float32"):
        llm_pruner._kept(torch.tensor([1.0, float("nan")]), 1, 5)


# what the narrow model computes

@torch.no_grad()
def silenced(dense, found):
    """The dense model whose lost heads and channels add nothing: their columns of the output matrices are zero."""
    model, tensors = checkpoints.load_model(dense.folder), found.plan.tensors
    prefix, ((_, _, out), (_, outer)) = family_of(model).prefix, names(dense.model.config.model_type)
    for row in found.stats["layers"]:
        each = HEADS // dense.groups * HEAD
        lost = [column for group in row["groups"] for column in range(group * each, (group + 1) * each)]
        model.get_parameter(f"{prefix}{row['layer']}.{out[0]}")[:, lost] = 0
        down = model.get_parameter(name := f"{prefix}{row['layer']}.{outer[0]}")
        kept = {tuple(column) for column in tensors[name].T.tolist()}
        zeros = [number for number, column in enumerate(down.T.tolist()) if tuple(column) not in kept]
        assert len(zeros) == row["channels"]
        down[:, zeros] = 0
    return model


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_narrow_model_is_the_dense_one_without_what_these_heads_and_channels_add(dense, tmp_path, importance):
    found, _, model = folded(dense, 0.25, tmp_path / "out", importance=importance)
    torch.testing.assert_close(logits(model), logits(silenced(dense, found)), atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(dense.model)).abs().max() > 0.1


def test_a_ratio_of_nothing_is_the_dense_model(dense, tmp_path):
    found, facts, model = folded(dense, 0.0, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(dense.model), atol=1e-5, rtol=1e-5)
    assert facts.params_removed == found.stats["share"] == 0
    assert type(model).__name__.startswith("Folded")


def test_it_generates_alike_with_cache_and_saves_again(dense, tmp_path):
    _, _, model = folded(dense, 0.25, tmp_path / "out")
    runs = [model.generate(IDS_ST, attention_mask=torch.ones_like(IDS_ST), max_new_tokens=8, min_new_tokens=8,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(checkpoints.load_model(tmp_path / "again")), logits(model))


def test_states_parameters_and_multiply_adds_are_those_of_the_narrow_layers(dense, tmp_path):
    found, facts, model = folded(dense, 0.25, tmp_path / "out")
    gone = {name: dense.model.get_parameter(name).numel() - tensor.numel()
            for name, tensor in found.plan.tensors.items()}
    assert facts.params_before - facts.params_after == sum(gone.values()) == count_params(dense.model) \
        - count_params(model)
    assert facts.params_removed == pytest.approx(found.stats["share"])
    assert count_macs(dense.model) - count_macs(model) == \
        sum(count for name, count in gone.items() if not name.endswith("bias"))
    passes = Passes(model, IDS_ST.shape[1])
    first, last = hidden.boundary_states(model, IDS_ST, [0, LAYERS])
    torch.testing.assert_close(passes.run_batches(first, range(LAYERS), 2), last, atol=1e-5, rtol=1e-5)
    record = diagnose.compare(dense.model, model, IDS_ST, dropped=[])
    assert record.states == list(range(LAYERS + 1)) and record.error[:2] == [0, 0] and min(record.error[2:]) > 0
    assert record.kl_nats > 0


def test_it_is_stored_and_read_back(dense, tmp_path):
    found = composed(dense, 0.25)
    store.write(tmp_path / "composed.safetensors", found)
    back = store.read(tmp_path / "composed.safetensors")
    assert back.plan.shape == found.plan.shape and back.stats == found.stats
    assert back.plan.shape["widths"][0] == {"heads": HEADS, "kv_heads": dense.groups, "intermediate": CHANNELS}
    assert all(torch.equal(back.plan.tensors[name], tensor) for name, tensor in found.plan.tensors.items())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_can_be_fine_tuned(tmp_path, family):
    """A tied head gets an adapter, one of its own a change; both beside the narrow layers."""
    pico.save(tmp_path / "dense", family, layers=LAYERS)
    dense = Dense(tmp_path / "dense", None, 2)
    _, facts, pruned = folded(dense, 0.25, tmp_path / "pruned")
    after, record = finetune(tmp_path / "dense", tmp_path / "pruned", tmp_path / "tuned", TOKENS, facts, rank=3,
                             lr=0.005, kl_weight=0.9, batch_sequences=4, heldout=0.25)
    tuned = checkpoints.load_model(tmp_path / "tuned")
    assert record.epoch > 0 and record.curve[record.epoch]["heldout_loss"] < record.curve[0]["heldout_loss"]
    assert after.params_after == count_params(tuned) == facts.params_after + record.params_added
    assert tuned.config.widths == pruned.config.widths and not torch.equal(logits(tuned), logits(pruned))


# other families

def columns_left(dense, pruned):
    """Which columns of each dense matrix that adds to the state are still there, by equality; (layer, part) -> bool."""
    family, found = family_of(dense), {}
    for number, (layer, other) in enumerate(zip(decoder_layers(dense), decoder_layers(pruned), strict=True)):
        for name, part in family.parts.items():
            w_DC, left_DE = (matrix(one.get_submodule(part.writer)) for one in (layer, other))
            found[number, name] = (w_DC.T[:, None] == left_DE.T[None]).all(dim=-1).any(dim=1)
            assert found[number, name].sum() == left_DE.shape[1]
    return found


@pytest.mark.parametrize("family", [name for name, record in FAMILIES.items() if not no_single_heads(record)])
def test_in_every_family_the_narrow_model_is_the_dense_one_without_these_columns(family, tmp_path):
    """Rows of separate, fused, interleaved and transposed matrices are removed with the columns that they feed."""
    model = pico.lively(pico.model(family, layers=LAYERS))
    model.save_pretrained(tmp_path / "dense")
    _, _, pruned = folded(Dense(tmp_path / "dense", model, None), 0.25, tmp_path / "out")
    left = columns_left(model, pruned)
    assert not left[2, "attention"].all() and not left[2, "mlp"].all() and left[0, "mlp"].all()
    # a head is removed whole
    assert len({tuple(head.tolist()) for head in left[2, "attention"].view(HEADS, HEAD)}) == 2
    for (number, part), kept_C in left.items():
        with torch.no_grad():
            matrix(decoder_layers(model)[number].get_submodule(family_of(model).parts[part].writer))[:, ~kept_C] = 0
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-4, rtol=1e-4)


def fused(family, plain):
    """A model of this family with the weights of a model whose matrices are separate, and the same outputs."""
    made = pico.model(family, layers=LAYERS)
    pairs = zip(decoder_layers(made), decoder_layers(plain), strict=True)
    with torch.no_grad():
        for layer, other in pairs:
            for part, own in FAMILIES[family].parts.items():
                theirs = family_of(plain).parts[part]
                for (name, which) in itertools.product((*own.readers, own.writer), ("weight", "bias")):
                    names = theirs.readers if name in own.readers else (theirs.writer,)
                    if getattr(layer.get_submodule(name), which, None) is None:
                        continue
                    whole = torch.cat([getattr(other.get_submodule(one), which) for one in names])
                    target = layer.get_submodule(name)
                    (matrix(target) if which == "weight" else target.bias).copy_(whole)
                for which in ("weight", "bias"):
                    norm, source = (getattr(one.get_submodule(part.norm), which, None)
                                    for one, part in ((layer, own), (other, theirs)))
                    if norm is not None:
                        norm.copy_(source)
        for which in FAMILIES[family].embeddings[:1]:
            getattr(trunk(made), which).weight.copy_(plain.get_input_embeddings().weight)
        if not made.config.tie_word_embeddings:
            made.lm_head.weight.copy_(plain.lm_head.weight)
        final_norm(made).load_state_dict(final_norm(plain).state_dict())
        if family == "gpt2":
            # OPT's positions begin at the third row
            made.transformer.wpe.weight.copy_(plain.model.decoder.embed_positions.weight[2:])
            for layer in made.transformer.h:
                layer.mlp.act = torch.nn.ReLU()
    return made


@pytest.mark.parametrize("family, plain", [("phi3", "mistral"), ("gpt2", "opt")])
def test_units_of_fused_matrices_are_worth_what_they_are_in_separate_ones(family, plain):
    models = [pico.lively(pico.model(plain, layers=LAYERS))]
    models.append(fused(family, models[0]))
    torch.testing.assert_close(logits(models[1]), logits(models[0]), atol=1e-4, rtol=1e-4)
    units, found = {"attention": 2 if plain == "mistral" else HEADS, "mlp": CHANNELS}, []
    for model in models:
        judge = judge_of(model.requires_grad_(False), picked(TOKENS, SEQUENCES, 0), 2)
        coupled = coupled_of(decoder_layers(model)[0], model.config)
        found.append({(number, part): worth_U for number, worths in
                      llm_pruner.worths_by_layer(judge, PRUNED, coupled, units, "first", "element")
                      for part, worth_U in worths.items()})
    for unit, worth_U in found[0].items():
        torch.testing.assert_close(found[1][unit], worth_U, atol=1e-7, rtol=1e-3)


# sizes

@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.17, 0.25, 0.3])
def test_the_folded_share_is_the_ratio_to_half_a_channel(dense, tmp_path, ratio):
    _, facts, model = folded(dense, ratio, tmp_path / "out")
    _, (inner, outer) = names(dense.model.config.model_type)
    layer = decoder_layers(dense.model)[0]
    channel = sum(layer.get_parameter(name).numel() // CHANNELS for name in (*inner, *outer))
    assert abs(facts.params_removed - ratio) * facts.params_before <= channel / 2 + 1e-6
    widths = model.config.widths
    assert widths[0] == widths[-1] == {"heads": HEADS, "kv_heads": dense.groups, "intermediate": CHANNELS}
    assert len({one["kv_heads"] for one in widths[1:-1]}) == 1
    assert max(one["intermediate"] for one in widths[1:-1]) - min(one["intermediate"] for one in widths[1:-1]) <= 1


@pytest.mark.parametrize("groups, channels, group_params, channel_params", [(3, 1536, 294912, 1728), (32, 11008, 9, 3),
                                                                            (2, 5, 100, 7), (1, 64, 50, 3)])
def test_cuts_are_the_nearest_to_an_equal_share_that_meet_the_ratio(groups, channels, group_params, channel_params):
    layers = 24
    sizes = Sizes(layers, groups, channels, group_params, channel_params)
    whole = layers * (groups * group_params + channels * channel_params)
    reach = layers * ((groups - 1) * group_params + (channels - 1) * channel_params)
    for ratio in np.linspace(0, reach / whole, 23).tolist():
        found = cut_for(ratio, whole, sizes)

        def removed(lost, count):
            return layers * lost * group_params + count * channel_params

        # every pair of counts that can be, by brute force
        counts = np.arange(layers * (channels - 1) + 1)
        misses = {lost: np.abs(removed(lost, counts) - ratio * whole).min() for lost in range(groups)}
        mine = abs(removed(found.groups, sum(found.channels)) - ratio * whole)
        assert mine == pytest.approx(misses[found.groups]) and max(found.channels) - min(found.channels) <= 1
        fitting = [lost for lost in misses if misses[lost] <= channel_params]
        assert found.groups == min(fitting or misses, key=lambda lost: (abs(lost - ratio * groups), lost))
        assert 0 <= min(found.channels) and max(found.channels) < channels and found.groups < groups


def test_smollm2_loses_a_head_group_of_three_at_a_quarter():
    sizes = Sizes(24, 3, 1536, 294912, 1728)
    assert cut_for(0.1, 134515008, sizes).groups == 0 and cut_for(0.25, 134515008, sizes).groups == 1
    assert {1536 - count for count in cut_for(0.25, 134515008, sizes).channels} == {895, 896}
    with pytest.raises(BlockError, match=r"ratio 0\.6 is too high: all that llm_pruner can remove from 24 layers is "
                                         r"0\.5785 of all parameters, as one head group and one channel of each are"):
        cut_for(0.6, 134515008, sizes)


def test_layers_kept_at_both_ends():
    assert between(32, None, None) == range(4, 30), "as released"
    assert between(30, None, None) == range(4, 28) and between(80, None, None) == range(4, 78)
    assert between(10, None, None) == range(1, 9) and between(2, None, None) == range(2)
    assert between(10, 0, 3) == range(7)
    for first, last in ((4, 6), (10, 0)):
        with pytest.raises(BlockError, match=f"keep_first {first} and keep_last {last} of 10 layers leave none"):
            between(10, first, last)


# refusals

@pytest.mark.parametrize("options, error, message", [
    ({"importance": "third"}, OptionError, "importance is 'third'; choose one of first, second, mix"),
    ({"grouping": "block"}, OptionError, "grouping is 'block'; choose one of element, vector"),
    ({"sequences": 0}, OptionError, "sequences is 0; give a number at least 1"),
    ({"batch_sequences": 0}, OptionError, "batch_sequences is 0; give a number at least 1"),
    ({"keep_first": 5}, BlockError, r"compose\.keep_first 5 and keep_last 1 of 6 layers leave none to prune"),
])
def test_options_that_cannot_be_are_named_before_the_model_is_read(dense, monkeypatch, options, error, message):
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        composed(dense, 0.2, **options)


def test_a_ratio_out_of_reach_is_told_what_can_go_before_the_model_is_read(dense, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BlockError, match=r"all that llm_pruner can remove from 4 layers is 0\.\d+ of all"):
        composed(dense, 0.6)


def test_a_model_whose_norms_follow_the_sum_is_refused(tmp_path):
    """As OPT-350M."""
    model = pico.model("opt", layers=LAYERS)
    model.config.do_layer_norm_before = False
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FitError, match="llm_pruner cannot prune this opt model; it knows models of llama"):
        composed(Dense(tmp_path / "model", None, HEADS), 0.2)
