"""Sparsity: beside NumPy's Wanda and SparseGPT, weight by weight on the model's own hooks; counts to one weight."""
import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods import sparse
from kdp_core.methods.sparse import magnitude, sparsegpt, wanda
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

DATA = stored.tokens()
S = len(DATA.ids_ST)
BLOCK = 24
"""Columns of a SparseGPT block: 24 and 8 of 32; 24, 24 and 16 of 64."""
IDS_ST = torch.arange(2, 26).view(2, 12)
TIED = ("llama", "opt", "smollm3", "gemma2", "gemma3_text", "gpt2")
"""Families whose pico model has its embedding for a head."""


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, model):
    model.save_pretrained(root / "model")
    hidden.extract(model, DATA, root / "h.zarr", layers=[0], dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request, tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp(request.param), pico.lively(pico.model(request.param, layers=2)))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """Inputs of the first layer's attention are all 0, and so is one of the second layer's last matrix."""
    model = pico.lively(pico.model("opt", layers=2))
    first, second = decoder_layers(model)
    with torch.no_grad():
        first.self_attn_layer_norm.weight.zero_()
        first.self_attn_layer_norm.bias.zero_()
        second.fc1.bias[5] = -1e4
    return dense_of(tmp_path_factory.mktemp("dead"), model)


def matrices(model):
    """Name and module of all that may lose weights."""
    prefix = family_of(model).prefix
    return [(f"{prefix}{number}.{name}.weight", module) for number, layer in enumerate(decoder_layers(model))
            for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def total_of(model):
    return model.num_parameters()


def scope_of(model):
    return sum(module.weight.numel() for _, module in matrices(model))


def half(dense):
    """The ratio at which half of every matrix goes."""
    return scope_of(dense.model) / total_of(dense.model) / 2


def pruned(method, dense, ratio, **options):
    selection = Selection([], [], "weights", ratio, ratio, 0.9, 3, [], 0)
    return method(dense.folder, dense.hidden, DATA, selection, **options)


def zeros_of(tensors):
    return sum(int((tensor == 0).sum()) for tensor in tensors.values())


def counts_of(model, ratio):
    """Floors of the running total."""
    goal, scope, seen, before, made = round(ratio * total_of(model)), scope_of(model), 0, 0, {}
    for name, module in matrices(model):
        seen += module.weight.numel()
        made[name], before = seen * goal // scope - before, seen * goal // scope
    return made


@torch.no_grad()
def inputs_of(model, module, ids_ST):
    """x_NC of a module in a pass of the whole model, double precision."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids_ST)
    hook.remove()
    return seen[0].flatten(0, -2).double().numpy()


def by_hand(dense, rule, counts, ids_ST=DATA.ids_ST, *, in_turn=True):
    """Every matrix by a rule (w, x, count) -> w; whole passes of the model with all earlier layers pruned, or none."""
    model, made = copy.deepcopy(dense.model), {}
    of_layer = [[(name, module) for name, module in matrices(model) if f".{number}." in name]
                for number in range(len(decoder_layers(model)))]
    for own in of_layer:
        new = {name: rule(module.weight.detach().double().numpy().copy(), inputs_of(model, module, ids_ST),
                          counts[name]) for name, module in own}
        made |= new
        if in_turn:
            for name, module in own:
                module.weight = nn.Parameter(torch.from_numpy(new[name]).float())
    return made


def literal_wanda(sequences):
    def rule(w, x, count):
        R, C = w.shape
        a = [np.sqrt(sum(x[t, j] ** 2 for t in range(len(x))) / sequences) for j in range(C)]
        left = []
        for i in range(R):
            ranked = sorted((abs(w[i, j]) * a[j], j) for j in range(C))
            for _, j in ranked[:count // R]:
                w[i, j] = 0
            left.append((*ranked[count // R], i))
        for _, j, i in sorted(left, key=lambda entry: (entry[0], entry[2]))[:count % R]:
            w[i, j] = 0
        return w
    return rule


def paired(n, m):
    """Literal N:M of a score: the n lowest of each m columns."""
    def rule(w, x, count):
        a = np.sqrt((x ** 2).sum(0) / S)
        for i in range(w.shape[0]):
            for start in range(0, w.shape[1], m):
                for _, j in sorted((abs(w[i, j]) * a[j], j) for j in range(start, start + m))[:n]:
                    w[i, j] = 0
        return w
    return rule


def literal_sparsegpt(sequences, *, damp=0.01, group=None):
    """Algorithm 1 column by column: after each column the inverse of what is left of H is made anew, no Cholesky."""
    def rule(w, x, count):
        R, C = w.shape
        h = 2 / sequences * x.T @ x
        dead = [j for j in range(C) if h[j, j] == 0]
        for j in dead:
            h[j, j], w[:, j] = 1, 0
        h += damp * np.mean(np.diag(h)) * np.eye(C)
        # [H_j..^-1]_first row: e = w_j / its first entry, W_j.. -= e row; U_jj^2 of the Cholesky factor is that entry
        left = [np.linalg.inv(h[j:, j:]) for j in range(C)]
        gone = np.zeros((R, C), dtype=bool)
        for start in range(0, C, BLOCK):
            stop = min(start + BLOCK, C)
            due = count * stop // C - count * start // C
            for j in range(start, stop):
                if group is None and j == start:
                    ranked = sorted((w[i, k] ** 2 / left[k][0, 0], i, k) for i in range(R) for k in range(start, stop))
                    for _, i, k in ranked[:due]:
                        gone[i, k] = True
                if group and j % group[1] == 0:
                    for i in range(R):
                        ranked = sorted((w[i, k] ** 2 / left[k][0, 0], k) for k in range(j, j + group[1]))
                        for _, k in ranked[:group[0]]:
                            gone[i, k] = True
                for i in range(R):
                    if gone[i, j]:
                        w[i, j:] -= w[i, j] / left[j][0, 0] * left[j][0]
                        w[i, j] = 0
        return w
    return rule


def assert_same(tensors, expected):
    """The same zeros, weights to 1e-4."""
    assert list(tensors) == list(expected)
    for name, w in expected.items():
        np.testing.assert_array_equal(tensors[name].numpy() == 0, w == 0, err_msg=name)
        np.testing.assert_allclose(tensors[name].numpy(), w, atol=1e-4, rtol=1e-4, err_msg=name)


def test_the_lowest_scores_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 9, 10 ** 6):
        score_RC = torch.randint(levels, (5, 12), generator=generator).double()
        order = score_RC.flatten().argsort(stable=True)
        for count in (0, 1, 29, 30, 59, 60):
            expected = torch.zeros(60, dtype=torch.bool)
            expected[order[:count]] = True
            assert torch.equal(sparse._lowest(score_RC, count, None), expected.view(5, 12))
            by_row = sparse._lowest_by_row(score_RC, count) if count < 60 else torch.ones(5, 12, dtype=torch.bool)
            lowest = score_RC.argsort(dim=1, stable=True)[:, :count // 5]
            assert by_row.sum() == count and by_row.gather(1, lowest).all() and by_row.sum(1).max() <= count // 5 + 1


def test_wanda_is_the_literal_one_at_any_count(dense):
    made = pruned(wanda, dense, 0.31)
    assert_same(made.plan.tensors, by_hand(dense, literal_wanda(S), counts_of(dense.model, 0.31)))
    assert made.plan.drop == made.plan.modules == made.fits == made.curve == [] and made.stats["tokens"] == S * 24


def test_wanda_at_a_whole_share_takes_as_many_of_each_row(dense):
    """The released rule: int(C s) of every row."""
    for name, tensor in pruned(wanda, dense, half(dense)).plan.tensors.items():
        assert ((tensor == 0).sum(1) == tensor.shape[1] // 2).all(), name


@pytest.mark.parametrize("ratio", [0.31, 0.05])
def test_sparsegpt_is_the_literal_one(dense, ratio):
    made = pruned(sparsegpt, dense, ratio, block_size=BLOCK)
    assert_same(made.plan.tensors, by_hand(dense, literal_sparsegpt(S), counts_of(dense.model, ratio)))
    assert made.stats["damp_largest"] == 0.01


def test_sparsegpt_reads_its_damp(dense):
    made = pruned(sparsegpt, dense, 0.31, block_size=BLOCK, damp=0.5).plan.tensors
    assert_same(made, by_hand(dense, literal_sparsegpt(S, damp=0.5), counts_of(dense.model, 0.31)))


@pytest.mark.parametrize("pattern, group", [("2:4", (2, 4)), ("4:8", (4, 8))])
def test_patterns_are_the_literal_ones_whatever_the_ratio(dense, pattern, group):
    counts = dict.fromkeys(counts_of(dense.model, 0.3), 0)
    made = pruned(sparsegpt, dense, 0.31, block_size=BLOCK, pattern=pattern)
    assert_same(made.plan.tensors, by_hand(dense, literal_sparsegpt(S, group=group), counts))
    made = pruned(wanda, dense, 0.31, pattern=pattern)
    assert_same(made.plan.tensors, by_hand(dense, paired(*group), counts))
    assert made.stats["share_of_scope"] == 0.5 and made.stats["share_of_all"] == pytest.approx(half(dense))
    other = pruned(wanda, dense, 0.99, pattern=pattern)
    assert all(torch.equal(other.plan.tensors[name], tensor) for name, tensor in made.plan.tensors.items())


def test_magnitude_takes_the_lowest_of_each_matrix(dense):
    made, counts = pruned(magnitude, dense, 0.31).plan.tensors, counts_of(dense.model, 0.31)
    for name, module in matrices(dense.model):
        w = module.weight.detach().numpy()
        expected = w.copy()
        for place in sorted(np.ndindex(w.shape), key=lambda place: (abs(w[place]), place))[:counts[name]]:
            expected[place] = 0
        np.testing.assert_array_equal(made[name].numpy(), expected, err_msg=name)
    for tensor in pruned(magnitude, dense, 0.31, pattern="2:4").plan.tensors.values():
        assert ((tensor.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()


@pytest.mark.parametrize("method, rule", [(wanda, literal_wanda), (sparsegpt, literal_sparsegpt)])
def test_a_layer_is_pruned_on_what_pruned_layers_give(dense, method, rule):
    options = {"block_size": BLOCK} if method is sparsegpt else {}
    made, counts = pruned(method, dense, half(dense), **options).plan.tensors, counts_of(dense.model, half(dense))
    apart = by_hand(dense, rule(S), counts, in_turn=False)
    prefix = family_of(dense.model).prefix
    differ = {name: bool(((made[name].numpy() == 0) != (w == 0)).any()) for name, w in apart.items()}
    assert not any(found for name, found in differ.items() if name.startswith(f"{prefix}0."))
    assert all(found for name, found in differ.items() if name.startswith(f"{prefix}1."))


def test_moving_the_weights_lowers_the_error_of_the_outputs(dense):
    """Of the first layer's matrices, beside the same zeros with nothing moved, and beside Wanda's."""
    ours, other = (pruned(method, dense, half(dense)).plan.tensors for method in (sparsegpt, wanda))
    for name, module in matrices(dense.model):
        if ".0." not in name:
            continue
        w, x = module.weight.detach().double().numpy(), inputs_of(dense.model, module, DATA.ids_ST)
        moved, bare, theirs = (((x @ (w - v).T) ** 2).sum() for v in
                               (ours[name].numpy(), w * (ours[name].numpy() != 0), other[name].numpy()))
        assert moved < 0.9 * bare and moved < theirs, name


@pytest.mark.parametrize("family", pico.EVERY)
def test_the_folded_model_has_zeros_for_the_ratio_to_one_weight(family, tmp_path):
    """Of all parameters, tied embeddings once, on every family; all else is as it was."""
    case = dense_of(tmp_path, pico.lively(pico.model(family, layers=2)))
    for method in (wanda, sparsegpt, magnitude):
        made = pruned(method, case, 0.234)
        facts = fold(made.plan, case.folder, tmp_path / method.__name__)
        model = checkpoints.load_model(tmp_path / method.__name__)
        kept = dict(model.named_parameters())
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family in TIED)
        # a tied head is one parameter here
        total = sum(parameter.numel() for parameter in kept.values())
        zeros = sum(int((module.weight == 0).sum()) for _, module in matrices(model))
        assert zeros == round(0.234 * total) == made.stats["zeros"]
        assert made.stats["share_of_all"] == pytest.approx(0.234, abs=1 / total)
        assert facts.params_after == facts.params_before == total and facts.layers_removed == 0
        assert torch.isfinite(model(IDS_ST).logits).all()
        for name, parameter in case.model.named_parameters():
            assert torch.equal(kept[name], parameter) != (name in made.plan.tensors), name


def test_inputs_that_are_always_zero(opt):
    """Wanda's scores are all 0: lower columns go, then one more of the lower rows. SparseGPT zeroes the columns."""
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    made, counts = pruned(wanda, opt, 0.31), counts_of(opt.model, 0.31)
    each, more = divmod(counts[name], 32)
    assert more
    expected = torch.arange(32) < torch.tensor([each + (row < more) for row in range(32)])[:, None]
    assert torch.equal(made.plan.tensors[name] == 0, expected)
    made = pruned(sparsegpt, opt, 0.31, block_size=BLOCK)
    assert_same(made.plan.tensors, by_hand(opt, literal_sparsegpt(S), counts))
    assert not made.plan.tensors[name].any() and not made.plan.tensors["model.decoder.layers.1.fc2.weight"][:, 5].any()
    assert made.stats["zeros"] == zeros_of(made.plan.tensors) > round(0.31 * total_of(opt.model))


def test_some_sequences_drawn_by_the_seed(dense):
    rows = torch.randperm(S, generator=torch.Generator().manual_seed(3))[:5].sort().values
    counts = counts_of(dense.model, 0.31)
    made = pruned(wanda, dense, 0.31, sequences=5, seed=3)
    assert_same(made.plan.tensors, by_hand(dense, literal_wanda(5), counts, DATA.ids_ST[rows]))
    made = pruned(sparsegpt, dense, 0.31, sequences=5, seed=3, block_size=BLOCK)
    assert_same(made.plan.tensors, by_hand(dense, literal_sparsegpt(5), counts, DATA.ids_ST[rows]))
    assert made.stats["tokens"] == 5 * 24


@pytest.mark.parametrize("method", [wanda, sparsegpt])
def test_batches_do_not_matter(dense, method):
    one, other = (pruned(method, dense, 0.31, batch_sequences=size).plan.tensors for size in (3, 16))
    assert_same(one, {name: tensor.numpy() for name, tensor in other.items()})


def test_a_singular_hessian_takes_a_larger_damp_or_is_refused(dense):
    """One sequence of 24 tokens spans 24 of 32 columns at most."""
    made = pruned(sparsegpt, dense, 0.31, sequences=1, damp=1e-19)
    assert 1e-19 < made.stats["damp_largest"] <= 0.1
    with pytest.raises(FitError, match=r"Hessian is singular with damp 0; raise compose\.damp"):
        pruned(sparsegpt, dense, 0.31, sequences=1, damp=0.0)


@pytest.mark.parametrize("method", [wanda, sparsegpt, magnitude])
def test_a_ratio_out_of_reach_names_the_largest(dense, method):
    largest = scope_of(dense.model) / total_of(dense.model)
    with pytest.raises(FitError, match=rf"ratio 0\.9: .* choose a ratio below {largest:.4f}"):
        pruned(method, dense, 0.9)
    with pytest.raises(OptionError, match="pattern is '1:4'; choose one of unstructured, 2:4, 4:8"):
        pruned(method, dense, 0.3, pattern="1:4")


def test_columns_that_a_pattern_does_not_divide(tmp_path):
    case = dense_of(tmp_path, pico.model("opt", layers=1, width=36))
    with pytest.raises(FitError, match=r"4:8: .*k_proj\.weight has 36 columns, no multiple of 8"):
        pruned(wanda, case, 0.3, pattern="4:8")


@pytest.mark.parametrize("options, message", [
    ({"sequences": 17}, r"compose\.sequences 17: there are 16 calibration"),
    ({"sequences": 0}, "sequences is 0; give a number at least 1"),
    ({"batch_sequences": 0}, "batch_sequences is 0; give a number at least 1"),
    ({"damp": -0.1}, r"damp is -0\.1; give a number at least 0"),
    ({"block_size": 0}, "block_size is 0; give a number at least 1"),
    ({"block_size": 12, "pattern": "4:8"}, "block_size 12 with pattern 4:8: give a multiple of 8"),
])
def test_what_cannot_be_is_named(dense, options, message):
    with pytest.raises(ValueError, match=message):
        pruned(sparsegpt, dense, 0.3, **options)


def test_states_that_are_not_finite_are_refused(dense, tmp_path):
    h_STD = dense.hidden.state(0)
    h_STD[3, 2, 1] = torch.nan
    case = dense._replace(hidden=stored.write(tmp_path / "h.zarr", h_STD[None]))
    with pytest.raises(FitError, match="state 0 of the pruned model is not finite"):
        pruned(wanda, case, 0.3)
