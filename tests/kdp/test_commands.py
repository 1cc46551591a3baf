"""The commands that look at checkpoints and configurations, and the form of every error."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import yaml

from kdp import app, heldout, record, show, sources, workflow
from kdp_core import methods
from kdp_core.base import texts
from kdp_core.model import checkpoints
from kdp_core.results.card import PLUS_MINUS
from tests import pico
from tests.kdp.conftest import call, fails
from tests.test_structure import ROOT

# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_generate_continues_a_prompt_as_the_model_does(finished):
    result = call("generate", finished[0], "the council met", "--tokens", "5")
    model, reader = checkpoints.load_model(finished[0]), checkpoints.load_tokenizer(finished[0])
    ids = reader("the council met", return_tensors="pt")["input_ids"]
    made = []
    for _ in range(5):
        made.append(int(model(torch.cat([ids[0], torch.tensor(made, dtype=torch.int64)])[None]).logits[0, -1].argmax()))
    assert result.exit_code == 0
    assert result.stdout == reader.decode(made, skip_special_tokens=True) + "\n"


def test_perplexity_is_that_of_the_logits(llama_folder):
    ids_ST = heldout.windows(llama_folder, pico.documents(10, 1), 24)
    found = heldout.perplexity(llama_folder, ids_ST)
    with torch.no_grad():
        logits = checkpoints.load_model(llama_folder)(ids_ST).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_ST[:, 1:].flatten())
    assert found.ppl == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found.predictions == 23 and len(found.nats) == len(ids_ST)


def test_a_paired_difference_has_the_standard_error_of_the_differences():
    first = heldout.Perplexity(1.0, None, [-20.0, -30.0, -25.0], 10)
    second = heldout.Perplexity(1.0, None, [-22.0, -31.0, -28.0], 10)
    found = heldout.difference(first, second)
    # differences of 0.2, 0.1 and 0.3 nats a token: mean 0.2, standard error 0.1 / sqrt(3)
    assert found.nats_per_token == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.1 / 3 ** 0.5)
    assert found.ratio == pytest.approx(2.718281828 ** 0.2)


def test_compare_prints_the_paired_difference(given, finished):
    out, _ = finished
    told = call("compare", out / ".kdp/dense", out, "--heldout", given.heldout, "--window", "24").stdout
    said = " ".join(told.split())
    scored = json.loads((out / ".kdp/summary.json").read_text())
    ratio = scored["ppl_pruned"]["ppl"] / scored["ppl_dense"]["ppl"]
    assert f"has {ratio:.4f} times the perplexity" in said and "standard error" in said and "p = " in said
    same = call("compare", out, out, "--heldout", given.heldout, "--window", "24").stdout
    assert "+0.0000 nats" in same and "p = 1 " in same


def test_checkpoints_of_two_tokenizers_are_not_compared(llama_folder, tmp_path):
    other = shutil.copytree(llama_folder, tmp_path / "other")
    state = json.loads((other / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 384, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(heldout.HeldoutError, match="different tokenizers"):
        heldout.check_same_tokens(llama_folder, other)


def test_inspect_shows_method_parameters_provenance_and_every_layer(finished):
    said = call("inspect", finished[0]).stdout
    summary = json.loads((finished[0] / ".kdp/summary.json").read_text())
    pruned = summary["pruned"]
    assert "kdp_residual" in said and f"{pruned['params_after']:,} after" in said
    # a long value goes over the end of a line
    assert summary["facts"]["sha256"][:20] in said and "transformers" in said
    rows = re.findall(r"^(\d+) ", said, re.MULTILINE)
    assert rows == [str(layer) for layer in range(10)]
    assert said.count("stand-in: ") == len(pruned["blocks"])
    assert said.count("removed\n") + said.count("stand-in: ") >= 1


def test_a_checkpoint_carries_its_card_and_its_provenance(given, finished, tmp_path):
    out = finished[0]
    text, made = (out / "README.md").read_text(), json.loads((out / "kdp.json").read_text())
    summary = json.loads((out / ".kdp/summary.json").read_text())
    assert f"{summary['ppl_pruned']['ppl']:.4g}{PLUS_MINUS}{summary['ppl_pruned']['stderr']:.2g}" in text
    assert "kdp prune model --out DIR --ratio 0.2" in text and "--option search.entries=8" in text
    assert made["versions"]["torch"] and made["settings"]["ratio"] == 0.2 and made["seeds"] == {"calibration": 0}
    assert made["inputs"] == {"calibration tokens": summary["tokens_sha256"],
                              "held-out windows": summary["heldout_sha256"]}
    for place in (given.model.parent, given.heldout.parent, out.parent):
        assert str(place) not in text and str(place) not in json.dumps(made)
    # without its records, as somebody else gets it
    away = shutil.copytree(out, tmp_path / "away", ignore=shutil.ignore_patterns(".kdp"))
    said = call("inspect", away).stdout
    assert "kdp_residual" in said and summary["tokens_sha256"][:20] in said and "transformers" in said


def test_export_writes_a_gguf_file_of_a_stock_model(given, llama_folder, finished, tmp_path):
    assert "is written" in call("export", llama_folder, "--gguf", tmp_path / "dense.gguf").stdout
    checkpoints.convert(tmp_path / "dense.gguf", tmp_path / "back", dtype="float32", source="")
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        one, other = (checkpoints.load_model(folder)(ids).logits for folder in (llama_folder, tmp_path / "back"))
    assert torch.equal(one, other)
    assert "already exists" in fails("export", llama_folder, "--gguf", tmp_path / "dense.gguf")
    assert "llama.cpp knows no such model" in fails("export", finished[0], "--gguf", tmp_path / "folded.gguf")


def test_inspect_of_a_dense_checkpoint_says_that_it_has_no_record(llama_folder):
    said = call("inspect", llama_folder).stdout
    assert "no record of a pruning" in said and len(re.findall(r"^\d+ ", said, re.MULTILINE)) == 10


def test_the_picture_tells_widths_removed_parts_and_blocks_apart():
    config = {"layers": 3, "heads": 4, "intermediate": 64, "stand_ins": [], "dropped_parts": {"attention": [1]},
              "widths": [{"heads": 4, "intermediate": 64}, {"heads": 4, "intermediate": 32}, {"heads": 2,
                                                                                         "intermediate": 64}]}
    cells = [list(column.cells) for column in show.layers(config, {"blocks": [[1, 2]]}).columns]
    assert cells[0] == ["0", "1", "2", "3"]
    assert cells[3] == ["", "removed", "attention removed", ""]
    assert [cell.split()[-1] for cell in cells[1] if cell] == ["4", "0", "2"]
    assert cells[2][2] == "█" * 10 + "·" * 10 + " 32"


def test_every_stage_has_words():
    assert show.label("composed") == "fit" and show.label("7-9-kernel") == "kernel of layers 7 to 8"


def test_a_record_of_the_workflow_is_found_beside_its_checkpoint(finished, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(finished[0] / ".kdp/pruned.json", tmp_path)
    assert record.pruned(tmp_path / "checkpoint")["method"] == "kdp_residual"
    assert record.pruned(tmp_path) is None


# Methods and configurations -------------------------------------------------------------------------------------------

def test_methods_lists_every_method_with_its_group():
    said = call("methods").stdout
    assert set(methods.METHODS) <= set(said.split()) and "weights set to zero" in said


def test_the_embedded_sources_are_those_of_the_default_configuration():
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    model, = config["models"].values()
    assert (model["source"], model["sha256"]) == sources.MODEL
    for text in (sources.CALIBRATION, sources.HELDOUT):
        assert config["texts"][text.name] == {key: getattr(text, key)
                                              for key in ("source", "sha256", "format", "encoding")}
    assert list(config["calibrations"]["news"]["mix"]) == [sources.CALIBRATION.name]


def test_init_writes_a_configuration_that_is_checked_and_planned(given, tmp_path):
    file = tmp_path / "mine.yaml"
    assert call("init", file, "--model", given.model, "--calibration", given.calibration).exit_code == 0
    config = workflow.checked(file)
    assert config["models"]["my-model"]["source"] == str(given.model)
    assert config["texts"]["my-calibration"]["format"] == "jsonl"
    assert config["grid"]["ratios"] == [0.25] and config["hidden"]["batch_sequences"] == 8
    assert call("init", tmp_path / "embedded.yaml").exit_code == 0
    workflow.checked(tmp_path / "embedded.yaml")
    result = call("plan", file)
    assert result.exit_code == 0 and "| my-model |" in result.stdout and "| all |" in result.stdout


def test_a_plan_names_files_that_are_missing_here_and_needs_the_sizes_of_the_model(given, tmp_path):
    file, text = tmp_path / "mine.yaml", tmp_path / "a text.txt"
    text.write_text("a text")
    assert call("init", file, "--model", given.model, "--calibration", text).exit_code == 0
    text.unlink()
    result = call("plan", file)
    assert result.exit_code == 0 and "| my-model |" in result.stdout
    assert result.stderr.startswith(f"note: config: texts.my-calibration.source is '{text}', and no such file")
    file.write_text(file.read_text().replace(str(given.model), "no/such/model"))
    assert fails("plan", file).startswith("kdp: config: models.my-model.source is 'no/such/model', and no such file")


def test_a_configuration_is_merged_at_every_depth():
    assert workflow.merged({"a": {"b": 1, "c": {"d": 2}}, "e": 3}, {"a": {"c": {"f": 4}}, "e": {"g": 5}}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": {"g": 5}}


# Errors ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    (["--ratio", "1.5"], "--ratio is 1.5; give a share"),
    (["--ratio", "much"], "--ratio is 'much', but must be a valid number"),
    (["--method", "prune"], "method 'prune' is unknown; choose one of"),
    (["--method", "lineer"], "did you mean 'linear'?"),
    (["--option", "compose.epoch=2"], "option 'epoch' is unknown"),
    (["--ratio", "0.95"], "ordered remove at most"),
    (["--option", "epochs"], "write part.option=value"),
    (["--sequences", "0"], "--sequences is 0; give at least 2"),
    (["--dtype", "int8"], "dtype 'int8' is unknown; choose one of"),
    (["--device", "cuda:7"], "device 'cuda:7' is not here"),
    (["--calibration", "nowhere.txt"], "--calibration is 'nowhere.txt', and no such file"),
    (["--calibration", "hf:org/name"], "a text of the hub is hf-data:org/name@revision"),
    (["--heldout", "pypi:gensim"], "source 'pypi:gensim' cannot be read"),
    (["--frobnicate"], "No such option"),
])
def test_a_wrong_argument_of_prune_is_one_line_before_anything_is_done(given, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(checkpoints, "convert", lambda *_, **__: pytest.fail("the model was converted"))
    assert message in fails(*given.prune(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short_are_refused_before_the_states_are_extracted(given, tmp_path, monkeypatch):
    from kdp_core.prune import pruning

    monkeypatch.setattr(pruning, "stages", lambda *_, **__: pytest.fail("the states were extracted"))
    assert "but 2000 are asked for" in fails(*given.prune(tmp_path / "a", "--sequences", "2000"))
    (tmp_path / "short.txt").write_text("the council met on monday and said")
    assert "less than one window" in fails(*given.prune(tmp_path / "b", "--heldout", tmp_path / "short.txt"))


def test_a_text_of_too_few_bytes_is_refused_before_the_model_is_fetched(given, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "convert", lambda *_, **__: pytest.fail("the model was converted"))
    assert "too few for 2400000 tokens" in fails(*given.prune(tmp_path / "a", "--sequences", "100000"))
    (tmp_path / "short.txt").write_text("two words")
    assert "a text of 10 bytes" in fails(*given.prune(tmp_path / "b", "--heldout", tmp_path / "short.txt"))


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(given):
    assert "/proc/kdp: " in (said := fails(*given.prune("/proc/kdp"))) and "name another path" in said


def test_a_folder_with_other_files_stays_as_it_is(given, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "contains other files" in fails(*given.prune(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("arguments, message", [
    (["frobnicate"], "No such command"),
    (["prune", "default"], "Missing option '--out'"),
    (["prune", "nowhere", "--out", "out"], "MODEL is 'nowhere', and no such file or folder exists"),
    (["prune", "hf-data:org/name", "--out", "out"], "a model of the hub is hf:org/name@revision"),
    (["generate", "nowhere", "hello"], "nowhere contains no checkpoint"),
    (["inspect", "nowhere"], "nowhere contains no checkpoint"),
    (["compare", "nowhere", "nowhere"], "nowhere contains no checkpoint"),
    (["plan", "nowhere.yaml"], "nowhere.yaml cannot be read as a configuration"),
    (["init", "nowhere/mine.yaml"], "nowhere is not a folder"),
    (["init", "{here}"], "already exists"),
])
def test_every_other_error_is_one_line_too(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("- a list\n")
    assert message in fails(*(one.format(here="here") for one in arguments))


@pytest.fixture(scope="module")
def broken(given, tmp_path_factory):
    """Folders that hold no whole checkpoint, and files that are no text, in a folder whose name has a space."""
    place = tmp_path_factory.mktemp("in") / "a folder"
    for name in ("empty", "other", "no json", "no type", "no weights", "torn", "no tokenizer", "half"):
        (place / name).mkdir(parents=True)
    (place / "other/a.txt").write_text("a text")
    (place / "no json/config.json").write_text("{")
    (place / "no type/config.json").write_text("[]")
    for name in ("no weights", "torn", "no tokenizer", "half"):
        shutil.copytree(given.model, place / name, dirs_exist_ok=True)
    (place / "no weights/model.safetensors").unlink()
    (place / "torn/model.safetensors").write_bytes(b"torn")
    (place / "no tokenizer/tokenizer.json").unlink()
    tensors = safetensors.torch.load_file(place / "half/model.safetensors")
    safetensors.torch.save_file({name: tensors[name] for name in sorted(tensors)[:3]}, place / "half/model.safetensors")
    (place / "empty.txt").touch()
    (place / "blank.txt").write_text(" \n\n")
    return place


WHOLE = [["generate", "{}", "hello"], ["compare", "{}", "{}"], ["export", "{}", "--gguf", "new.gguf"], ["expect", "{}"]]
"""Commands that read a whole checkpoint."""


@pytest.mark.parametrize("arguments", [["inspect", "{}"], *WHOLE], ids=lambda arguments: arguments[0])
def test_a_folder_that_is_no_whole_checkpoint_is_one_line(broken, monkeypatch, arguments):
    monkeypatch.chdir(broken)
    for name, words in (("empty", "contains no checkpoint (no config.json); name"), ("other", "contains no checkpoint"),
                        ("no json", "config.json is not JSON"), ("no type", "names no model_type"),
                        ("no weights", "has no weights (*.safetensors"), ("no tokenizer", "has no tokenizer.json")):
        if arguments in WHOLE or not name.startswith(("no weights", "no tokenizer")):
            said = fails(*(one.format(name) for one in arguments))
            assert f"kdp: {name}" in said and words in said and (";" in said or ":" in said)
    assert not (broken / "new.gguf").exists()


@pytest.mark.parametrize("arguments, message", [
    (["export", "torn", "--gguf", "new.gguf"], "torn/model.safetensors cannot be read (Error while"),
    (["export", "half", "--gguf", "new.gguf"], "half has no tensor model.layers.0."),
    (["export", "{model}", "--gguf", "empty.txt/a.gguf"], "--gguf is empty.txt/a.gguf, which cannot be written ("),
    (["export", "{model}", "--gguf", "/proc/a.gguf"], "--gguf is /proc/a.gguf, which cannot be written (No such file "),
    (["init", "/proc/mine.yaml"], "/proc/mine.yaml: No such file or directory; name another path"),
    (["export", "{model}", "--gguf", "empty"], "--gguf is empty, which already exists"),
    (["generate", "torn", "hello"], "torn: AutoModelForCausalLM cannot load it (Error while deserializing"),
    (["generate", "{model}", ""], "the prompt is empty; give at least one word"),
    (["generate", "{model}", " \t "], "the prompt is empty; give at least one word"),
    (["generate", "{model}"], "Missing argument 'prompt'; see `kdp generate --help`"),
    (["generate", "{model}", "hello", "--tokens", "0"], "--tokens is '0', but must be greater than or equal to 1"),
    (["generate", "{model}", "hello", "--tokens", "a"], "--tokens is 'a', but must be a valid integer"),
    (["generate", "{model}", "hello", "--seed", "9" * 20], f"--seed is '{'9' * 20}', but must be less than or equal"),
    (["compare", "{model}", "{model}", "--heldout", "empty.txt"], "--heldout is 'empty.txt', which is an empty file; "),
    (["compare", "{model}", "{model}", "--heldout", "blank.txt"], "blank.txt holds no text; name a file with at least"),
    (["compare", "{model}", "{model}", "--heldout", "empty"], "--heldout is 'empty', which is a folder; name one file"),
    (["compare", "{model}", "{model}", "--heldout", ""], "--heldout is '': source '' cannot be read; write it as"),
    (["prune", "", "--out", "new"], "MODEL is '': source '' cannot be read; write it as"),
    (["prune", "~nobody-has-this-name/m", "--out", "new"], "MODEL is '~nobody-has-this-name/m': "),
    (["plan", "empty"], "empty cannot be read as a configuration (Is a directory); name a file, such as the one that"),
    (["plan", "empty.txt"], "empty.txt contains no configuration; `kdp init` writes one"),
    (["init", "empty"], "empty already exists; name another file, or delete it"),
    (["init", "empty.txt/mine.yaml"], "empty.txt is not a folder; create it, or name another file"),
    (["init", "new.yaml", "--calibration", "empty.txt"], "--calibration is 'empty.txt', which is an empty file"),
    (["methods", "kdp"], "; see `kdp methods --help`"),
])
def test_a_wrong_value_is_named_with_its_remedy(broken, given, monkeypatch, arguments, message):
    monkeypatch.chdir(broken)
    assert message in fails(*(one.format(model=given.model) for one in arguments))
    assert not any((broken / name).exists() for name in ("new", "new.gguf", "new.yaml"))


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "nan"])
def test_a_ratio_that_is_no_share_is_named(given, tmp_path, ratio):
    said = fails(*given.prune(tmp_path / "out", "--ratio", ratio))
    assert f"--ratio is {ratio}; give a share of the parameters" in said


def test_paths_with_spaces_are_paths(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in ((given.model, "a model"), (given.heldout, "a text.jsonl")):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    made = call("init", "a file.yaml", "--model", "a model", "--heldout", tmp_path / "a text.jsonl")
    assert made.exit_code == 0 and "`kdp plan 'a file.yaml'`" in made.stdout
    assert "| my-model |" in call("plan", "a file.yaml").stdout
    assert "perplexity of the first" in call("compare", "a model", "a model", "--heldout", "a text.jsonl").stdout


def test_a_wrong_configuration_is_one_line(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "contains no configuration" in fails("plan", tmp_path / "list.yaml")
    (tmp_path / "typo.yaml").write_text("gird: {}\n")
    assert "unknown key 'gird' at the top level; did you mean 'grid'?" in fails("plan", tmp_path / "typo.yaml")


def test_a_refused_family_is_named_before_its_weights_are_read(tmp_path, given, monkeypatch):
    monkeypatch.setattr(checkpoints, "convert", lambda *_, **__: pytest.fail("the weights were read"))
    folder = pico.save(tmp_path / "gemma", "gemma3_text")
    arguments = given._replace(model=folder).prune(tmp_path / "out", "--method", "slicegpt")
    assert "method slicegpt cannot prune a gemma3_text model" in fails(*arguments)


def test_code_of_a_checkpoint_never_runs(llama_folder, tmp_path):
    folder, ran = shutil.copytree(llama_folder, tmp_path / "foreign"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {name: f"evil.{name}" for name in ("AutoConfig",
                                                                                       "AutoModelForCausalLM")}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass AutoConfig: pass\n")
    for arguments in (["generate", folder, "hello"], ["inspect", folder],
                      ["prune", folder, "--out", tmp_path / "out", "--calibration", folder / "config.json"]):
        fails(*arguments)
    assert not ran.exists()


def test_a_trace_is_shown_when_it_is_asked_for():
    assert isinstance(call("--trace", "inspect", "nowhere").exception, app.CommandError)


def test_an_error_without_words_has_its_type():
    assert app.sentence(KeyError("a")) == "KeyError: 'a'"
    assert app.sentence(texts.TextError("two\n lines")) == "two lines"


def test_python_m_kdp_is_the_command_and_its_help_imports_no_torch():
    code = "import sys, kdp.app; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    run = subprocess.run([sys.executable, "-m", "kdp", "inspect", "nowhere"], cwd=ROOT, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 1 and run.stderr.startswith("kdp: nowhere contains no checkpoint")
    assert len(run.stderr.splitlines()) == 1
