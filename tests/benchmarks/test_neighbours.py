"""The comparison with the authors' code, on a pico model and with originals that the tests write themselves."""
import sys

import pandas as pd
import pytest
import torch

from kdp_core.methods import shortgpt
from tests import pico
from tests.benchmarks.command import load, write_project

neighbours = load("neighbours")
from originals import cases, shims  # noqa: E402 (found once the command is loaded)
from originals.cases import Case, Original, Pair  # noqa: E402

FIT = """
from lib.helper import last

print("loud")

def order(model, ids):
    return list(range(len(model.model.layers)))[::-1] if last else None
"""
PRUNE = """
import torch

def get_loaders(name, **options):
    raise OSError("no data here")

def prune_wanda(args, model, tokenizer, device):
    batches, _ = get_loaders("c4", nsamples=args.nsamples)
    assert len(batches) == args.nsamples and batches[0][0].shape == (1, model.seqlen) and model.hf_device_map == {}
    for layer in model.model.layers:
        states = layer(model.model.embed_tokens(batches[0][0]))[0]
        assert states.shape == (1, model.seqlen, model.config.hidden_size)
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data[:, ::2] = 0
"""


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """The benchmark reads a pico model instead of the embedded one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours.embedded, "ROOT", write_project(tmp_path_factory.mktemp("project")))
        yield


def clone(folder, **files):
    """A made-up clone: a folder with these modules in its package `lib`."""
    (folder / "lib").mkdir(parents=True)
    for name, text in files.items():
        (folder / f"lib/{name}.py").write_text(text, encoding="utf-8")
    return folder


def backwards(case: Case) -> Pair:
    """Compares ShortGPT with code that removes the last layers first."""
    case = case.some(3, length=8)
    with shims.quiet():
        module, = shims.imported(case.clone, "lib.fit")
    return Pair(case, f"all layers, {case.work}", lambda: shortgpt.block_influence(
        case.dense, case.states(), case.tokens, case.facts, k_max=1).order,
        lambda: module.order(case.model(), case.tokens.ids_ST), cases.same_order)


def test_a_made_up_original_is_compared(tmp_path, monkeypatch, capsys):
    clone(tmp_path / "made-up", fit=FIT, helper="last = True")
    monkeypatch.setitem(neighbours.ORIGINALS, "shortgpt", Original("someone/made-up", "0" * 40, backwards))
    rows = neighbours.main(["--originals", str(tmp_path), "--repeats", "1", "--out", str(tmp_path / "out")])
    assert [row.measure for row in rows] == ["shortgpt: all layers, 3 sequences of 8 tokens",
                                             "shortgpt: the same choice at the same place"]
    times, choice = rows
    assert times.against == "someone/made-up" and times.target == "at least 1"
    assert times.ours > 0 and times.ratio > 0 and times.cpu_ratio > 0 and times.holds == (times.ratio >= 1)
    assert choice.other == 10 and 0 <= choice.ours < 10 and choice.holds is False
    assert list(pd.read_csv(tmp_path / "out/neighbours.csv")["measure"]) == [row.measure for row in rows]
    printed = capsys.readouterr().out
    assert all(row.measure in printed for row in rows) and "loud" not in printed


def test_the_comparison_of_wanda_hands_over_our_tokens(tmp_path, monkeypatch):
    clone(tmp_path / "wanda", prune=PRUNE)
    times, first, zeros = neighbours.main(["wanda", "--originals", str(tmp_path), "--repeats", "1",
                                             "--out", str(tmp_path / "out")])
    assert times.measure == "wanda: half of the weights, 4 sequences of 24 tokens"
    # every second column is half of the weights, but not the half that Wanda chooses
    assert 0.3 < first.ours < 0.7 and first.holds is False and 0.3 < zeros.ours < 0.7 and zeros.holds is None


@pytest.mark.parametrize("words, message", [
    (["--originals", "{0}/none"], "--originals {0}/none: there is no such folder; make it and clone into it the "
                                  "repositories that --help lists"),
    (["--originals", "{0}"], "--originals {0}: the folder has none of the clones; clone into it the repositories that "
                             "--help lists"),
    (["wanda", "--originals", "{0}"], "method 'wanda' needs the folder {0}/wanda; run `git clone "
                                      "https://github.com/locuslab/wanda {0}/wanda` or omit the method"),
    (["wonda", "--originals", "{}"], "there is no comparison for the method 'wonda'; choose from wanda, sparsegpt"),
    (["slimgpt", "--originals", "{}"], "method 'slimgpt' is not compared: its authors have released no code; omit it"),
    (["--originals", "{}", "--repeats", "0"], "--repeats and --threads: give 1 or more"),
])
def test_wrong_arguments_are_refused_with_the_remedy(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        neighbours.main([word.format(tmp_path) for word in words])
    assert message.format(tmp_path) in capsys.readouterr().err


def test_the_docstring_and_the_help_name_every_repository_and_commit(capsys):
    with pytest.raises(SystemExit):
        neighbours.main(["--help"])
    text = capsys.readouterr().out
    for name, one in neighbours.ORIGINALS.items():
        line, = [line for line in neighbours.__doc__.splitlines() if line.split()[:1] == [name]]
        assert one.repository in line and line.split()[-1] == one.commit[:7] and len(one.commit) == 40
        assert f"https://github.com/{one.repository} {one.commit}" in text
    assert not set(neighbours.NOT_COMPARED) & set(neighbours.ORIGINALS)


def test_modules_of_two_clones_may_have_the_same_name(tmp_path):
    first, second = (shims.imported(clone(tmp_path / name, fit=f"name = {name!r}\nimport absent\nhere = absent.here"),
                                    "lib.fit", absent={"absent": {"here": 1}})[0] for name in ("a", "b"))
    assert (first.name, second.name, first.here) == ("a", "b", 1)
    assert not {"lib", "lib.fit", "absent"} & set(sys.modules) and str(tmp_path / "a") not in sys.path


def test_a_package_is_opened_without_its_init(tmp_path):
    clone(tmp_path, fit="from .helper import last", helper="last = 3", __init__="raise OSError")
    assert shims.imported(tmp_path, "lib.fit", bare=("lib",))[0].last == 3


def test_gpu_devices_become_the_cpu():
    with shims.on_cpu():
        torch.cuda.synchronize()
        made = [torch.zeros(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to(torch.device("cuda:0")),
                torch.nn.Linear(2, 2).to("cuda").weight]
    assert {one.device.type for one in made} == {"cpu"}


@torch.no_grad()
def test_layers_run_alone_as_in_transformers_4():
    model, ids = pico.model("llama"), torch.arange(6)[None]
    wanted = model(ids, output_hidden_states=True).hidden_states
    shims.with_positions(model, 6)
    output = model.model.layers[3](wanted[3])
    assert isinstance(output, tuple) and torch.allclose(output[0], wanted[4], atol=1e-6)


def test_results_are_compared_by_hand():
    ours, theirs = {"a": torch.tensor([[0.0, 1.0], [2.0, 0.0]])}, {"a": torch.tensor([[0.0, 1.0], [0.0, 2.0]])}
    assert cases.same_zeros("of a", ours, theirs, 0.9).ours == 0.5
    assert cases.difference(ours, theirs, 2.0).ours == pytest.approx((8 / 5) ** 0.5)
    row, = cases.same_order([3, 1, 2], [3, 2, 1])
    assert (row.ours, row.other, row.holds) == (1, 3, False)
