"""`kdp expect`: the sentence of the library for a folder, the dense model that it finds, and bad input in one line."""
import json
import shutil

import pytest

from kdp import expectation, heldout
from kdp_core.study import expect, single_step
from tests import pico
from tests.kdp.conftest import call, fails

SMALL = ("--windows", "3", "--window", "12")


def test_it_says_what_the_library_says(given, finished):
    out, _ = finished
    result = call("expect", out, "--heldout", given.heldout, *SMALL)
    documents = [json.loads(line)["text"] for line in given.heldout.read_text().splitlines()]
    ids_ST = heldout.windows(out, documents, 12)
    found = expect.expectation(single_step.measure(out / ".kdp/dense", out, ids_ST, windows=3))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(found.sentence + "\n") and "Expect this model to keep" in result.stdout
    assert "freedom from repetition" in result.stdout and "to" in result.stdout.splitlines()[-1]


def test_a_model_beside_itself_keeps_everything(given, llama_folder):
    said = call("expect", llama_folder, "--dense", llama_folder, "--heldout", given.heldout, *SMALL).stdout
    assert said.startswith("Expect this model to keep 100 % of the dense model's generation quality")


def test_a_scrambled_model_is_expected_to_keep_little(given, llama_folder, tmp_path):
    """By the predictor that comes with the library."""
    pico.model("llama", seed=1).save_pretrained(tmp_path / "other")
    pico.tokenizer().save_pretrained(tmp_path / "other")
    documents = pico.documents(10)
    found = expectation.expectation(tmp_path / "other", llama_folder, documents, windows=3, length=12, device="cpu")
    assert found.losses["quality"] > 0.5 and found.losses["agreement"] > 0.8


def test_the_dense_model_of_the_workflow_is_found(llama_folder, tmp_path):
    dense = shutil.copytree(llama_folder, tmp_path / "results/pico/dense")
    point = tmp_path / "results/pico/news/remove/r0.1-k3/checkpoint"
    shutil.copytree(llama_folder, point)
    with expectation.dense_of(point, None, tmp_path) as found:
        assert found == dense


@pytest.mark.parametrize("given, message", [
    (("{empty}",), "contains no checkpoint"),
    (("{model}", *SMALL), "does not name its dense model; name it by --dense"),
    (("{model}", "--dense", "no/such", *SMALL), "no such file or folder"),
    (("{model}", "--dense", "{model}", "--window", "12", "--windows", "100000"), "windows is 100000, but the text has"),
])
def test_bad_input_is_one_line(llama_folder, given, message, tmp_path, request):
    text = request.getfixturevalue("given_text")
    words = {"{model}": llama_folder, "{empty}": tmp_path}
    assert message in fails("expect", *(words.get(one, one) for one in given), "--heldout", text)


@pytest.fixture
def given_text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in pico.documents(10)))
    return path


def test_another_tokenizer_is_refused(llama_folder, given_text, tmp_path):
    other = shutil.copytree(llama_folder, tmp_path / "other")
    state = json.loads((other / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 384, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(state))
    assert "different tokenizers" in fails("expect", other, "--dense", llama_folder, "--heldout", given_text, *SMALL)
