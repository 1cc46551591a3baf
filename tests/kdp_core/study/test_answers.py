"""Answers: the greedy continuation of each prompt by each checkpoint, and what cannot be asked."""
import pytest
import torch

from kdp_core.base import store
from kdp_core.model import checkpoints
from kdp_core.study import answers
from tests import pico

PROMPTS = [" ".join(pico.documents(1)[0].split()[:4]), "word"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("pico") / "dense", "llama")


def test_a_text_is_the_most_likely_token_after_each_token(folder):
    model, reader = checkpoints.load_model(folder), checkpoints.load_tokenizer(folder)
    ids, made = reader(PROMPTS[0], return_tensors="pt")["input_ids"], []
    while len(made) < 5:
        made.append(model(torch.cat([ids, torch.tensor([made], dtype=torch.int64)], dim=1),
                          use_cache=False).logits[0, -1].argmax().item())
    if reader.eos_token_id in made:
        made = made[:made.index(reader.eos_token_id)]
    found = answers.continuations(folder, PROMPTS[:1], 5, "cpu", "float32")
    assert found == [reader.decode(made, skip_special_tokens=True)]


def test_every_model_answers_every_prompt_and_the_record_can_be_read_again(folder, tmp_path):
    found = answers.answers({"dense": folder, "same": folder}, prompts=PROMPTS, tokens=3)
    assert [row["name"] for row in found.rows] == ["dense", "same"] and found.rows[0]["texts"] == found.rows[1]["texts"]
    assert all(len(row["texts"]) == len(PROMPTS) for row in found.rows)
    store.write(tmp_path / "answers.json", found)
    assert store.read(tmp_path / "answers.json") == found


@pytest.mark.parametrize("prompts", [[], ["  "]])
def test_prompts_without_a_word_are_refused(folder, prompts):
    with pytest.raises(answers.AnswerError, match="give at least one"):
        answers.answers({"dense": folder}, prompts=prompts)
