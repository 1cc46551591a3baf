"""ZipLM: levels beside least squares, the knapsack by brute force, the search by its rules, and whole runs."""
import itertools

import numpy as np
import pytest
import torch

from kdp_core.methods._judge import picked
from kdp_core.methods._select import BlockError
from kdp_core.methods.heads_channels.knapsack import knapsack
from kdp_core.methods.heads_channels.units import PARTS
from kdp_core.methods.heads_channels.ziplm import Level, counts_of, ladder, searched
from kdp_core.model import checkpoints
from kdp_core.prune.fold import fold
from tests import pico
from tests.kdp_core.methods.heads_channels import narrow
from tests.kdp_core.methods.heads_channels.narrow import CHANNELS, TOKENS, composed, logits

OPTIONS = {"draws": 6, "judge_sequences": 4, "shrink": 0.8}
DAMP = 0.01


@pytest.fixture(scope="module", params=pico.DIFFERENT)
def dense(request, tmp_path_factory):
    return narrow.dense_of(tmp_path_factory.mktemp(request.param), request.param)


# Levels ---------------------------------------------------------------------------------------------------------------

def test_levels_shrink_by_the_factor_and_end_with_one_unit():
    assert counts_of(3, "attention", 0.9) == [3, 2, 1]
    assert counts_of(100, "mlp", 0.5) == [100, 50, 25, 12, 6, 3, 2, 1]
    found = counts_of(1536, "mlp", 0.9)
    assert found[1] == 1382 and found[-1] == 1 and sorted(set(found), reverse=True) == found


@pytest.mark.parametrize("batch", [1, 2])
def test_each_level_is_the_best_map_of_its_units_with_its_relative_error(batch):
    generator = torch.Generator().manual_seed(0)
    x_NC, w_DC = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 12), (5, 12)))
    x_NC = x_NC @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    gram_CC = x_NC.T @ x_NC
    h_CC = gram_CC + DAMP * gram_CC.diagonal().mean() * torch.eye(12)
    levels = ladder(w_DC, gram_CC, [12, 7, 4, 1], 10, batch, DAMP)
    assert [len(level.kept_U) for level in levels] == [12, 7, 4, 1] and levels[0].prior == 0
    assert [level.params for level in levels] == [0, 50, 80, 110]
    for before, level in itertools.pairwise(levels):
        kept = level.kept_U.tolist()
        assert set(kept) < set(before.kept_U.tolist()) and level.prior > before.prior
        best_DK = torch.linalg.solve(h_CC[kept][:, kept], h_CC[kept] @ w_DC.T).T
        torch.testing.assert_close(level.w_DK.double(), best_DK, atol=1e-5, rtol=1e-4)
        error = (x_NC @ w_DC.T - x_NC[:, kept] @ best_DK.T).norm() / (x_NC @ w_DC.T).norm()
        assert level.prior == pytest.approx(error.item(), rel=1e-6)
    assert torch.equal(levels[0].w_DK, w_DC.float())


# The choice -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_the_best_of_all_choices(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 5, 4)
    costs = [np.sort(generator.uniform(0, 1, length)) for length in lengths]
    saved = [np.sort(generator.integers(0, 9, length)) for length in lengths]
    most = sum(int(one[-1]) for one in saved)
    for budget in range(most + 1):
        found = knapsack(costs, saved, budget)
        assert sum(int(one[level]) for one, level in zip(saved, found, strict=True)) >= budget
        least = min(sum(one[level] for one, level in zip(costs, levels, strict=True))
                    for levels in itertools.product(*map(range, lengths))
                    if sum(one[level] for one, level in zip(saved, levels, strict=True)) >= budget)
        assert sum(one[level] for one, level in zip(costs, found, strict=True)) == pytest.approx(least)


def ladders_of(seed=0, count=10):
    generator = np.random.default_rng(seed)
    return [[Level(torch.arange(1), torch.zeros(1, 1), prior, 10 * level) for level, prior in
             enumerate(np.sort(generator.uniform(0, 1, 5)))] for _ in range(count)]


def test_the_search_keeps_what_lowers_the_loss_and_runs_no_model_twice():
    ladders, runs = ladders_of(), []

    def loss(levels):
        # the last writers must not be touched: the priors do not know
        runs.append(levels)
        return float(sum(level * place for place, level in enumerate(levels)))

    first, how = searched(ladders, 150.0, 0, 0, loss)
    assert how == {"loss_nats": loss(tuple(first)), "loss_nats_first": loss(tuple(first)), "evaluations": 1}
    runs.clear()
    best, how = searched(ladders, 150.0, 300, 0, loss)
    assert len(runs) == len(set(runs)) == how["evaluations"] > 5
    assert how["loss_nats"] == min(map(loss, list(runs))) == loss(tuple(best)) < 0.9 * how["loss_nats_first"]
    assert all(sum(10 * level for level in levels) >= 150 for levels in runs)
    assert searched(ladders, 150.0, 300, 0, loss)[0] == best != searched(ladders, 150.0, 3, 1, loss)[0]


# Whole runs -----------------------------------------------------------------------------------------------------------

def test_priors_and_the_loss_are_those_of_the_models_own_passes(dense, tmp_path):
    found = composed("ziplm", dense, 0.25, **OPTIONS)
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    pruned = narrow.load(tmp_path / "out")
    assert facts.params_removed == pytest.approx(found.stats["share"]) == pytest.approx(0.25, abs=0.006)
    ids_ST = picked(TOKENS, 4, 0)
    with torch.no_grad():
        losses = [pruned(ids_T[None], labels=ids_T[None], use_cache=False).loss.item() for ids_T in ids_ST]
    assert found.stats["loss_nats"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.stats["loss_nats"] <= found.stats["loss_nats_first"]
    for row, width in zip(found.stats["layers"], found.plan.shape["widths"], strict=True):
        assert width["kv_heads"] == dense.groups - row["groups"] >= 1
        assert width["intermediate"] == CHANNELS - row["channels"] >= 1
        assert width["intermediate"] in counts_of(CHANNELS, "mlp", 0.8)
        for part in PARTS:
            # the writer alone, on the dense model's inputs
            writer = dense.writer(dense.model, row["layer"], part)
            outputs = [narrow.inputs(dense.model, writer) @ w_DC.detach().double().T
                       for w_DC in (writer.weight, widened(dense, pruned, row["layer"], part))]
            error = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
            assert row["errors"][part] == pytest.approx(error, abs=1e-3)


def widened(dense, pruned, layer, part):
    """The pruned writer with zeros in the columns of removed units, which are found by the readers' kept rows."""
    writer, old = dense.writer(pruned, layer, part), dense.writer(dense.model, layer, part)
    # the last reader has as many rows as there are key-value heads or channels
    name = f"{dense.readers()[part][-1]}.weight"
    rows = narrow.layers_of(dense.model)[layer].get_parameter(name).unflatten(0, (dense.units(part), -1)).flatten(1)
    kept_rows = narrow.layers_of(pruned)[layer].get_parameter(name)
    length = rows.shape[1] // kept_rows.shape[1]
    kept_rows = kept_rows.unflatten(0, (-1, length)).flatten(1)
    kept = [(rows == row).all(1).nonzero().item() for row in kept_rows]
    made, length = torch.zeros_like(old.weight), old.in_features // dense.units(part)
    with torch.no_grad():
        made[:, [unit * length + column for unit in kept for column in range(length)]] = writer.weight
    return made


def test_a_ratio_out_of_reach_is_named_before_the_model_is_read(dense, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BlockError, match=r"all that ziplm can remove is 0\.\d+ of all parameters, as one head group"):
        composed("ziplm", dense, 0.7)


def test_nothing_is_removed_at_a_ratio_of_nothing(dense, tmp_path):
    fold(composed("ziplm", dense, 0.0, **OPTIONS).plan, dense.folder, tmp_path / "out")
    torch.testing.assert_close(logits(narrow.load(tmp_path / "out")), logits(dense.model), atol=1e-5, rtol=1e-5)
