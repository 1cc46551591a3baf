"""The comparison of dictionaries: errors and divergences by hand, KDP's own form by its fit, figure and table."""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kdp_core.base.records import Plan
from kdp_core.methods.kdp import kernel
from kdp_core.methods.kdp_residual.dictionaries import closed_form_options, counted, neurons
from kdp_core.model import checkpoints
from kdp_core.prune import fold
from tests.benchmarks.command import load
from tests.kdp_core import stored

SMALL = ["--layers", "2", "6", "--features", "4", "9", "--theta-steps", "6", "--neurons", "4", "8", "99",
         "--random-neurons", "4", "--kernel-features", "16", "--kernel-epochs", "2", "--divergence", "2", "--heldout",
         "0.25", "--threads", "1"]


@pytest.fixture(scope="module")
def dictionaries():
    return load("dictionaries")


@pytest.fixture(scope="module")
def given(llama_folder, tmp_path_factory):
    """States of a pico model, and the arguments that name them."""
    states_of = stored.of_pico(tmp_path_factory.mktemp("dictionaries") / "h.zarr")
    return states_of, ["--hidden", str(states_of.path), "--dense", str(llama_folder)]


@pytest.fixture(scope="module")
def done(dictionaries, given, tmp_path_factory):
    """One run at pico size: the table, and the folder it wrote."""
    out = tmp_path_factory.mktemp("out")
    return dictionaries.main([*SMALL, *given[1], "--out", str(out)]), out


@pytest.fixture
def layer(dictionaries, given):
    """Layer 6 with the first 4 sequences held out."""
    states_of, paths = given
    options = dictionaries.arguments([*SMALL, *paths])
    passes = dictionaries.Passes(checkpoints.load_model(options.dense, device="cpu", dtype="float32"), states_of.tokens)
    fit = closed_form_options(passes.model, states_of, dictionary="neurons", entries=1, seed=0)
    return dictionaries.Layer(6, passes, states_of.state(6), states_of.state(7), states_of.state(10)[:2],
                              torch.arange(4, states_of.sequences), torch.arange(4), options, fit)


def test_every_stand_in_has_a_row_and_the_files_hold_the_table(done):
    table, out = done
    expected = [("none", 0), *[("rff", size) for size in (4, 9) for _ in range(3)], ("rff learned", 4),
                ("rff learned", 9), ("neurons", 64), ("neurons", 8), ("neurons", 4), ("neurons at random", 4),
                ("kdp, epochs 0", 16), ("kdp, epochs 2", 16)]
    for _, own in table.groupby("layer"):
        assert list(zip(own["dictionary"], own["entries"], strict=True)) == expected
    pd.testing.assert_frame_equal(pd.read_csv(out / "dictionaries.csv"), table, check_dtype=False)
    assert {path.name for path in out.iterdir()} == {f"dictionaries.{kind}" for kind in ("csv", "pdf", "png")}


def test_parameters_and_kdps_own_form(done, given):
    table, (states_of, _) = done[0], given
    params = table[table["layer"] == 2].drop_duplicates(["dictionary", "entries"]).set_index(
        ["dictionary", "entries"])["params"]
    assert params["none", 0] == 32 * 33 and params["rff", 9] == params["rff learned", 9] == 32 * 33 + 9 * (32 + 1 + 32)
    assert params["neurons", 8] == 32 * 33 + 8 * (2 * 33 + 32)
    own = table.set_index(["layer", "dictionary"])["error"]
    for epochs in (0, 2):
        stats = kernel.fit(states_of, (6, 7), features=16, epochs=epochs).stats
        assert own[6, f"kdp, epochs {epochs}"] == stats["decode_error"]


def test_errors_by_hand(dictionaries, layer):
    module = layer.closed_form(None, 0)
    found = dictionaries.judge(layer, module)
    keep_ST = counted(layer.h_STD, layer.y_STD, 8.0)[0][:4]
    h, y = (of_STD[:4][keep_ST].numpy().astype(np.float64) for of_STD in (layer.h_STD, layer.y_STD))
    x = h / np.sqrt((h ** 2).mean(1, keepdims=True))
    missed = h + x @ module.tensors["linear.weight"].numpy().T + module.tensors["linear.bias"].numpy() - y
    assert dictionaries.ratio(found.missed_S, found.spread_S)[0] == pytest.approx(
        (missed ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
    relative = 1 / (y ** 2).sum(1)
    assert dictionaries.ratio(found.weighted_S, found.step_S)[0] == pytest.approx(
        relative @ (missed ** 2).sum(1) / (relative @ ((y - h) ** 2).sum(1)), rel=1e-4)


def test_divergence_is_that_of_the_folded_model(dictionaries, layer, given, tmp_path):
    module = layer.closed_form(neurons(layer.passes.model, layer.block), 4)
    fold.fold(Plan("one", [(6, "whole")], [module], {}), Path(given[1][3]), tmp_path / "folded")
    ids_ST = stored.tokens().ids_ST[:2]
    with torch.no_grad():
        logp, logq = (checkpoints.load_model(path)(ids_ST).logits.log_softmax(-1)
                      for path in (Path(given[1][3]), tmp_path / "folded"))
    expected_S = (logp.exp() * (logp - logq)).sum(-1).mean(1)
    torch.testing.assert_close(dictionaries.judge(layer, module).kl_S, expected_S, rtol=2e-2, atol=1e-4)


def test_a_ratio_and_its_standard_error_by_the_jackknife(dictionaries):
    generator = torch.Generator().manual_seed(0)
    whole_S = torch.rand(40, generator=generator) + 1
    part_S = 0.5 * whole_S + 0.05 * torch.rand(40, generator=generator)
    value, stderr = dictionaries.ratio(part_S, whole_S)
    assert value == pytest.approx(part_S.sum().item() / whole_S.sum().item())
    left_out = ((part_S.sum() - part_S) / (whole_S.sum() - whole_S)).double().numpy()
    assert stderr == pytest.approx(math.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum()), rel=0.05)
    same = dictionaries.ratio(whole_S, whole_S)
    assert same == (1.0, 0.0) and math.isnan(dictionaries.ratio(part_S[:1], whole_S[:1])[1])


def test_the_best_width_is_drawn_and_nothing_else_is_dropped(dictionaries, done):
    drawn = dictionaries.panels(done[0])
    for (layer, size), own in done[0][done[0]["dictionary"] == "rff"].groupby(["layer", "entries"]):
        kept = drawn[(drawn["dictionary"] == "rff") & (drawn["layer"] == layer) & (drawn["entries"] == size)]
        assert kept["error"].tolist() == [own["error"].min()]
    assert len(drawn) == 2 * (1 + 2 + 2 + 3 + 1)


@pytest.mark.parametrize(("wrong", "match"), [(["--neurons", "0"], "--neurons"),
                                             (["--hidden", "nowhere"], "make demo")])
def test_wrong_arguments_are_refused(dictionaries, given, wrong, match, capsys):
    with pytest.raises(SystemExit):
        dictionaries.main([*given[1], *wrong])
    assert match in capsys.readouterr().err


def test_layers_the_model_lacks_are_refused(dictionaries, given):
    with pytest.raises(SystemExit, match="layers 0 to 9"):
        dictionaries.main([*given[1], "--layers", "10"])
