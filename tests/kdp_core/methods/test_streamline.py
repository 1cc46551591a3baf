"""LLM-Streamline: beside AdamW written out on the model's own forward pass, no look ahead, plain checkpoints."""
import functools
import math
from typing import Any, NamedTuple

import pytest
import torch

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Selection
from kdp_core.methods import METHODS, streamline
from kdp_core.methods._train import TrainingFailed
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.folded import FILE
from kdp_core.model.sizes import count_params
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core import stored

RUN = (4, 7)
"""Of 8 layers; Gemma's layer 5, which goes, is its one layer of full attention."""
tokens = functools.cache(stored.tokens)


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, model):
    model.save_pretrained(root / "model")
    hidden.extract(model, tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3_text"])
def dense(request, tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp(request.param), pico.lively(pico.model(request.param, layers=8)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp("llama"), pico.lively(pico.model("llama", layers=8)))


def selection(*blocks):
    return Selection(list(blocks), [0.0] * len(blocks), "angular", 0.2, 0.2, 0.5, 3, [],
                     sum(stop - start for start, stop in blocks))


def composed(case, *blocks, method="streamline", **options):
    options = {"epochs": 1, "lr": 1e-2, "min_lr": 1e-3, "batch_sequences": 4, "heldout": 0.25, **options}
    return METHODS[method].compose(case.folder, case.hidden, tokens(), selection(*(blocks or [RUN])), **options)


@pytest.mark.parametrize("method, weight", [("streamline", "none"), ("streamline_relative", "inverse_norm")])
def test_the_row_of_the_paper_weighs_all_tokens_alike_and_ours_by_relative_errors(llama, method, weight):
    made, asked = composed(llama, method=method), composed(llama, token_weight=weight)
    assert made.plan.method == method and made.curve[1]["loss"] == asked.curve[1]["loss"]
    assert equal(made.plan.tensors, asked.plan.tensors)


def edited(case, path, edit):
    """The case with other stored states; `edit` changes h_LSTD in its place."""
    h_LSTD = torch.stack([case.hidden.state(k) for k in case.hidden.layers])
    edit(h_LSTD)
    return case._replace(hidden=stored.write(path, h_LSTD))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_the_model(model, number, h_BTD):
    """What layer `number` makes of these states in a forward pass of the whole model."""
    seen = []

    def before(layer, args, kwargs):
        return ((h_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h_BTD})

    def after(layer, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    layer = decoder_layers(model)[number]
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    model(torch.zeros(h_BTD.shape[:2], dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return seen[0]


def mean_loss(model, case, rows, keep_ST, token_weight):
    """Token by token."""
    predicted_BTD = by_the_model(model, RUN[0], case.hidden.state(RUN[0])[rows])
    losses = []
    for predicted_TD, goal_TD, keep_T in zip(predicted_BTD, case.hidden.state(RUN[1])[rows], keep_ST[rows],
                                             strict=True):
        for predicted_D, goal_D, keep in zip(predicted_TD, goal_TD, keep_T, strict=True):
            if keep:
                squares_D = (predicted_D - goal_D) ** 2
                losses.append(squares_D.sum() / (goal_D ** 2).sum() if token_weight == "inverse_norm"
                              else squares_D.mean())
    return torch.stack(losses).mean()


def literal(case, keep_ST, *, token_weight, epochs=2, lr=1e-2, min_lr=1e-3, decay=0.1, clip=0.5):
    """AdamW from its paper, the sequences four at a time: the weights of the best epoch and its held-out losses."""
    model = pico.lively(pico.model(case.model.config.model_type, layers=8))
    parts = dict(decoder_layers(model)[RUN[0]].named_parameters())
    order, generator = torch.randperm(16, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    held, kept = order[:4].sort().values, order[4:].sort().values
    first, second = ({name: torch.zeros_like(part) for name, part in parts.items()} for _ in range(2))
    with torch.no_grad():
        judged = [mean_loss(model, case, held, keep_ST, token_weight).item()]
    best, step, steps = {name: part.detach().clone() for name, part in parts.items()}, 0, 3 * epochs
    for _ in range(epochs):
        shuffled = kept[torch.randperm(12, generator=generator)]
        for at in range(0, 12, 4):
            loss = mean_loss(model, case, shuffled[at:at + 4], keep_ST, token_weight)
            grads = dict(zip(parts, torch.autograd.grad(loss, list(parts.values())), strict=True))
            norm = math.sqrt(sum((grad ** 2).sum().item() for grad in grads.values()))
            rate = min_lr + (lr - min_lr) * (1 + math.cos(math.pi * step / (steps - 1))) / 2
            step += 1
            for name, part in parts.items():
                grad = grads[name] * min(1.0, clip / norm)
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad ** 2
                m, v = first[name] / (1 - 0.9 ** step), second[name] / (1 - 0.999 ** step)
                part.data = part.data - rate * decay * part.data - rate * m / (v.sqrt() + 1e-8)
        with torch.no_grad():
            judged.append(mean_loss(model, case, held, keep_ST, token_weight).item())
        if judged[-1] < min(judged[:-1]):
            best = {name: part.detach().clone() for name, part in parts.items()}
    return best, judged


def beside_literal(case, keep_ST, **options):
    """Compare weights, held-out losses and the kept epoch."""
    best, judged = literal(case, keep_ST, token_weight=options["token_weight"])
    made = composed(case, epochs=2, weight_decay=0.1, clip=0.5, **options)
    prefix = f"{family_of(case.model).prefix}{RUN[0]}."
    assert set(made.plan.tensors) == {prefix + name for name in best}
    for name, weight in best.items():
        # a bias of the keys moves all scores of a query alike: its gradient is rounding, which Adam blows up
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(made.plan.tensors[prefix + name], weight, atol=1e-4, rtol=1e-4)
    assert [row["heldout_loss"] for row in made.curve] == pytest.approx(judged, rel=1e-3)
    assert made.stats["epoch"] == judged.index(min(judged)) and made.stats["heldout_loss"] == pytest.approx(min(judged))
    return made


def test_the_layer_is_trained_as_written(dense):
    made = beside_literal(dense, torch.ones(16, 24, dtype=torch.bool), token_weight="inverse_norm")
    assert made.stats["epoch"] > 0 and made.stats["tokens"] == 12 * 24
    assert made.plan.drop == [(5, "whole"), (6, "whole")] and made.plan.modules == []


@pytest.mark.parametrize("token_weight", ["inverse_norm", "none"])
@pytest.mark.parametrize("massive", ["raw", "mask"])
def test_massive_tokens_and_weights_enter_the_loss_as_asked(llama, tmp_path, massive, token_weight):
    keep_ST = torch.ones(16, 24, dtype=torch.bool)

    def edit(h_LSTD):
        h_LSTD[RUN[0], :, 2] *= 100
        h_LSTD[RUN[1], ::3, 5] *= 100

    case = edited(llama, tmp_path / "h.zarr", edit)
    if massive == "mask":
        keep_ST[:, 2], keep_ST[::3, 5] = False, False
    beside_literal(case, keep_ST, massive=massive, token_weight=token_weight)


def test_no_position_sees_those_after_it(dense, tmp_path):
    """The last token does not count: what it holds may not matter, while what the first holds does."""
    def holding(name, position, seed):
        def edit(h_LSTD):
            h_LSTD[RUN[1], :, -1] = 1e3
            h_LSTD[RUN[0], :, position] = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        return composed(edited(dense, tmp_path / f"{name}.zarr", edit), massive="mask").plan.tensors

    one, other, first = holding("one", -1, 1), holding("other", -1, 2), holding("first", 0, 2)
    for name in one:
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=0)
    assert max((first[name] - one[name]).abs().max() for name in one) > 1e-3


def test_the_checkpoint_is_plain_and_does_what_was_judged(dense, tmp_path):
    made = composed(dense)
    facts, pruned = fold(made.plan, dense.folder, tmp_path / "out"), checkpoints.load_model(tmp_path / "out")
    assert type(pruned) is type(dense.model) and not (tmp_path / "out" / FILE).exists()
    assert facts.params_added == 0 and facts.layers_removed == 2 and len(decoder_layers(pruned)) == 6
    per_layer = count_params(decoder_layers(dense.model)[0])
    assert facts.params_before - facts.params_after == 2 * per_layer == 2 * made.fits[0]["params"]
    if (types := getattr(dense.model.config, "layer_types", None)) is not None:
        assert pruned.config.layer_types == [*types[:5], types[7]]
    held = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:4].sort().values
    ids_ST = tokens().ids_ST[held]
    found_ND = hidden.boundary_states(pruned, ids_ST, [5])[0].flatten(0, 1)
    goal_ND = dense.hidden.state(RUN[1])[held].flatten(0, 1)
    error = ((found_ND - goal_ND) ** 2).sum() / ((goal_ND - goal_ND.mean(0)) ** 2).sum()
    assert made.fits[0]["block"] == RUN and made.fits[0]["heldout_error"] == pytest.approx(error.item(), rel=1e-3)
    changed_ST = ids_ST.clone()
    changed_ST[:, -1] = (changed_ST[:, -1] + 7) % 384
    before, after = (pruned(ids).logits.detach() for ids in (ids_ST, changed_ST))
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


def test_a_run_whose_other_layers_do_nothing_is_its_first_layer(tmp_path):
    model = pico.lively(pico.model("llama", layers=8))
    with torch.no_grad():
        for layer in range(RUN[0] + 1, RUN[1]):
            decoder_layers(model)[layer].mlp.down_proj.weight.zero_()
            decoder_layers(model)[layer].self_attn.o_proj.weight.zero_()
    made = composed(dense_of(tmp_path, model), epochs=0)
    assert made.stats["heldout_loss"] < 1e-10 and made.fits[0]["heldout_error"] < 1e-10


def test_the_start_is_kept_where_training_does_harm(llama):
    start = {f"model.layers.4.{name}": weight for name, weight in decoder_layers(llama.model)[4].named_parameters()}
    made = composed(llama, lr=3.0)
    assert made.curve[1]["heldout_loss"] > made.curve[0]["heldout_loss"] and made.stats["epoch"] == 0
    assert equal(made.plan.tensors, start) and equal(composed(llama, epochs=0).plan.tensors, start)


def test_the_rate_ends_where_asked_and_the_record_can_be_stored(llama, tmp_path):
    made = composed(llama, epochs=3, lr=1e-2, min_lr=1e-3)
    # three steps an epoch: steps 2, 5 and 8 of 0 to 8
    rates = [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (2, 5, 8)]
    assert [row["lr"] for row in made.curve] == [None, *(pytest.approx(rate) for rate in rates)]
    assert made.curve[0]["loss"] is None and [row["epoch"] for row in made.curve] == [0, 1, 2, 3]
    store.write(tmp_path / "composed.safetensors", made)
    again = store.read(tmp_path / "composed.safetensors")
    assert equal(again.plan.tensors, made.plan.tensors) and again.curve == made.curve and again.fits == made.fits


def test_the_seed_decides_and_torchs_own_generator_stays(llama):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = composed(llama, seed=1).plan.tensors
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(composed(llama, seed=1).plan.tensors, one) and not equal(composed(llama, seed=2).plan.tensors, one)


def test_the_layer_is_trained_in_single_precision_whatever_the_models(dense):
    half, single = composed(dense, dtype="bfloat16"), composed(dense)
    assert all(weight.dtype == torch.float32 for weight in half.plan.tensors.values())
    assert half.stats["epoch"] == 1
    assert half.stats["heldout_loss"] == pytest.approx(single.stats["heldout_loss"], rel=0.1)


def test_its_parameters_are_those_of_a_layer(llama):
    facts = checkpoints.facts(llama.model, source="pico", sha256="")
    assert streamline.module_params(facts, {}) == count_params(decoder_layers(llama.model)[3])


@pytest.mark.parametrize("options, message", [
    ({"massive": "bypass"}, r"massive is 'bypass'; choose one of raw, mask"),
    ({"token_weight": "norm"}, r"token_weight is 'norm'; choose one of inverse_norm, none"),
    ({"epochs": -1}, r"epochs is -1; give a number at least 0"),
    ({"batch_sequences": 0}, r"batch_sequences is 0; give a number at least 1"),
    ({"lr": 1e-4, "min_lr": 1e-3}, r"compose\.lr is 0\.0001 and min_lr 0\.001; the rate falls from lr"),
    ({"lr": 0.0, "min_lr": 0.0}, r"lr is 0\.0; give a number above 0"),
    ({"clip": 0.0}, r"clip is 0\.0; give a number above 0"),
    ({"heldout": 0.99}, r"compose\.heldout 0\.99 of 16 sequences leaves none to fit on or none to judge on"),
])
def test_options_that_cannot_be_are_named(llama, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        composed(llama, **options)


@pytest.mark.parametrize("blocks", [[(3, 4)], [(1, 3), (5, 7)]])
def test_runs_that_cannot_be_are_named(llama, blocks):
    with pytest.raises(FitError, match="replaces one run of two layers or more by one layer; the blocks are"):
        composed(llama, *blocks)


def test_states_that_no_layer_can_learn_are_named(llama, tmp_path):
    broken = edited(llama, tmp_path / "nan.zarr", lambda h_LSTD: h_LSTD[RUN[1], 0, 0].fill_(math.nan))
    with pytest.raises(FitError, match=r"nan\.zarr: state 7 is not finite; extract the hidden states again"):
        composed(broken)
    with pytest.raises(TrainingFailed, match=r"the loss is (nan|inf); lower compose\.lr"):
        composed(llama, lr=1e30)
