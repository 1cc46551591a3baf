"""SlimGPT: shares and cuts by their formulas, and whole runs beside a literal surgeon on a copied model."""
import copy
import math

import pytest
import torch

from kdp_core.methods._select import BlockError
from kdp_core.methods.heads_channels.slimgpt import batches_of, cuts, shares
from kdp_core.methods.heads_channels.units import PARTS, Sizes
from kdp_core.model import checkpoints
from kdp_core.prune.fold import fold
from tests import pico
from tests.kdp_core.methods.heads_channels import narrow
from tests.kdp_core.methods.heads_channels.narrow import CHANNELS, LAYERS, composed, logits

DAMP = 0.01


@pytest.fixture(scope="module", params=pico.DIFFERENT)
def dense(request, tmp_path_factory):
    return narrow.dense_of(tmp_path_factory.mktemp(request.param), request.param)


# Literal surgeon: the columns that stay are solved again by least squares after every batch ---------------------------

def refitted(w_DC, h_CC, gone):
    kept = [column for column in range(len(h_CC)) if column not in gone]
    v_DC = torch.zeros_like(w_DC)
    v_DC[:, kept] = torch.linalg.solve(h_CC[kept][:, kept], h_CC[kept] @ w_DC.T).T
    return v_DC, ((w_DC - v_DC) @ h_CC * (w_DC - v_DC)).sum().item()


def literal_prune(writer, x_NC, units, batches):
    """Removed units in order; the writer gets its new weights."""
    w_DC, h_CC = writer.weight.detach().double(), x_NC.T @ x_NC
    h_CC = h_CC + DAMP * h_CC.diagonal().mean() * torch.eye(len(h_CC), dtype=torch.float64)
    length, gone = len(h_CC) // units, []

    def columns(found):
        return {unit * length + column for unit in found for column in range(length)}

    for count in batches:
        losses = {unit: refitted(w_DC, h_CC, columns([*gone, unit]))[1] for unit in range(units) if unit not in gone}
        gone += sorted(losses, key=losses.get)[:count]
    with torch.no_grad():
        writer.weight.copy_(refitted(w_DC, h_CC, columns(gone))[0])
    return gone


def literal(dense, found):
    """The model after the literal surgeon, with as many units removed as the method removed; removed units."""
    model, gone = copy.deepcopy(dense.model), {}
    for row in found.stats["layers"]:
        batches = {"attention": [1] * len(row["groups"]), "mlp": batches_of(row["channels"], 6, 8)}
        for part in PARTS:
            writer = dense.writer(model, row["layer"], part)
            gone[row["layer"], part] = literal_prune(writer, narrow.inputs(model, writer), dense.units(part),
                                                     batches[part])
    return model, gone


def test_the_narrow_model_is_that_of_a_literal_surgeon(dense, tmp_path):
    found = composed("slimgpt", dense, 0.25)
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    model, gone = literal(dense, found)
    for row in found.stats["layers"]:
        assert row["groups"] == sorted(gone[row["layer"], "attention"])
    torch.testing.assert_close(logits(narrow.load(tmp_path / "out")), logits(model), atol=2e-3, rtol=2e-3)
    assert facts.params_removed == pytest.approx(found.stats["share"]) == pytest.approx(0.25, abs=0.002)


def test_what_stays_makes_up_for_what_is_removed(dense, tmp_path):
    """The new columns are nearer to the dense model's outputs than the old ones without the same units."""
    found = composed("slimgpt", dense, 0.2)
    fold(found.plan, dense.folder, tmp_path / "out")
    _, gone = literal(dense, found)
    old = copy.deepcopy(dense.model)
    for (layer, part), units in gone.items():
        writer = dense.writer(old, layer, part)
        length = writer.in_features // dense.units(part)
        with torch.no_grad():
            writer.weight[:, [unit * length + column for unit in units for column in range(length)]] = 0
    errors = [(logits(one) - logits(dense.model)).norm() for one in (narrow.load(tmp_path / "out"), old)]
    assert errors[0] < 0.9 * errors[1]
    assert all(0 <= error < 1 for row in found.stats["layers"] for error in row["errors"].values())


# Sizes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [2, 5, 32])
def test_shares_rise_with_the_logarithm_and_keep_their_mean(layers):
    found = shares(0.3, layers, 0.1)
    assert found[0] == pytest.approx(0.1) and sum(found) / layers == pytest.approx(0.3)
    for number, share in enumerate(found):
        assert share == pytest.approx(0.1 + (found[-1] - 0.1) * math.log(number + 1) / math.log(layers))
    assert shares(0.3, 1, 0.1) == [0.3]


@pytest.mark.parametrize("sizes", [Sizes(30, 3, 1536, 294912, 1728), Sizes(32, 32, 11008, 2097152, 12288),
                                   Sizes(5, 2, 64, 1536, 96), Sizes(4, 1, 9, 100, 70)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.33])
def test_cuts_meet_the_ratio_to_half_a_channel_and_heads_are_nearest(sizes, share):
    whole = sizes.groups * sizes.group_params + sizes.channels * sizes.channel_params
    total = 2 * sizes.layers * whole
    found = cuts(share / 2, total, sizes, 0.0)
    removed = sum(own[part] * sizes.unit_params[part] for own in found for part in PARTS)
    assert abs(removed - share / 2 * total) <= sizes.channel_params / 2 + 1e-6
    for own, asked in zip(found, shares(share, sizes.layers, 0.0), strict=True):
        assert 0 <= own["attention"] < sizes.groups and 0 <= own["mlp"] < sizes.channels
        assert abs(own["attention"] - asked * sizes.groups) <= 1
    assert found[0] == {"attention": 0, "mlp": 0}


def test_batches_halve_down_to_the_last():
    assert batches_of(30, 12, 3) == [12, 6, 3, 3, 3, 3] and batches_of(5, 12, 3) == [5] and batches_of(0, 12, 3) == []
    assert batches_of(7, 1, 3) == [3, 3, 1] and sum(batches_of(1000, 1024, 8)) == 1000


def test_a_ratio_of_nothing_is_the_dense_model(dense, tmp_path):
    fold(composed("slimgpt", dense, 0.0).plan, dense.folder, tmp_path / "out")
    torch.testing.assert_close(logits(narrow.load(tmp_path / "out")), logits(dense.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio, options, message", [
    (0.6, {}, r"ratio 0\.6 with compose\.first_share 0\.0 asks [\d.]+ of the last layer's heads and channels"),
    (0.1, {"first_share": 0.9}, r"ratio 0\.1 with compose\.first_share 0\.9 asks .* change the ratio or first_share"),
])
def test_shares_out_of_reach_are_named_before_the_model_is_read(dense, monkeypatch, ratio, options, message):
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BlockError, match=message):
        composed("slimgpt", dense, ratio, **options)


def test_deeper_layers_lose_more(dense):
    lost = [row["channels"] / CHANNELS + len(row["groups"]) / dense.groups
            for row in composed("slimgpt", dense, 0.2).stats["layers"]]
    assert lost[0] == 0 and lost[-1] > lost[1] and len(lost) == LAYERS
