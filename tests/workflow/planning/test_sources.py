"""Sources of models and texts: their form, and local files that are missing."""
import copy

import pytest
from planning import sources
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.project import CONFIG


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The pico configuration in a folder of its own, where none of its files is."""
    monkeypatch.chdir(tmp_path)
    return copy.deepcopy(CONFIG)


@pytest.mark.parametrize("section, name, source, words", [
    ("models", "pico", "hf-data:org/name", "models.pico.source is 'hf-data:org/name'; a model of the hub is hf:org/"),
    ("models", "pico", "pypi:gensim", "models.pico: source 'pypi:gensim' cannot be read; write it as hf:org/name"),
    ("models", "pico", "~nobody-has-this-name/model", "write the whole path"),
    ("texts", "made", "hf:org/name", "texts.made.source is 'hf:org/name'; a text of the hub is hf-data:org/name"),
    ("texts", "made", " ", "texts.made: source '' cannot be read"),
    ("texts", "made", "~nobody-has-this-name/text", "texts.made.source is '~nobody-has-this-name/text': "),
])
def test_a_source_of_a_wrong_form_is_refused_with_the_config(config, section, name, source, words):
    config[section][name]["source"] = source
    with pytest.raises(ConfigError) as error:
        check(config)
    assert words in str(error.value)


def test_each_missing_file_is_named_with_its_key_until_it_is_fetched(config, tmp_path):
    config["texts"]["other"] = {"source": "never read"}
    named = sources.unfetched(check(config))
    assert named == [("models", "pico"), ("texts", "made"), ("texts", "heldout")]
    model, made, _ = sources.absent(config, named)
    assert model.startswith(f"config: models.pico.source is 'model', and no such file or folder is on this machine "
                            f"(looked for in {tmp_path}); correct the path, or name a source such as hf:")
    assert "texts.made.source is 'made.txt', and no such" in made
    for path in ("results/pico/facts.json", "results/texts/made.jsonl", "held out.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("a text")
    config["texts"]["heldout"]["source"] = f" {tmp_path}/held out.txt "
    assert sources.unfetched(config) == [("texts", "heldout")]
    assert sources.absent(config, sources.unfetched(config)) == []


@pytest.mark.parametrize("source, words", [
    ("folder", "texts.heldout.source is 'folder', which is a folder; name one file"),
    ("empty.txt", "texts.heldout.source is 'empty.txt', which is an empty file; name a file with text"),
    ("{place}/nowhere", "/nowhere', and no such file or folder is on this machine; correct"),
    ("x" * 400, "no such file or folder"),
])
def test_a_text_that_cannot_be_one_is_named(config, tmp_path, source, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    config["texts"]["heldout"]["source"] = source.format(place=tmp_path)
    line, = sources.absent(check(config), [("texts", "heldout")])
    assert words in line and "\n" not in line


def test_sources_elsewhere_are_not_looked_for_on_this_machine(config):
    config["models"]["pico"]["source"] = "hf:org/name"
    config["texts"]["made"]["source"] = "pypi:gensim==4.4.0/gensim/lee.cor"
    config["texts"]["heldout"]["source"] = "hf-data:org/name"
    assert sources.absent(config, sources.unfetched(check(config))) == []


def test_a_missing_folder_of_tasks_is_named(config, tmp_path):
    assert sources.absent_folders(config) == []
    (tmp_path / "mine").mkdir()
    config["evaluate"]["task_folders"] = ["mine", "my tasks"]
    line, = sources.absent_folders(config)
    assert line.startswith("config: evaluate.task_folders names 'my tasks', which is no folder on this machine")
