"""Rows of rare tokens: which tokens are rare, the fit of their rows, the budget, the whole method, refusals."""
import functools

import pytest
import torch
from torch.nn import functional

from kdp_core.methods import _outputs
from kdp_core.methods.kdp_narrow import fit, rare
from kdp_core.methods.kdp_narrow.budget import Ladder, allocate, by_budget
from kdp_core.methods.kdp_narrow.compose import compose
from kdp_core.methods.kdp_narrow.fit import Closed
from kdp_core.methods.kdp_narrow.ladders import parts_of
from kdp_core.methods.kdp_narrow.rare import Statistics, reduced
from kdp_core.model import checkpoints
from kdp_core.model.distil import Head
from kdp_core.model.passes import Passes
from kdp_core.model.stand_ins import RareHead
from kdp_core.model.surgery import scale_of
from kdp_core.prune import finetune
from kdp_core.prune.fold import fold
from kdp_core.states.block import FitError
from tests.kdp_core import stored
from tests.kdp_core.methods.kdp_narrow.test_compose import QUICK, searched

RANK = 0.25


@pytest.fixture(scope="module")
def of_family(tmp_path_factory):
    return functools.cache(lambda family: searched(tmp_path_factory.mktemp(family), family, layers=4, rare_rank=RANK))


def selection(dense, ratio=0.2, price=1e-3):
    """The selection with cheap rare rows; an untrained model pays much for every row."""
    return by_budget(dense.search, dense.facts, ratio=ratio, k_max=3, module_params=0, rare_price=price)


def composed(dense, **options):
    return compose(dense.folder, dense.hidden, stored.tokens(), selection(dense), **{**QUICK, **options})


def random_case(vocabulary=60, width=8):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(vocabulary, width)
    embedding.weight.data = torch.randn(vocabulary, width, generator=generator)
    half = torch.randn(width, width, generator=generator, dtype=torch.float64)
    frequency = torch.rand(vocabulary, generator=generator, dtype=torch.float64)
    metric = half @ half.T + torch.eye(width, dtype=torch.float64)
    return embedding, Statistics(frequency, metric, metric)


def test_frequent_tokens_keep_their_rows_and_a_full_rank_keeps_all():
    embedding, known = random_case()
    few, whole = (reduced(embedding, known, 20, rank) for rank in (2, 8))
    frequent = known.frequency_V.argsort(descending=True)[:20]
    assert torch.equal(few.rows()[frequent], embedding.weight[frequent])
    assert not torch.allclose(few.rows(), embedding.weight, atol=0.1)
    assert torch.allclose(whole.rows(), embedding.weight, atol=1e-5)


def test_no_other_rows_of_this_rank_have_a_smaller_weighted_error():
    embedding, known = random_case()
    rank, order = 3, known.frequency_V.argsort(descending=True)[20:]
    rows, weight = embedding.weight.detach().double(), known.frequency_V[order].sqrt()

    def error(candidates_VD):
        d_UD = (candidates_VD.double() - rows)[order]
        return float((weight * ((d_UD @ known.metric_DD) * d_UD).sum(dim=1)).sum())

    # the best rows of this rank, from the singular values of the weighted rows
    mean = weight @ rows[order] / weight.sum()
    root = torch.linalg.cholesky(known.metric_DD)
    values = torch.linalg.svdvals(weight.sqrt()[:, None] * (rows[order] - mean) @ root)
    assert error(reduced(embedding, known, 20, rank).rows()) == pytest.approx(float(values[rank:].square().sum()),
                                                                               rel=1e-2)


def dense_case(dense):
    """The parts of a dense model, statistics, and states that enter its head."""
    passes = Passes(checkpoints.load_model(dense.folder).requires_grad_(False), dense.hidden.tokens)
    known = rare.statistics(passes, dense.hidden, stored.tokens(), torch.arange(12), torch.arange(8), 4, 0)
    return passes, known, rare.head_inputs(passes, dense.hidden, torch.arange(12))


def test_the_states_that_enter_the_head_are_those_of_the_dense_model(of_family):
    dense = of_family("llama")
    passes, _, states = dense_case(dense)
    with torch.no_grad():
        whole = passes.model.base_model(stored.tokens().ids_ST[:12]).last_hidden_state
    assert torch.allclose(states.view(12, -1, states.shape[-1]), whole[:, ::rare.EVERY], atol=5e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_fisher_information_predicts_the_divergence_of_small_errors(of_family, family):
    dense, which, size, measured, predicted = of_family(family), torch.arange(8), 1e-3, [], []
    passes = Passes(checkpoints.load_model(dense.folder).requires_grad_(False), dense.hidden.tokens)
    start, scale = dense.hidden.state(0, which), scale_of(passes.model.get_input_embeddings())
    assert (scale == 1) == (family == "llama")

    @torch.no_grad()
    def logp(states):
        states = passes.run(states, range(len(passes.layers)))[:, ::rare.EVERY]
        return passes.head(passes.to_head(states)).log_softmax(-1).double().flatten(0, 1)

    dense_logp = logp(start)
    for seed in range(12):
        noise = size * scale * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        measured.append(functional.kl_div(logp(start + noise), dense_logp, reduction="batchmean", log_target=True))
        known = rare.statistics(passes, dense.hidden, stored.tokens(), which, which, 4, seed)
        predicted.append(size ** 2 * known.fisher_DD.trace() / 2)
    assert torch.stack(measured).mean().item() == pytest.approx(torch.stack(predicted).mean().item(), rel=0.4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_basis_and_mean_are_trained_to_the_outputs_of_the_dense_head(of_family, monkeypatch, family):
    for name, value in {"HEAD_TOKENS": 8, "RATES": (0.03, 0.03), "READ_PRICE": 0.0}.items():
        monkeypatch.setattr(rare, name, value)
    passes, known, states = dense_case(of_family(family))
    embedding = passes.model.get_input_embeddings()

    def divergence(made):
        with torch.no_grad():
            head = Head(RareHead(made), passes.head.soft_cap)
            return functional.kl_div(head(states).log_softmax(-1), passes.head(states).log_softmax(-1),
                                     reduction="sum", log_target=True).item()

    before, after = reduced(embedding, known, 30, 8), reduced(embedding, known, 30, 8)
    rare.trained(after, passes, known, states.repeat(20, 1), 0)
    assert divergence(after) < 0.99 * divergence(before)
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("frequent", "rare", "place"))
    assert not any(weight.requires_grad for weight in after.parameters())


def test_a_high_price_of_reading_lowers_the_error_of_the_rows_that_are_read(of_family, monkeypatch):
    monkeypatch.setattr(rare, "HEAD_TOKENS", 8)
    passes, known, states = dense_case(of_family("llama"))
    embedding, errors = passes.model.get_input_embeddings(), {}

    def error(made):
        d_VD = (made.rows() - embedding.weight).double()
        return float((known.frequency_V * ((d_VD @ known.fisher_DD) * d_VD).sum(dim=1)).sum())

    for price in (0.0, 1e6):
        monkeypatch.setattr(rare, "READ_PRICE", price)
        errors[price] = error(rare.trained(reduced(embedding, known, 30, 8), passes, known, states, 0))
    assert errors[1e6] < error(reduced(embedding, known, 30, 8)) and errors[1e6] < errors[0.0]


def test_frequencies_are_occurrences_and_the_models_own_chances(of_family):
    dense, tokens = of_family("llama"), stored.tokens()
    passes, counted = Passes(checkpoints.load_model(dense.folder).requires_grad_(False), dense.hidden.tokens), \
        torch.arange(12)
    known = rare.statistics(passes, dense.hidden, tokens, counted, torch.arange(8), 4, 0)
    ids = tokens.ids_ST[counted]
    assert known.frequency_V.sum().item() == pytest.approx(2 * ids.numel(), rel=1e-5)
    assert (known.frequency_V > torch.bincount(ids.flatten(), minlength=len(known.frequency_V))).all()
    assert known.metric_DD.diagonal().mean().item() == pytest.approx(1 + rare.READ_WEIGHT)
    assert (torch.linalg.eigvalsh(known.metric_DD) > -1e-9).all()


def test_the_budget_counts_the_parameters_that_a_part_adds():
    embedding, heads = Ladder(10, 4, {5: 0.1, 2: 0.3}, 1, fixed=7), Ladder(5, 10, {0: 5.0}, 1)
    assert embedding.saved(10) == 0 and embedding.saved(5) == 13
    # eight units of the embedding are 32 - 7 parameters
    assert allocate([embedding, heads], 25, 1) == [2, 5]
    # one unit alone would add parameters, so no level keeps 9 of 10
    assert allocate([embedding._replace(losses={9: 0.0}), heads], 10, 1) == [10, 4]


def test_the_price_decides_how_many_tokens_keep_their_rows(of_family):
    kept = [selection(of_family("llama"), price=price).candidates[-1]["kept"] for price in (1e-3, 1e-2, 1e3)]
    assert kept[0] <= kept[1] <= kept[2] == of_family("llama").facts.vocabulary and kept[0] < kept[2]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_folded_model_is_what_was_fitted(of_family, tmp_path, family):
    dense, ids_ST = of_family(family), stored.tokens().ids_ST[:2]
    chosen, found = selection(dense), composed(dense)
    entry = chosen.candidates[-1]
    assert entry["part"] == rare.PART and entry["kept"] < entry["of"] == dense.facts.vocabulary
    facts = fold(found.plan, dense.folder, tmp_path / "pruned")
    assert facts.params_removed == pytest.approx(chosen.ratio_planned, abs=0.002)
    model, pruned = checkpoints.load_model(dense.folder), checkpoints.load_model(tmp_path / "pruned")
    embedding = pruned.get_input_embeddings()
    assert isinstance(pruned.lm_head, RareHead) and len(embedding.frequent) == entry["kept"]
    frequent = (embedding.place < entry["kept"]).nonzero()[:, 0]
    assert torch.equal(embedding.rows()[frequent], model.get_input_embeddings().weight[frequent])
    assert torch.allclose(rare.start_states(embedding, frequent[None]), model.get_input_embeddings()(frequent[None]))
    with torch.no_grad():
        states = pruned.base_model(ids_ST).last_hidden_state
        logits = states @ embedding.rows().T
        cap = getattr(pruned.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        assert torch.allclose(pruned(ids_ST).logits, logits, atol=1e-4)
    pruned.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(checkpoints.load_model(tmp_path / "again")(ids_ST).logits, pruned(ids_ST).logits)


def test_the_writers_correct_the_errors_of_the_new_rows(of_family):
    dense, which, errors, ids_ST = of_family("llama"), torch.arange(16), {}, stored.tokens().ids_ST
    whole = [(part, part.units) for part in parts_of(checkpoints.load_model(dense.folder))]
    for solve in (True, False):
        passes = Passes(checkpoints.load_model(dense.folder).requires_grad_(False), dense.hidden.tokens)
        known = rare.statistics(passes, dense.hidden, stored.tokens(), which, which, 4, 0)
        embedding = reduced(passes.model.get_input_embeddings(), known, 30, 24)
        errors[solve] = [error for *_, error in fit.in_order(
            passes, dense.hidden, whole, which, which, Closed(1e-3, solve, 4),
            rare.start_states(embedding, ids_ST[torch.cat((which, which))]))]
    assert sum(errors[True]) < 0.9 * sum(errors[False])


@pytest.mark.parametrize("trained", [True, False])
def test_the_search_says_whether_the_rows_are_trained(tmp_path, monkeypatch, trained):
    calls = []

    def count(made, *args):
        calls.append(len(made.frequent))
        return made

    monkeypatch.setattr(rare, "trained", count)
    dense = searched(tmp_path, "llama", layers=2, rare_rank=RANK, rare_trained=trained)
    assert len(calls) == trained * len(rare.RUNGS)
    composed(dense, epochs=0)
    assert calls[len(rare.RUNGS):] == [selection(dense).candidates[-1]["kept"]] * trained


@pytest.mark.parametrize(("most", "judged"), [(1, 2), (3, 3), (64, 4)])
def test_the_embedding_is_judged_on_at_most_a_quarter_of_the_sequences(tmp_path, monkeypatch, most, judged):
    seen = {}

    def ladder(passes, tokens, known, states_ND, rank, which, compared, seed):
        seen["judged"] = set(which.tolist())
        return {}

    def statistics(passes, hidden, tokens, counted, fitted, batch, seed):
        seen["others"] = set(counted.tolist()) | set(fitted.tolist())

    monkeypatch.setattr(rare, "JUDGED", most)
    monkeypatch.setattr(rare, "ladder", ladder)
    monkeypatch.setattr(rare, "statistics", statistics)
    searched(tmp_path, "llama", layers=2, rare_rank=RANK)
    assert len(seen["judged"]) == judged and not seen["judged"] & seen["others"]
    assert len(seen["judged"] | seen["others"]) == 16


@pytest.mark.parametrize("trained", ["writers", "all"])
def test_the_rows_stay_as_they_are_and_the_dense_head_is_the_teacher(of_family, monkeypatch, trained):
    seen = {}

    def train(passes, path, data, weights, *args, **options):
        seen.update(passes=passes, data=data, weights=weights)
        return []

    monkeypatch.setattr(_outputs, "train", train)
    dense = of_family("llama")
    composed(dense, epochs=1, trained=trained)
    model = seen["passes"].model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert seen["weights"] and all(".layers." in names[id(weight)] for weight in seen["weights"])
    assert isinstance(seen["passes"].head.linear, RareHead)
    assert torch.equal(seen["data"].head.linear.weight, checkpoints.load_model(dense.folder).lm_head.weight)
    which = torch.tensor([3, 0])
    assert torch.equal(seen["data"].start(which), model.get_input_embeddings()(stored.tokens().ids_ST[which]))


def test_a_model_with_rare_rows_can_be_fine_tuned(of_family, tmp_path):
    dense = of_family("llama")
    facts = fold(composed(dense).plan, dense.folder, tmp_path / "pruned")
    finetune.finetune(dense.folder, tmp_path / "pruned", tmp_path / "tuned", stored.tokens(), facts, rank=2, epochs=1,
                      heldout=0.2)
    tuned = checkpoints.load_model(tmp_path / "tuned")
    assert isinstance(tuned.lm_head, RareHead) and tuned.head_adapter.a.weight.shape[0] == 2


@pytest.mark.parametrize(("family", "share", "reason"), [
    ("qwen3", RANK, "not tied"), ("opt", RANK, "several embeddings"), ("llama", 0.001, "rank would be 0"),
    ("llama", 1.0, "rank would be 32")])
def test_an_embedding_that_cannot_be_reduced_is_refused(tmp_path, family, share, reason):
    with pytest.raises(FitError, match=rf"{reason}.*set search\.rare_rank to 0"):
        searched(tmp_path, family, layers=2, rare_rank=share)
