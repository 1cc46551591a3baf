"""`kdp prune`: the bits of the library, resuming, the summary."""
import functools
import shutil
import signal

import pytest

from kdp import app
from kdp import pruning as command
from kdp_core import methods
from kdp_core.base import store, texts
from kdp_core.base.resume import Resume
from kdp_core.model import checkpoints
from kdp_core.prune import fold, pruning
from kdp_core.states import hidden, similarity
from tests import pico
from tests.kdp.conftest import RESIDUAL, call, fails

OPTIONS = {"search": {"entries": 8, "judge_sequences": 4}, "compose": {"entries": 8, "lr": 0.01, "heldout": 0.2}}


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def of_library(given, folder, method, options):
    """The same pruning by the functions of the library; the folder of its checkpoint."""
    facts = checkpoints.convert(given.model, folder / "dense", dtype="float32", source="")
    tokens = texts.pack(checkpoints.load_tokenizer(folder / "dense"),
                        [texts.Part("documents", pico.documents(160), 40)], length=24, seed=0)
    hidden.extract(checkpoints.load_model(folder / "dense"), tokens, folder / "hidden.zarr")
    states = hidden.read(folder / "hidden.zarr")
    plan = methods.run(method, folder / "dense", states, tokens, similarity.similarity(states), facts, ratio=0.2,
                       k_max=3, options=options)
    fold.fold(plan, folder / "dense", folder / "out")
    return folder / "out"


def test_a_composed_method_gives_the_bits_of_the_library(given, finished, tmp_path):
    assert weights(finished[0]) == weights(of_library(
        given, tmp_path, "kdp_residual", command.options_of("kdp_residual", OPTIONS, thorough=False)))


def test_a_method_with_steps_gives_the_bits_of_the_library_and_large_files_are_deleted(given, tmp_path):
    assert call(*given.prune(tmp_path / "cli", "--method", "linear")).exit_code == 0
    assert weights(tmp_path / "cli") == weights(of_library(given, tmp_path, "linear", {}))
    kept = {path.name for path in (tmp_path / "cli/.kdp").iterdir()}
    assert {"tokens.safetensors", "plan.json", "pruned.json", "summary.json"} <= kept
    assert not kept & set(command.LARGE)


def test_the_summary_says_what_was_removed_what_it_costs_and_how_much_faster_it_is(finished):
    out, said = finished
    found = store.read_json(out / ".kdp/summary.json")
    pruned, dense, after = found["pruned"], found["ppl_dense"], found["ppl_pruned"]
    said = " ".join(said.split())
    for words in (f"{pruned['params_removed']:.1%} of the parameters", f"{pruned['params_after']:,}",
                  f"{dense['ppl']:.2f} ± {dense['stderr']:.2f}", f"{after['ppl'] / dense['ppl']:.2f} times the dense",
                  f"{found['efficiency']['speedup_prefill']:.2f} times as fast"):
        assert words in said
    assert pruned["layers_removed"] > 0 and found["facts"]["layers"] == 10


class Stop(KeyboardInterrupt):
    """Ctrl-C at a place of the test's choice."""


def stops(*_, **__):
    raise Stop


def never(function):
    """A function that may not run, with the signature of the one in whose place it stands. It may be rehearsed."""
    def ran(*_, **__):
        checkpoints._unless_rehearsed()
        pytest.fail("a finished stage ran again")

    return functools.wraps(function)(ran)


def test_an_interrupted_pruning_goes_on_without_its_finished_stages(given, finished, tmp_path, monkeypatch):
    arguments = given.prune(tmp_path / "out", *RESIDUAL)
    with monkeypatch.context() as patched:
        patched.setattr(fold, "fold", stops)
        result = call(*arguments)
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    assert not (tmp_path / "out/config.json").exists()
    done = methods.METHODS["kdp_residual"]
    monkeypatch.setitem(methods.METHODS, "kdp_residual", done._replace(search=never(done.search),
                                                                       compose=never(done.compose)))
    for module, name in ((hidden, "extract"), (checkpoints, "convert"), (texts, "pack")):
        monkeypatch.setattr(module, name, never(getattr(module, name)))
    result = call(*arguments)
    assert result.exit_code == 0 and "hidden states: done before" in result.stdout
    assert weights(tmp_path / "out") == weights(finished[0])
    # the perplexity of each window, what was removed, hashes of the inputs
    one, other = (store.read_json(out / ".kdp/summary.json") for out in (tmp_path / "out", finished[0]))
    for measured in ("efficiency", "git"):
        del one[measured], other[measured]
    assert one == other and len(one["ppl_pruned"]["nats"]) > 1


def test_files_of_a_checkpoint_that_were_not_moved_yet_are_moved(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / ".kdp/checkpoint").mkdir()
    (out / "config.json").rename(out / ".kdp/checkpoint/config.json")
    run = command.Run.__new__(command.Run)
    run.out, run.kept = out, out / ".kdp"
    run._publish()
    assert (out / "config.json").is_file() and not (out / ".kdp/checkpoint").exists()


def test_a_finished_pruning_is_read_back(given, finished, monkeypatch):
    out, said = finished
    monkeypatch.setattr(pruning, "stages", lambda *_, **__: pytest.fail("it ran again"))
    result = call(*given.prune(out, *RESIDUAL, "--keep"))
    assert result.exit_code == 0 and result.stdout.splitlines()[-6:] == said.splitlines()[-6:]


def test_other_settings_in_the_same_folder_are_refused(given, finished):
    assert "with seed 0, not 1; name another folder" in fails(*given.prune(finished[0], *RESIDUAL, "--seed", "1"))


def test_the_default_method_is_that_of_the_library():
    assert app.METHOD == pruning.METHOD


def test_a_method_has_its_quick_setting_unless_it_is_to_be_thorough(monkeypatch):
    quick, given = methods.METHODS[app.METHOD].quick, {"compose": {"epochs": 3}, "block": {"narrow": "mlp"}}
    assert command.options_of(app.METHOD, {}, thorough=False) == quick
    found = command.options_of(app.METHOD, given, thorough=False)
    assert found == {**quick, "compose": {**quick["compose"], "epochs": 3}, "block": {"narrow": "mlp"}}
    assert command.options_of(app.METHOD, given, thorough=True) == given
    # the command hands on what follows from its own options
    seen = []

    def stop(settings, *_, **__):
        seen.append(settings.options)
        raise ValueError("enough")

    monkeypatch.setattr(command, "prune", stop)
    for more in ((), ("--thorough",)):
        call("prune", "default", "--out", "unused", "--option", "compose.epochs=3", *more)
    assert seen == [{**quick, "compose": {**quick["compose"], "epochs": 3}}, {"compose": {"epochs": 3}}]


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if method.quick])
def test_a_quick_setting_has_known_options(name):
    methods.check_options(name, methods.METHODS[name].quick)


def test_ctrl_c_asks_a_training_to_save_and_stops_anything_else(tmp_path):
    kept, before = Resume(tmp_path / "state"), signal.getsignal(signal.SIGINT)
    with command.stoppable(kept):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        kept.training = True
        signal.raise_signal(signal.SIGTERM)
    assert kept.asked and signal.getsignal(signal.SIGINT) is before


def test_a_ratio_that_no_data_allow_is_refused_before_the_states(given, tmp_path):
    said = fails(*given.prune(tmp_path / "out", *RESIDUAL, "--option", "search.largest=0.1"))
    assert "ratio 0.2: the 1 layers that the search ordered" in said and "search.largest" in said
    assert not (tmp_path / "out/.kdp/hidden.zarr").exists()
