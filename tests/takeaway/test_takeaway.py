"""A checkpoint that is taken away needs nothing of kdp: each use of `uses.py`, on each form of a pruned model."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdp_core.model import checkpoints
from tests import pico
from tests.takeaway.conftest import FORMS, STOCK
from tests.takeaway.uses import USES


@pytest.fixture(scope="session")
def used(forms, without_kdp, tmp_path_factory):
    """Folder -> use -> error."""
    ran = subprocess.run([sys.executable, str(Path(__file__).with_name("uses.py")), *map(str, forms.values())],
                         env=without_kdp, cwd=tmp_path_factory.mktemp("away"), text=True, stdin=subprocess.DEVNULL,
                         capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", USES)
def test_a_checkpoint_is_used_without_kdp(forms, used, form, use):
    assert used[str(forms[form])][use] == ""


@pytest.mark.parametrize("form", FORMS)
def test_only_what_the_own_class_cannot_hold_brings_code(forms, form):
    config = json.loads((forms[form] / "config.json").read_text())
    own = not config["model_type"].startswith("kdp")
    assert own == (form in STOCK) == ("auto_map" not in config) == (not list(forms[form].glob("*.py")))


TASK = """\
task: away
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""


@pytest.mark.parametrize("form", ["removed", "folded"])
def test_the_command_line_of_lm_eval_scores_a_checkpoint(forms, without_kdp, tmp_path, form):
    """Its perplexity is that of the logits."""
    texts = pico.documents(4, seed=1)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "away.yaml").write_text(TASK.format(file=tmp_path / "texts.jsonl"))
    trust = "" if form in STOCK else ",trust_remote_code=True"
    ran = subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "2",
                          "--model_args", f"pretrained={forms[form]},dtype=float32{trust}", "--tasks", "away",
                          "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
                         env=without_kdp, cwd=tmp_path, text=True, stdin=subprocess.DEVNULL, capture_output=True,
                         check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found, = (tmp_path / "out").rglob("results*.json")
    ppl = json.loads(found.read_text())["results"]["away"]["byte_perplexity,none"]
    model, reader = checkpoints.load_model(forms[form]), checkpoints.load_tokenizer(forms[form])
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[reader.eos_token_id if reader.bos_token_id is None else reader.bos_token_id,
                             *reader(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            nats -= float(model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    assert ppl == pytest.approx(math.exp(nats / sum(len(text.encode()) for text in texts)), rel=1e-4)
