"""The stages' tables at pico size: their form, and that what is timed beside each other gives the same numbers."""
import pandas as pd
import pytest
import torch

from kdp_core.states import hidden, similarity
from tests.benchmarks.command import load, write_project

stages = load("stages")
from stage import cka, evaluation, extraction, folded, growth, made_up, reading, shared, timing  # noqa: E402 (found once the command is loaded)
from stage.setup import Setup, first  # noqa: E402

COLUMNS = ["measure", "ours", "unit", "against", "other", "ratio", "cpu_ratio", "target", "holds"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """The benchmarks read a pico model instead of the embedded one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.embedded, "ROOT", write_project(tmp_path_factory.mktemp("project")))
        yield


@pytest.fixture(scope="module")
def setup(out):
    return Setup(stages.arguments(["--quick", "--repeats", "1", "--out", str(out)]))


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_gives_a_table(stage, out, capsys):
    table = stages.main([stage, "--quick", "--repeats", "1", "--out", str(out)])[stage]
    assert table and all(row.ours > 0 and row.other > 0 and row.ratio > 0 for row in table)
    assert all((row.holds is None) == (row.target == "") for row in table), "a row has a verdict if it has a target"
    written = pd.read_csv(out / f"{stage}.csv")
    assert list(written.columns) == COLUMNS and list(written["measure"]) == [row.measure for row in table]
    printed = capsys.readouterr().out
    assert f"## {stage}" in printed and all(row.measure in printed for row in table)


def test_wrong_arguments_are_refused(capsys):
    for wrong in (["extractoin"], ["--repeats", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            stages.main(wrong)
        assert wrong[0].lstrip("-") in capsys.readouterr().err


def test_ratios_are_medians_over_turns():
    times = timing.Times({"ours": [timing.Clock(wall, 1.0) for wall in (1.0, 2.0, 4.0)],
                          "floor": [timing.Clock(wall, 0.5) for wall in (1.0, 1.0, 1.0)]})
    row = times.row("a", "ours", "floor", target=0.5, scale=2.0)
    assert (row.ours, row.other, row.ratio, row.cpu_ratio, row.holds) == (2.0, 2.0, 1.0, 1.0, True)
    assert times.row("a", "ours", "floor", target=0.9).holds is False
    assert timing.figure("b", 3.0, "MiB", "limit", 2.0, target=1.4, at_most=True).holds is False


def test_turns_change_the_order_and_the_first_does_not_count():
    seen = []
    times = timing.in_turns({name: lambda name=name: seen.append(name) for name in "ab"}, 2,
                            before=lambda: seen.append("-"))
    assert "".join(seen) == "-b-a-a-b-b-a" and {name: len(times[name]) for name in "ab"} == {"a": 2, "b": 2}


def test_square_products_are_counted():
    assert timing.turns_of_products(2 * 4 * 1024 ** 3) == 1.0


def test_the_bare_pass_ends_where_the_extraction_ends(setup):
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, k=k: ran.append(k))
             for k, layer in enumerate(extraction.decoder_layers(setup.model))]
    tokens = first(setup.tokens, 8)
    for run in (extraction.bare(setup, tokens, 3), extraction.extraction(setup, tokens, [2, 3])):
        ran.clear()
        run()
        assert ran == [0, 1, 2]
    for hook in hooks:
        hook.remove()
    assert len(tokens.sources) == len(tokens.ids_ST) == 8


def test_a_mapped_file_gives_the_stored_layer(setup, tmp_path):
    stored = setup.hidden.state(4).half()
    (tmp_path / "raw").write_bytes(stored.numpy().tobytes())
    assert torch.equal(reading.mapped(tmp_path / "raw", stored), setup.hidden.state(4))


def test_a_state_above_float16_is_stored(setup):
    row = reading.guard(setup)
    assert row.holds and row.ours == pytest.approx(1e5, rel=1e-6)
    assert hidden.read(setup.folder / "overflow.zarr").state(0).abs().max() < hidden.HALF_MAX


def test_full_batch_cka_is_that_of_one_minibatch_of_all_tokens(setup):
    x_LND = cka.chosen(setup.hidden, 64)
    assert torch.allclose(similarity.cka(cka.full_batch(x_LND)), similarity.cka(cka.minibatches(x_LND, 64)), atol=1e-4)


def test_operations_are_those_of_the_products(setup):
    dictionary = shared.Dictionary("glu", torch.zeros(6, 5), torch.zeros(6), "silu")
    # features 10 * (2 * 5 * 6); Gram of 5 + 3 + 1 columns; cross matrix with 5
    assert shared.operations(10, 5, dictionary) == 10 * (60 + 2 * 81 + 2 * 9 * 5)


def test_folded_and_dense_run_the_same_layers_but_for_the_blocks(setup):
    folded_model = made_up.folded_like(setup.model.config, [(2, 4)], 16)
    ran = []
    for layer in folded_model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    logits = folded_model(setup.tokens.ids_ST[:1]).logits
    assert len(ran) == setup.facts.layers - 2 and logits.isfinite().all()
    cached = folded.decoding(setup.model, setup.tokens.ids_ST[:1], turns=2)
    cached()
    cached()


def test_made_up_choices_share_their_context():
    requests = evaluation.made_up(4)
    assert len(requests) == 16 and len({one.args for one in requests}) == 16
    for item in range(4):
        own = requests[4 * item:4 * item + 4]
        assert len({one.args[0] for one in own}) == 1 and len({one.args[1] for one in own}) == 4


def test_exponents_by_hand():
    assert growth.exponent([1, 10, 100], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert growth.grown("a", [1, 10], [1.0, 100.0]).holds is False
