"""ReplaceMe: beside a NumPy solution from the models' own hooks, a planted map found again, plain checkpoints."""
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kdp_core import hidden, modeling, models
from kdp_core.fold import fold
from kdp_core.modeling import decoder_layers
from kdp_core.records import Selection
from kdp_core.replaceme import LAST, compose
from kdp_core.states import FitError
from tests import pico
from tests.kdp_core import stored

RUN = (3, 5)
IDS_ST = torch.arange(2, 26).view(2, 12)


class Dense(NamedTuple):
    """A checkpoint with its states."""
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, model):
    model.save_pretrained(root / "model")
    hidden.extract(model, stored.tokens(), root / "h.zarr", dtype="float32")
    return Dense(root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module", params=["llama", "opt", "qwen3", "mistral"])
def dense(request, tmp_path_factory):
    return dense_of(tmp_path_factory.mktemp(request.param), pico.lively(pico.model(request.param, layers=6)))


def selection(*blocks):
    return Selection(list(blocks), [0.0] * len(blocks), "angular", 0.2, 0.2, 0.5, 3, [])


def composed(dense, *blocks, **options):
    return compose(dense.folder, dense.hidden, stored.tokens(), selection(*(blocks or [RUN])), heldout=0.25, **options)


def last_of(model, layer):
    return decoder_layers(model)[layer].get_submodule(LAST[model.config.model_type])


@torch.no_grad()
def caught(model, ids_ST, layer):
    """What the MLP of a layer gives, from a pass of the whole model."""
    seen = []
    hook = last_of(model, layer).register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids_ST)
    hook.remove()
    return seen[0].view(*ids_ST.shape, -1)


def split(seed=0):
    """Sequences fitted on and judged on."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    return order[4:], order[:4]


def given(dense, rows):
    """X = m, Y and x + m of these sequences, in NumPy's double precision."""
    m_ND = caught(dense.model, stored.tokens().ids_ST[rows], RUN[0] - 1).flatten(0, 1).double().numpy()
    start_ND, stop_ND = (dense.hidden.state(k)[rows].flatten(0, 1).double().numpy() for k in RUN)
    return m_ND, stop_ND - (start_ND - m_ND), stop_ND


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_the_map_is_the_ridge_solution_and_goes_into_the_last_matrix(dense, ridge):
    plan, _, fits, stats = composed(dense, ridge=ridge)
    (m_ND, goal_ND, _), (held_m_ND, held_goal_ND, held_stop_ND) = (given(dense, rows) for rows in split())
    gram_DD = m_ND.T @ m_ND
    level = ridge * np.trace(gram_DD) / 32
    rows = np.vstack([m_ND, np.sqrt(level) * np.eye(32)])
    t_DD = np.linalg.lstsq(rows, np.vstack([goal_ND, np.zeros((32, 32))]), rcond=None)[0]
    last, prefix = last_of(dense.model, 2), modeling.layers_prefix(dense.model.config.model_type)
    name = f"{prefix}2.{LAST[dense.model.config.model_type]}"
    np.testing.assert_allclose(plan.tensors[f"{name}.weight"].numpy(), t_DD.T @ last.weight.detach().double().numpy(),
                               atol=1e-3)
    assert set(plan.tensors) == {f"{name}.weight"} | ({f"{name}.bias"} if last.bias is not None else set())
    if last.bias is not None:
        np.testing.assert_allclose(plan.tensors[f"{name}.bias"].numpy(), t_DD.T @ last.bias.detach().double().numpy(),
                                   atol=1e-3)
    error = ((held_m_ND @ t_DD - held_goal_ND) ** 2).sum() / ((held_stop_ND - held_stop_ND.mean(0)) ** 2).sum()
    assert fits == [{"block": RUN, "heldout_error": pytest.approx(error, rel=1e-2), "params": 0}]
    assert plan.modules == [] and stats["tokens"] == 12 * 24


def planted(dense, path, *, massive=0):
    """The model's states, but the run's last one is x + m M; also M. Some tokens of it may be made massive."""
    map_DD = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    m_STD = caught(dense.model, stored.tokens().ids_ST, RUN[0] - 1)
    h_LSTD = torch.stack([dense.hidden.state(k) for k in dense.hidden.layers])
    h_LSTD[RUN[1]] = h_LSTD[RUN[0]] - m_STD + m_STD @ map_DD
    h_LSTD[RUN[1], :, :massive] = 1e3
    return dense._replace(hidden=stored.write(path, h_LSTD)), map_DD


def recovered(plan, dense, map_DD):
    """Largest error of the fitted matrix beside the planted one."""
    name = f"{modeling.layers_prefix(dense.model.config.model_type)}2.{LAST[dense.model.config.model_type]}.weight"
    return (plan.tensors[name] - map_DD.T @ last_of(dense.model, 2).weight.detach()).abs().max().item()


def test_a_planted_map_is_found_again(dense, tmp_path):
    case, map_DD = planted(dense, tmp_path / "h.zarr")
    made = composed(case, ridge=1e-10)
    assert made.fits[0]["heldout_error"] < 1e-6 and recovered(made.plan, dense, map_DD) < 0.02


def test_massive_tokens_are_left_out_where_asked(dense, tmp_path):
    case, map_DD = planted(dense, tmp_path / "h.zarr", massive=1)
    assert recovered(composed(case, ridge=1e-10, massive="mask").plan, dense, map_DD) < 0.02
    assert recovered(composed(case, ridge=1e-10, massive="raw").plan, dense, map_DD) > 1.0


def test_batches_do_not_matter(dense):
    one, other = (composed(dense, batch_sequences=size).plan.tensors for size in (1, 8))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_that_do_nothing_go_without_a_trace(dense, tmp_path):
    """Where the run only hands its state on, T is the identity, and the pruned model the dense one."""
    family = dense.model.config.model_type
    model = pico.lively(pico.model(family, layers=6))
    for layer in range(*RUN):
        for name in (LAST[family], "self_attn.out_proj" if family == "opt" else "self_attn.o_proj"):
            for parameter in decoder_layers(model)[layer].get_submodule(name).parameters():
                parameter.zero_()
    case = dense_of(tmp_path, model)
    plan = composed(case, ridge=1e-10).plan._replace(drop=[(layer, "whole") for layer in range(*RUN)])
    facts = fold(plan, case.folder, tmp_path / "out")
    pruned = models.load_model(tmp_path / "out")
    torch.testing.assert_close(pruned(IDS_ST).logits, model(IDS_ST).logits, atol=0.02, rtol=0.01)
    assert type(pruned) is type(model) and facts.params_added == 0 and len(decoder_layers(pruned)) == 4
    assert not (tmp_path / "out" / modeling.FILE).exists()
    assert facts.params_after == facts.params_before - 2 * models.count_params(decoder_layers(model)[3])


def test_a_family_with_a_norm_after_its_mlp_is_refused(tmp_path):
    case = dense_of(tmp_path, pico.model("gemma3_text", layers=6))
    with pytest.raises(FitError, match="cannot be folded into a gemma3_text model: a norm follows its MLPs"):
        composed(case)


@pytest.mark.parametrize("blocks, options, message", [
    ([(0, 2)], {}, r"one run of layers into the layer before it; the blocks are \[\(0, 2\)\]"),
    ([(1, 2), (3, 4)], {}, r"the blocks are \[\(1, 2\), \(3, 4\)\]"),
    ([RUN], {"massive": "bypass"}, r"compose\.massive 'bypass': choose one of raw, mask"),
])
def test_what_cannot_be_is_named(dense, blocks, options, message):
    with pytest.raises(FitError, match=message):
        composed(dense, *blocks, **options)


@pytest.mark.parametrize("heldout", [0.0, 1.0, 0.99])
def test_a_share_that_leaves_no_sequence_is_refused(dense, heldout):
    with pytest.raises(FitError, match=rf"compose\.heldout {heldout} of 16 sequences leaves none on one side"):
        compose(dense.folder, dense.hidden, stored.tokens(), selection(RUN), heldout=heldout)
