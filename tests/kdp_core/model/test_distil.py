"""The distillation loss: beside a dense computation of the whole thing, in values, gradients and memory of chunks."""
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kdp_core.model import distil
from kdp_core.model.distil import DistilError, Head, distillation_loss, final_states, head_of, token_losses
from kdp_core.model.stand_ins import RareEmbedding, RareHead
from tests import pico

S, T, D, V = 3, 7, 6, 11


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(seed, soft_cap=None, adapter=None):
    linear = torch.nn.Linear(D, V, bias=False)
    linear.weight.data = randn(V, D, seed=seed)
    return Head(linear, soft_cap, adapter)


def given(seed=0):
    ids_ST = torch.randint(V, (S, T), generator=torch.Generator().manual_seed(seed))
    return randn(S, T, D, seed=1), randn(S, T, D, seed=2), head(3), head(4), ids_ST


@pytest.fixture
def small_chunks(monkeypatch):
    """Five tokens a chunk: several chunks, the last one shorter."""
    monkeypatch.setattr(distil, "CHUNK_NUMBERS", 5 * V)


@pytest.mark.parametrize("kl_weight, temperature", [(0.5, 1.0), (0.8, 2.5), (0.0, 1.0), (1.0, 0.5)])
def test_loss_by_hand(small_chunks, kl_weight, temperature):
    student, teacher, ours, theirs, ids_ST = given()
    s, t = (h.double().numpy()[:, :-1].reshape(-1, D) @ part.linear.weight.detach().double().numpy().T
            for h, part in ((student, ours), (teacher, theirs)))
    logp, logq = log_softmax(t / temperature, axis=1), log_softmax(s / temperature, axis=1)
    kl = np.mean(np.sum(np.exp(logp) * (logp - logq), axis=1))
    ce = -np.mean(log_softmax(s, axis=1)[np.arange(len(s)), ids_ST[:, 1:].flatten().numpy()])
    losses = distillation_loss(student, teacher, ours, theirs, ids_ST, kl_weight=kl_weight, temperature=temperature)
    np.testing.assert_allclose([losses.kl_nats, losses.ce_nats], [kl, ce], rtol=1e-5)
    np.testing.assert_allclose(losses.loss.item(), kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, rtol=1e-5)


def test_gradients_of_chunks_are_those_of_the_whole(monkeypatch):
    def gradients(numbers):
        monkeypatch.setattr(distil, "CHUNK_NUMBERS", numbers)
        student, teacher, ours, theirs, ids_ST = given()
        student.requires_grad_(), teacher.requires_grad_()
        distillation_loss(student, teacher, ours, theirs, ids_ST, kl_weight=0.7, temperature=1.5).loss.backward()
        assert teacher.grad is None and theirs.linear.weight.grad is None
        return student.grad, ours.linear.weight.grad

    for whole, chunked in zip(gradients(10**6), gradients(5 * V), strict=True):
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=1e-5)


def test_no_more_logits_than_a_chunk_are_kept_for_the_backward_pass(small_chunks):
    student, teacher, ours, theirs, ids_ST = given()
    student.requires_grad_()
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distillation_loss(student, teacher, ours, theirs, ids_ST)
    assert max(sizes, default=0) <= max(5 * V, S * T * D)
    assert sum(size == 5 * V for size in sizes) == 0


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_others():
    student, _, ours, theirs, ids_ST = given()
    same = distillation_loss(student, student, ours, ours, ids_ST, kl_weight=1.0)
    assert abs(same.loss.item()) < 1e-6
    assert distillation_loss(student, student, ours, theirs, ids_ST, kl_weight=1.0).loss.item() > 0.1


def gemma():
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=64, final_logit_softcapping=0.5, initializer_range=0.2)).eval()


@pytest.mark.parametrize("family", [*pico.FAMILIES, "gemma3"])
def test_head_of_final_states_gives_the_models_own_logits_and_perplexity(family):
    model = gemma() if family == "gemma3" else pico.model(family)
    ids_ST = torch.arange(2, 42).view(4, 10)
    h_STD = final_states(model, ids_ST, batch_sequences=3)
    with torch.no_grad():
        out = model(ids_ST, labels=ids_ST)
    torch.testing.assert_close(head_of(model)(h_STD), out.logits, atol=1e-5, rtol=1e-5)
    losses = distillation_loss(h_STD, h_STD, head_of(model), head_of(model), ids_ST)
    assert losses.ce_nats.item() == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("change, words", [
    (dict(kl_weight=1.5), "kl_weight 1.5"), (dict(temperature=0.0), "temperature 0.0"),
])
def test_values_out_of_range_are_named(change, words):
    with pytest.raises(DistilError, match=words):
        distillation_loss(*given(), **change)


def test_shapes_that_differ_are_named():
    student, teacher, ours, theirs, ids_ST = given()
    with pytest.raises(DistilError, match=r"\[2, 7, 6\]"):
        distillation_loss(student[:2], teacher, ours, theirs, ids_ST)
    with pytest.raises(DistilError, match="no next token"):
        distillation_loss(student[:, :1], teacher[:, :1], ours, theirs, ids_ST[:, :1])


def test_tokens_may_come_from_anywhere_in_any_order(small_chunks):
    """The whole by hand, and any choice of tokens the mean of theirs."""
    student, teacher, ours, theirs, ids_ST = given()
    rows = (student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten())
    whole = distillation_loss(student, teacher, ours, theirs, ids_ST, kl_weight=0.3, temperature=2.0)
    shuffled = torch.randperm(len(rows[2]), generator=torch.Generator().manual_seed(8))
    options = dict(kl_weight=0.3, temperature=2.0)
    again = token_losses(*(part[shuffled] for part in rows), ours, theirs, **options)
    for one, other in zip(whole, again, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    parts = [token_losses(*(part[chosen] for part in rows), ours, theirs, **options)
             for chosen in (slice(0, 5), slice(5, None))]
    assert whole.loss.item() == pytest.approx((5 * parts[0].loss + 13 * parts[1].loss).item() / 18, rel=1e-5)
    s, t = (part.double().numpy() @ h.linear.weight.detach().double().numpy().T
            for part, h in zip(rows, (ours, theirs), strict=False))
    logp, logq = log_softmax(t / 2, axis=1), log_softmax(s / 2, axis=1)
    assert whole.kl_nats.item() == pytest.approx(np.sum(np.exp(logp) * (logp - logq), axis=1).mean(), rel=1e-5)


@pytest.fixture
def small_slices(monkeypatch):
    """Four tokens of the vocabulary in a slice, and four tokens of the text in a chunk; the last ones are shorter."""
    monkeypatch.setattr(distil, "SLICE", 4)
    monkeypatch.setattr(distil, "SLICED_TOKENS", 4)


@pytest.mark.parametrize("kl_weight, temperature", [(0.5, 1.0), (0.8, 2.5), (0.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_slices_of_the_vocabulary_give_loss_and_gradients_of_the_whole(small_slices, small_chunks, kl_weight,
                                                                       temperature, soft_cap, bias, rank):
    """A head that is not trained is sliced, and a head that is trained is not. An adapter is trained in both cases."""
    student, teacher, ours, theirs, ids_ST = given()
    student.requires_grad_()
    for part in (ours, theirs):
        part.soft_cap = soft_cap
        part.linear.bias = torch.nn.Parameter(randn(V, seed=6)) if bias else None
    ours.adapter = torch.nn.Linear(D, D) if rank else None

    def losses_and_gradients():
        losses = distillation_loss(student, teacher, ours, theirs, ids_ST, kl_weight=kl_weight, temperature=temperature)
        return *losses, *torch.autograd.grad(losses.loss, [student, *(ours.adapter.parameters() if rank else ())])

    whole = losses_and_gradients()
    ours.linear.requires_grad_(False)
    assert [one.shape[-1] for one in ours.slices(ours.prepared(student))] == [4, 4, 3]
    sliced = losses_and_gradients()
    assert whole[3].abs().max() > 1e-3 and not (sliced[1].requires_grad or sliced[2].requires_grad)
    with torch.no_grad():
        alone = distillation_loss(student, teacher, ours, theirs, ids_ST, kl_weight=kl_weight, temperature=temperature)
    for one, other in zip((*sliced, *alone), (*whole, *whole[:3]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("teacher_is_rare", [False, True])
def test_a_head_with_rare_rows_is_sliced_in_the_order_of_its_rows(small_slices, small_chunks, temperature, soft_cap,
                                                                  teacher_is_rare):
    student, teacher, _, theirs, ids_ST = given()
    embedding = RareEmbedding(V, D, frequent=6, rank=2)
    for number, parameter in enumerate(embedding.parameters()):
        parameter.data = randn(*parameter.shape, seed=10 + number)
    embedding.place.copy_(torch.randperm(V, generator=torch.Generator().manual_seed(9)))
    ours = Head(RareHead(embedding), soft_cap)
    theirs = Head(ours.linear if teacher_is_rare else theirs.linear, soft_cap)

    def losses_and_gradient():
        losses = distillation_loss(student.requires_grad_(), teacher, ours, theirs, ids_ST, temperature=temperature)
        return *losses, *torch.autograd.grad(losses.loss, [student])

    # the rows are trained, so the whole head is called
    whole = losses_and_gradient()
    embedding.requires_grad_(False)
    assert [one.shape[-1] for one in ours.slices(student)] == [4, 2, 4, 1]
    for one, other in zip(losses_and_gradient(), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        for one, other in zip(distillation_loss(student, teacher, ours, theirs, ids_ST, temperature=temperature),
                              whole, strict=False):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_no_logits_of_a_sliced_head_are_kept_for_the_backward_pass(small_slices, small_chunks):
    student, teacher, ours, theirs, ids_ST = given()
    ours.linear.requires_grad_(False)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distillation_loss(student.requires_grad_(), teacher, ours, theirs, ids_ST)
    assert sizes == [S * (T - 1) * D]


@torch.no_grad()
def test_logits_far_apart_do_not_overflow_in_slices(small_slices):
    student, teacher, ours, theirs, ids_ST = given()
    found = distillation_loss(400 * student, 400 * teacher, ours, theirs, ids_ST)
    s, t = (400 * h.double()[:, :-1].flatten(0, 1) @ part.linear.weight.double().T
            for h, part in ((student, ours), (teacher, theirs)))
    kl = torch.nn.functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found.kl_nats.item() == pytest.approx(kl.item(), rel=1e-5)


@torch.no_grad()
def test_what_acts_before_or_after_a_head_is_kept(small_slices):
    """With a hook, the whole head is called."""
    student, _, ours, _, _ = given()
    whole = ours(student)
    hooks = [lambda: ours.linear.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
             lambda: ours.linear.register_forward_hook(lambda _, args, output: 2 * output)]
    for register in hooks:
        handle = register()
        torch.testing.assert_close(torch.cat(list(ours.slices(ours.prepared(student))), dim=-1), 2 * whole)
        handle.remove()
    torch.testing.assert_close(torch.cat(list(ours.slices(ours.prepared(student))), dim=-1), whole)
    ours.linear.forward = lambda h: whole + 1
    torch.testing.assert_close(torch.cat(list(ours.slices(ours.prepared(student))), dim=-1), whole + 1)
