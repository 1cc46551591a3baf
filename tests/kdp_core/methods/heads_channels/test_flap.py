"""FLAP: metrics and choice by loops over the model's own inputs, and the biased narrow model beside the dense one."""
import numpy as np
import pytest
import torch

from kdp_core.methods._select import BlockError
from kdp_core.methods.heads_channels import flap
from kdp_core.methods.heads_channels.flap import Unit, chosen
from kdp_core.methods.heads_channels.units import PARTS, Sizes
from kdp_core.model import checkpoints
from kdp_core.prune.fold import fold
from kdp_core.states.block import FitError
from tests import pico
from tests.kdp_core.methods.heads_channels import narrow
from tests.kdp_core.methods.heads_channels.narrow import CHANNELS, HEAD, HEADS, LAYERS, composed, logits


@pytest.fixture(scope="module", params=pico.DIFFERENT)
def dense(request, tmp_path_factory):
    return narrow.dense_of(tmp_path_factory.mktemp(request.param), request.param)


def literal_metrics(dense):
    """(part, layer) -> metric of each unit, by NumPy from what each writer reads."""
    found = {}
    for layer in range(LAYERS):
        for part in PARTS:
            writer = dense.writer(dense.model, layer, part)
            x, w = narrow.inputs(dense.model, writer).numpy(), writer.weight.detach().double().numpy()
            m = np.array([x[:, j].var(ddof=1) * (w[:, j] ** 2).sum() for j in range(x.shape[1])])
            m = m ** 2 if part == "attention" else m
            m = (m - m.mean()) / m.std(ddof=1)
            length = len(m) // dense.units(part)
            found[part, layer] = [m[unit * length:(unit + 1) * length].mean() for unit in range(dense.units(part))]
    return found


def unit_params(dense):
    layer = narrow.layers_of(dense.model)[0]
    return {part: (sum(value.numel() for name in names for value in layer.get_submodule(name).parameters())
                   + dense.writer(dense.model, 0, part).weight.numel()) / dense.units(part)
            for part, names in dense.readers().items()}


def literal_choice(dense, ratio):
    """Units removed in order of metric until their parameters are nearest to the goal, by trying every number."""
    metrics, params = literal_metrics(dense), unit_params(dense)
    total = sum(value.numel() for value in dense.model.parameters())
    goal = ratio * total + (0 if dense.family == "opt" else 2 * LAYERS * 32)
    order, left = [], {key: len(values) for key, values in metrics.items()}
    for _, key, unit in sorted((value, key, unit) for key, values in metrics.items()
                               for unit, value in enumerate(values)):
        if left[key] > 1:
            left[key] -= 1
            order.append((key, unit))
    removed = np.cumsum([0, *(params[part] for (part, _), _ in order)])
    return order[:int(np.abs(removed - goal).argmin())]


@pytest.mark.parametrize("ratio", [0.1, 0.25])
def test_the_units_are_those_of_loops_over_the_models_own_inputs(dense, ratio):
    found, expected = composed("flap", dense, ratio), literal_choice(dense, ratio)
    for row in found.stats["layers"]:
        assert row["groups"] == sorted(unit for key, unit in expected if key == ("attention", row["layer"]))
        gone = {unit for key, unit in expected if key == ("mlp", row["layer"])}
        assert row["channels"] == len(gone)
        w_DC = dense.writer(dense.model, row["layer"], "mlp").weight
        name = next(name for name, value in dense.model.named_parameters() if value is w_DC)
        kept = [channel for channel in range(CHANNELS) if channel not in gone]
        assert torch.equal(found.plan.tensors[name], w_DC[:, kept])


def test_the_narrow_model_is_the_dense_one_that_reads_means_in_place_of_what_is_removed(dense, tmp_path):
    found = composed("flap", dense, 0.25)
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    pruned, model = narrow.load(tmp_path / "out"), narrow.load(dense.folder)
    for (part, layer), units in grouped(literal_choice(dense, 0.25)).items():
        writer = dense.writer(model, layer, part)
        length = writer.in_features // dense.units(part)
        gone = [unit * length + column for unit in units for column in range(length)]
        mean_C = narrow.inputs(dense.model, dense.writer(dense.model, layer, part)).mean(0).float()

        def change(x_BTC, gone=gone, mean_C=mean_C):
            x_BTC = x_BTC.clone()
            x_BTC[..., gone] = mean_C[gone]
            return x_BTC

        narrow.replacing(writer, change)
    torch.testing.assert_close(logits(pruned), logits(model), atol=1e-3, rtol=1e-3)
    assert (logits(pruned) - logits(dense.model)).abs().max() > 0.05
    assert facts.params_removed == pytest.approx(found.stats["share"])
    assert abs(facts.params_removed - 0.25) * facts.params_before <= max(unit_params(dense).values()) / 2
    assert all(dense.writer(pruned, layer, part).bias is not None for layer in range(LAYERS) for part in PARTS)
    runs = [pruned.generate(narrow.IDS_ST, attention_mask=torch.ones_like(narrow.IDS_ST), max_new_tokens=6,
                            min_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)


def grouped(choice):
    found = {}
    for key, unit in choice:
        found.setdefault(key, []).append(unit)
    return found


def test_the_last_unit_of_a_part_is_kept_and_the_nearer_number_is_taken():
    sizes = Sizes(2, 2, 3, 10, 4)
    units = [Unit(float(rank), part, layer, number) for rank, (part, layer, number) in enumerate(
        [("attention", 0, 0), ("attention", 0, 1), ("mlp", 1, 2), ("mlp", 1, 0), ("mlp", 1, 1), ("mlp", 0, 0),
         ("attention", 1, 0)])]
    for goal, count in ((4.9, 0), (5.1, 1), (11.9, 1), (12.1, 2), (17, 3), (21, 4), (1000, 5)):
        removed = chosen(units, goal, sizes)
        expected = [units[place] for place in (0, 2, 3, 5, 6)]
        assert removed == expected[:count], goal


def test_one_column_alone_has_no_spread():
    assert flap.metric(torch.ones(3, 4), torch.ones(4), "mlp", 4).tolist() == [0.0] * 4


def test_what_cannot_be_is_named_before_the_model_is_read(dense, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BlockError, match=r"all that flap can remove is 0\.\d+ of all parameters, as one head group"):
        composed("flap", dense, 0.7)
    with pytest.raises(FitError, match=r"compose\.sequences 13: there are 12 calibration sequences"):
        composed("flap", dense, 0.2, sequences=13)


def test_a_key_value_head_goes_with_its_query_heads(dense):
    found = composed("flap", dense, 0.25)
    each = HEADS // dense.groups
    for row, width in zip(found.stats["layers"], found.plan.shape["widths"], strict=True):
        left = dense.groups - len(row["groups"])
        assert width == {"heads": left * each, "kv_heads": left, "intermediate": CHANNELS - row["channels"],
                         "writer_bias": 1}
        q_RD = found.plan.tensors[f"{prefix(dense)}{row['layer']}.self_attn.q_proj.weight"]
        assert len(q_RD) == left * each * HEAD


def prefix(dense):
    return "model.decoder.layers." if dense.family == "opt" else "model.layers."
