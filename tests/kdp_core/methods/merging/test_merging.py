"""Merging: walks beside literal ones on numbers, weights and choice beside copied models, thresholds, checkpoints."""
import copy
import itertools
import math
import random
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base.records import Selection
from kdp_core.methods import option_schema
from kdp_core.methods.merging import _merge, laco, sliding_merge
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

LAYERS = 8
MERGES = ("paper", "as_released")
BOTH = {"laco": laco.laco, "sliding_merge": sliding_merge.sliding}


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, family):
    model = pico.lively(pico.model(family, layers=LAYERS))
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """By family, made once."""
    made = {}

    def get(family="llama"):
        if family not in made:
            made[family] = dense_of(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def composed(dense, method, layers, **options):
    selection = Selection([], [], "fit", 0.2, 0.2, 0.5, 3, [], layers)
    return BOTH[method](dense.folder, dense.hidden, stored.tokens(), selection, **({"sequences": 6} | options))


# Literal walks, written from the released code: a list that is merged in place, the original never touched ------------

def merge_in_place(layers, low, high, merge, weights):
    """Layers low .. high into layer low of a copied list; `weights` gives what a layer merges, changed in place."""
    made = copy.deepcopy(layers)
    base = weights(made[low])
    before = copy.deepcopy(base)
    for k in range(low + 1, high + 1):
        for name, value in weights(layers[k]).items():
            base[name] += value - (before if merge == "paper" else base)[name]
    for k in range(high, low, -1):
        del made[k]
    return made


def literal_laco(layers, score, threshold, merge, weights, group, stride, lowest, highest):
    at = highest - group
    while at >= lowest:
        further = min(group - 1, len(layers) - at - 1)
        candidate = merge_in_place(layers, at, at + further, merge, weights)
        if score(candidate) > threshold:
            layers = candidate
            at -= stride
            if at >= len(layers):
                at = len(layers) - 1 - group
        else:
            at -= 1
    return layers


def literal_sliding(layers, score, threshold, merge, weights):
    high = len(layers) - 1 - 1
    low = high - 1
    while low >= 0:
        if score(merge_in_place(layers, low, high, merge, weights)) > threshold:
            low -= 1
        elif low + 1 != high:
            layers = merge_in_place(layers, low + 1, high, merge, weights)
            high = low
        else:
            high -= 1
            low -= 1
    return merge_in_place(layers, 0, high, merge, weights) if merge == "paper" else layers


# Walks on numbers -----------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """A walk with made-up scores and layers of one number each."""
    count: int
    merge: str
    options: dict
    seed: int

    def score_of(self, bases):
        """A cosine that depends on which layers are left, falling as they get fewer."""
        noise = random.Random(f"{self.seed} {bases}").uniform(-0.25, 0.25)
        return (len(bases) / self.count) ** 0.5 + noise - 0.1

    def walker(self):
        return partial(laco._laco if self.options else sliding_merge._sliding, merge=self.merge, **self.options)

    def ours(self, stack):
        return self.score_of(tuple(layer.base for layer in stack))

    def literal(self, threshold):
        layers = [{"base": layer, "w": number} for layer, number in enumerate(self.numbers())]
        walk = partial(literal_laco, **self.options) if self.options else literal_sliding
        end = walk(layers, lambda made: self.score_of(tuple(layer["base"] for layer in made)), threshold, self.merge,
                   Numbers)
        return [(layer["base"], pytest.approx(layer["w"], abs=1e-6)) for layer in end]

    def numbers(self):
        generator = random.Random(self.seed)
        return [generator.uniform(-1, 1) for _ in range(self.count)]

    def values(self, stack):
        """(base, merged number) of each layer."""
        numbers = self.numbers()
        return [(layer.base, sum(share * numbers[j] for j, share in layer.shares)) for layer in stack]


class Numbers(dict):
    """The merged number of a layer; changing it changes the layer."""

    def __init__(self, layer):
        super().__init__(w=layer["w"])
        self.layer = layer

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.layer[name] = value


def cases():
    generator = random.Random(0)
    for seed, merge in itertools.product(range(20), MERGES):
        count = generator.randint(3, 14)
        yield Case(count, merge, {}, seed)
        group = generator.randint(2, min(5, count - 1))
        yield Case(count, merge, {"group": group, "stride": generator.randint(1, 4),
                                  "lowest": generator.randint(0, 2), "highest": generator.choice([count - 1, count - 1,
                                                                                                 count - 2])}, seed)


def test_walks_are_the_literal_ones_at_every_threshold():
    seen = set()
    for case in cases():
        for threshold in (-1.0, 0.2, 0.5, 0.7, 0.9):
            walk = _merge.walked(case.walker(), case.ours, case.count, threshold, case.count)
            assert case.values(walk.stack) == case.literal(threshold), case
            assert all(sum(share for _, share in layer.shares) == 1 for layer in walk.stack)
            seen.add((bool(case.options), case.count - len(walk.stack)))
    assert {(kind, gone) for kind in (True, False) for gone in range(5)} <= seen, "the cases cover little"


def test_all_thresholds_between_refused_and_accepted_walk_alike():
    for case in cases():
        walk = _merge.walked(case.walker(), case.ours, case.count, 0.6, case.count)
        assert walk.refused <= 0.6 < walk.accepted
        within = [max(walk.refused, -1.0), math.nextafter(min(walk.accepted, 2.0), -1.0)]
        for threshold in within:
            assert _merge.walked(case.walker(), case.ours, case.count, threshold, case.count).stack == walk.stack


@pytest.mark.parametrize("jump", ["whole", "shorten"])
def test_as_many_layers_go_as_are_wanted_or_as_a_whole_walk_removes(jump):
    ends = {}
    for case in cases():
        most = _merge.walked(case.walker(), lambda stack: 1.0, case.count, -1.0, case.count).reached
        for wanted in range(1, most + 1):
            stack, how = _merge.matched(case.walker(), case.ours, case.count, wanted, 12, jump)
            tried = [gone for _, gone in how["walks"]]
            assert len(tried) <= 12
            # a walk of the released code at this threshold, unless its last merge was cut
            whole = how["ended"] == "exact" or (jump == "whole" and any(tried))
            if whole:
                assert case.values(stack) == case.literal(how["threshold"])
                assert abs(case.count - len(stack) - wanted) == min(abs(gone - wanted) for gone in tried if gone)
            else:
                assert case.count - len(stack) == wanted
            assert (how["ended"] == "exact") == (wanted in tried)
            ends.setdefault((how["ended"], bool(case.options)), []).append(wanted)
    assert {end for end, _ in ends} >= {"exact", "jump"}


def by_count(stack):
    """Falls by a tenth a layer gone, of twelve."""
    return 1 - (12 - len(stack)) / 10


def test_where_the_number_jumps_the_last_merge_is_shortened():
    walker = partial(laco._laco, merge="paper", group=4, stride=4, lowest=0, highest=None)
    stack, how = _merge.matched(walker, by_count, 12, 4, 12, "shorten")
    # 7 8 9 10 become one layer, then of 3 4 5 6 the first two
    assert [layer.base for layer in stack] == [0, 1, 2, 3, 5, 6, 7, 11]
    assert stack[3].shares == ((4, 1),) and stack[6].shares == ((7, -2), (8, 1), (9, 1), (10, 1))
    assert how["ended"] == "jump" and how["threshold"] < 0.4
    # nothing passes but at 0.7 (3 gone) and 0.4 (6 gone): three walks close the bracket, and none of them is cut
    assert how["walks"] == [[0.0, 6], [pytest.approx(0.7), 0], [pytest.approx(0.55), 3]]
    assert _merge.matched(walker, by_count, 12, 4, 1, "shorten")[1]["ended"] == "rounds"


def test_a_whole_walk_is_taken_where_the_number_jumps():
    """Thresholds give 0, 3 or 6 layers: of 4 and 5 the nearer one, of 1 and 2 the least that is merged at all."""
    walker = partial(laco._laco, merge="paper", group=4, stride=4, lowest=0, highest=None)
    for wanted, removed in ((1, 3), (2, 3), (4, 3), (5, 6)):
        stack, how = _merge.matched(walker, by_count, 12, wanted, 12, "whole")
        assert (12 - len(stack), how["ended"]) == (removed, "jump")
        assert stack == _merge.walked(walker, by_count, 12, how["threshold"], 12).stack


def test_merged_layers_are_merged_again_as_they_are():
    plain = tuple(map(_merge.plain, range(6)))
    once = _merge.merged(plain, 2, 4, "paper")
    assert once[2] == (2, ((2, -1), (3, 1), (4, 1)))
    # W_1 + (W' - W_1) + (W_5 - W_1), W' the merged layer
    assert _merge.merged(once, 1, 3, "paper")[1] == (1, ((1, -1), (2, -1), (3, 1), (4, 1), (5, 1)))
    assert _merge.merged(once, 1, 2, "paper")[1] == (1, ((2, -1), (3, 1), (4, 1)))
    released = _merge.merged(plain, 2, 4, "as_released")
    assert released[2] == (2, ((4, 1),)) and _merge.merged(released, 1, 2, "as_released")[1] == (1, ((4, 1),))


@pytest.mark.parametrize("merge, bases", [("paper", [0, 5]), ("as_released", list(range(6)))])
def test_a_window_that_reaches_the_first_layer_is_merged_by_paper_alone(merge, bases):
    walk = _merge.walked(partial(sliding_merge._sliding, merge=merge), lambda stack: 1.0, 6, 0.5, 6)
    assert [layer.base for layer in walk.stack] == bases and walk.reached == 4


def test_the_released_walk_still_serves_where_its_window_is_never_merged():
    """Every threshold leaves the window open or nothing merged: it is merged once it holds enough."""
    stack, how = _merge.matched(partial(sliding_merge._sliding, merge="as_released"), lambda stack: 0.5, 6, 3, 12,
                                "whole")
    assert [layer.base for layer in stack] == [0, 1, 5] and stack[1] == (1, ((4, 1),)) and how["ended"] == "jump"


def test_outputs_that_are_not_finite_pass_no_threshold():
    walker = partial(sliding_merge._sliding, merge="paper")
    with pytest.raises(FitError, match="only 0 layers are removed, 2 are wanted; the other candidates have no finite"):
        _merge.matched(walker, lambda stack: float("nan"), 6, 2, 12, "whole")


# Models ---------------------------------------------------------------------------------------------------------------

NAMES = {"llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                   "mlp.up_proj", "mlp.down_proj"],
         "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]}
NAMES["qwen3"] = NAMES["llama"]


def judged(count=6, seed=0):
    """Sequences judged on, and the next ones."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:count]), sorted(order[count:2 * count])


@torch.no_grad()
def last(model, rows):
    """Final states of a model by its own forward pass, one vector a sequence."""
    ids_ST = stored.tokens().ids_ST[rows]
    return model(ids_ST, use_cache=False, output_hidden_states=True).hidden_states[-1].flatten(1).double()


def cosine_of(one, other):
    return ((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).mean().item()


def literal_layers(dense, method, merge, threshold, **options):
    """Parameters of each layer that a literal walk on copied models leaves."""
    family, rows = dense.model.config.model_type, judged()[0]
    original = last(dense.model, rows)
    model = copy.deepcopy(dense.model)
    container = model.model.decoder if family == "opt" else model.model

    def weights(layer):
        return {f"{name}.{which}": parameter.data for name in NAMES[family]
                for which, parameter in layer.get_submodule(name).named_parameters()}

    def score(layers):
        container.layers = layers
        return cosine_of(original, last(model, rows))

    walk = partial(literal_laco, **options) if method == "laco" else literal_sliding
    end = walk(container.layers, score, threshold, merge, weights)
    return [dict(layer.named_parameters()) for layer in end]


@pytest.mark.parametrize("family, method, merge, layers", [
    ("llama", "laco", "paper", 2), ("llama", "laco", "as_released", 5), ("opt", "laco", "paper", 4),
    ("qwen3", "laco", "as_released", 4), ("llama", "sliding_merge", "paper", 3), ("opt", "sliding_merge", "paper", 2),
    ("qwen3", "sliding_merge", "as_released", 2), ("opt", "sliding_merge", "as_released", 3)])
def test_layers_and_weights_are_those_of_a_literal_walk(dense, family, method, merge, layers):
    case = dense(family)
    options = {"group": 3, "stride": 1} if method == "laco" else {}
    plan, _, _, stats = composed(case, method, layers, merge=merge, **options)
    assert stats["ended"] == "exact" and len(plan.drop) == layers
    expected = literal_layers(case, method, merge, stats["threshold"],
                              **(options | {"lowest": 0, "highest": LAYERS - 1} if options else {}))
    dropped = {layer for layer, part in plan.drop if part == "whole"}
    kept = [layer for layer in range(LAYERS) if layer not in dropped]
    assert len(kept) == len(expected) == LAYERS - layers
    own, prefix, used = case.model.state_dict(), family_of(family).prefix, set()
    for layer, parameters in zip(kept, expected, strict=True):
        for name, value in parameters.items():
            full = f"{prefix}{layer}.{name}"
            used.add(full)
            torch.testing.assert_close(plan.tensors.get(full, own[full]), value.detach(), atol=1e-4, rtol=1e-4)
    assert set(plan.tensors) <= used and plan.tensors
    merged = {name.removeprefix(prefix).split(".", 1)[1] for name in plan.tensors}
    assert merged == {f"{name}.{which}" for name in NAMES[family] for which in ("weight", "bias")
                      if f"{prefix}0.{name}.{which}" in own}


@pytest.mark.parametrize("family", pico.EVERY)
def test_the_checkpoint_is_a_plain_model_that_was_judged_truly(dense, family, tmp_path):
    case = dense(family)
    plan, curve, fits, stats = composed(case, "sliding_merge", 3)
    facts = fold(plan, case.folder, tmp_path / "out")
    pruned = checkpoints.load_model(tmp_path / "out")
    assert type(pruned) is type(case.model) and (facts.layers_removed, facts.params_added, curve) == (3, 0, [])
    rows, others = judged()
    assert stats["cosine"] == pytest.approx(cosine_of(last(case.model, rows), last(pruned, rows)), abs=1e-4)
    assert stats["heldout_cosine"] == pytest.approx(cosine_of(last(case.model, others), last(pruned, others)), abs=1e-4)
    assert stats["tokens"] == 6 * 24
    # where a merged layer ends, beside where the last of its dense layers did
    states = hidden.boundary_states(pruned, stored.tokens().ids_ST[others], list(range(LAYERS - 3 + 1)))
    dropped = {layer for layer, _ in plan.drop}
    kept = [layer for layer in range(LAYERS) if layer not in dropped]
    spans = [(one, other) for one, other in itertools.pairwise([*kept, LAYERS]) if other > one + 1]
    assert [fit["block"] for fit in fits] == spans
    for fit in fits:
        h_ND = case.hidden.state(fit["block"][1])[others].flatten(0, 1).double()
        made_ND = states[kept.index(fit["block"][0]) + 1].flatten(0, 1).double()
        error = ((made_ND - h_ND) ** 2).sum() / ((h_ND - h_ND.mean(0)) ** 2).sum()
        assert fit == {"block": fit["block"], "heldout_error": pytest.approx(error.item(), rel=1e-3), "params": 0}


def test_attention_types_follow_the_base_layer(dense, tmp_path):
    """Gemma 3: five layers of six see a window; a merge across the sixth leaves the window's mask to its base."""
    case = dense("gemma3_text")
    plan = composed(case, "sliding_merge", 5).plan
    fold(plan, case.folder, tmp_path / "out")
    dropped = {layer for layer, _ in plan.drop}
    assert 5 in dropped, "the case does not merge layer 5, the one that sees all"
    assert set(checkpoints.load_model(tmp_path / "out").config.layer_types) == {"sliding_attention"}


def test_the_same_bits_twice_and_no_matter_the_batches(dense):
    one, again, other = (composed(dense(), "laco", 3, batch_sequences=size) for size in (8, 8, 4))
    assert one.plan.drop == again.plan.drop == other.plan.drop
    assert one.stats["cosine"] == again.stats["cosine"] == pytest.approx(other.stats["cosine"], abs=1e-5)
    for name, tensor in one.plan.tensors.items():
        assert torch.equal(tensor, again.plan.tensors[name]) and torch.equal(tensor, other.plan.tensors[name])


def test_candidates_are_run_once_and_from_their_first_merged_layer_on(dense, monkeypatch):
    runs = []
    real = _merge.Passes.run_batches
    monkeypatch.setattr(_merge.Passes, "run_batches", lambda self, *args: runs.append(args) or real(self, *args))
    stats = composed(dense(), "laco", 3).stats
    assert not any(isinstance(path[0], int) for _, path, _ in runs[:stats["evaluations"]]), "layers that stay are run"
    # the last ones: each layer of the result on the other sequences, and its cosine there
    assert len(runs) == stats["evaluations"] + (LAYERS - 3) + 1


def test_half_precision_is_kept(dense):
    made = composed(dense(), "sliding_merge", 2, dtype="bfloat16")
    assert {tensor.dtype for tensor in made.plan.tensors.values()} == {torch.bfloat16}
    assert len(made.plan.drop) == 2 and 0 < made.stats["cosine"] <= 1


def test_the_stored_states_stay_with_the_sequences_judged(dense):
    """Another seed judges on other sequences, so scores differ."""
    assert composed(dense(), "laco", 2).stats["cosine"] != composed(dense(), "laco", 2, seed=1).stats["cosine"]


@pytest.mark.parametrize("method, layers, options, message", [
    ("laco", 2, {"merge": "mean"}, "merge is 'mean'; choose one of paper, as_released"),
    ("sliding_merge", 2, {"rounds": 0}, "rounds is 0; give a number at least 1"),
    ("sliding_merge", 2, {"sequences": 16}, r"compose\.sequences 16 of 16 leaves none to judge the result"),
    ("laco", 2, {"group": 1}, "group is 1; give a number at least 2"),
    ("laco", 2, {"stride": 0}, "stride is 0; give a number at least 1"),
    ("laco", 2, {"highest": 8}, r"compose\.highest 8: the model has layers 0 to 7"),
    ("laco", 2, {"lowest": -1}, "lowest is -1; give a number at least 0"),
    ("laco", 4, {"stride": 4}, r"laco: 4 of 8 layers are to be removed, but these options remove 1 to 3"),
    ("sliding_merge", 7, {}, r"sliding_merge: 7 of 8 layers are to be removed, but these options remove 1 to 6"),
    ("sliding_merge", 0, {}, r"sliding_merge: 0 of 8 layers are to be removed"),
])
def test_what_cannot_be_is_named(dense, method, layers, options, message):
    with pytest.raises(ValueError, match=message):
        composed(dense(), method, layers, **options)


@pytest.mark.parametrize("compose", BOTH.values())
def test_every_option_is_described(compose):
    assert all(option["description"].endswith(".") for option in option_schema(compose)["properties"].values())
