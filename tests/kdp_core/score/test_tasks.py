"""Tasks made from held-out text: their items are true to the text and reproducible, and too little text is refused."""
import json
import shutil
from itertools import chain

import pytest
from lm_eval.tasks import TaskManager

from kdp_core.base.options import OptionError
from kdp_core.score import tasks
from tests import pico

DOCUMENTS = pico.documents(12, seed=3, words=90)


def test_last_words_are_the_text():
    for item in tasks.last_words(DOCUMENTS, items=20, seed=0):
        source = DOCUMENTS[item["document"]]
        assert f"{item['context']} {item['target']}." in source
        assert tasks.LASTWORD_CONTEXT[0] <= len(item["context"].split()) <= tasks.LASTWORD_CONTEXT[1]
        assert item["target"].isalpha() and len(item["target"]) >= 4
        assert source.startswith(item["context"]) or f". {item['context']}" in source


def test_lastword_targets_end_sentences_only():
    words = "One two three four " * 9
    documents = [words + "end U.S. Army came. Then it stopped at 1999. He saw 12 dogs, a cat. All went home!"]
    with pytest.raises(tasks.TaskError) as error:
        tasks.last_words(documents, items=9, seed=0)
    # `came` and `home` end sentences and are words of four letters; `1999` and `cat` do not count
    assert "gives 2 items, 9 were asked for" in str(error.value)
    assert [item["target"] for item in tasks.last_words(documents, items=2, seed=0)] == ["came", "home"]


def test_continuation_gold_is_the_true_one():
    for item in tasks.continuations(DOCUMENTS, items=20, seed=0):
        source, gold = DOCUMENTS[item["document"]], item["choices"][item["gold"]]
        assert f"{item['context']} {gold}" in source
        low, high = tasks.CONTINUATION_CONTEXT
        assert low <= len(item["context"].split()) <= high
        assert len({len(choice.split()) for choice in item["choices"]}) == 1
        assert all(choice[0].islower() for choice in item["choices"])


def test_continuation_distractors_come_from_other_documents():
    documents = [document.replace("the", f"the{number}") for number, document in enumerate(DOCUMENTS)]
    for item in tasks.continuations(documents, items=20, seed=0):
        wrong = [choice for place, choice in enumerate(item["choices"]) if place != item["gold"]]
        homes = [[number for number, document in enumerate(documents) if choice in document] for choice in wrong]
        assert all(home and item["document"] not in home for home in homes)
        assert len({home[0] for home in homes}) == 3


def test_gold_is_spread_over_all_places():
    many = pico.documents(60, seed=5, words=90)
    golds = [item["gold"] for item in tasks.continuations(many, items=100, seed=0)]
    # binomial(100, 1/4): mean 25, standard deviation 4.3
    assert all(abs(golds.count(place) - 25) < 4 * 4.33 for place in range(4))


@pytest.mark.parametrize("make", [tasks.last_words, tasks.continuations])
def test_items_depend_on_the_seed_alone(make):
    assert make(DOCUMENTS, items=10, seed=1) == make(list(DOCUMENTS), items=10, seed=1)
    assert make(DOCUMENTS, items=10, seed=1) != make(DOCUMENTS, items=10, seed=2)
    places = [item["document"] for item in make(DOCUMENTS, items=10, seed=1)]
    assert places == sorted(places)


@pytest.mark.parametrize("make", [tasks.last_words, tasks.continuations])
def test_too_small_a_text_says_what_it_gives(make):
    with pytest.raises(tasks.TaskError, match=r"gives \d+ items, 5000 were asked for"):
        make(DOCUMENTS, items=5000, seed=0)


def test_continuations_need_four_documents():
    with pytest.raises(tasks.TaskError, match="2 other documents are long enough"):
        tasks.continuations(DOCUMENTS[:3], items=1, seed=0)


def test_folder_is_reproducible_and_may_be_moved(tmp_path, llama_folder):
    for name in ("first", "second"):
        facts = tasks.write_tasks(DOCUMENTS, tmp_path / name, window=16, lastword_items=8, continuation_items=4, seed=7)
    first, second = ({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
                     for name in ("first", "second"))
    assert first == second
    assert set(first) == {f"{name}.{kind}" for name in tasks.NAMES for kind in ("yaml", "jsonl")} | {
        "heldout.json", "heldout.py"}
    assert json.loads(first["heldout.json"]) == facts
    assert str(tmp_path) not in b"".join(first.values()).decode()
    moved = shutil.move(tmp_path / "first", tmp_path / "elsewhere")
    manager = TaskManager(include_path=moved, include_defaults=False, metadata={"tokenizer": str(llama_folder)})
    loaded = manager.load(["heldout"])["tasks"]
    assert {name: len(task.eval_docs) for name, task in loaded.items() if name != "heldout_ppl"} == {
        "heldout_lastword": 8, "heldout_continuation": 4}


def test_windows_need_a_tokenizer(tmp_path):
    tasks.write_tasks(DOCUMENTS, tmp_path / "tasks", lastword_items=1, continuation_items=1)
    with pytest.raises(tasks.TaskError, match="as `tokenizer` in lm-eval's metadata"):
        TaskManager(include_path=tmp_path / "tasks", include_defaults=False).load(["heldout_ppl"])


def test_nothing_is_written_when_the_text_falls_short(tmp_path):
    with pytest.raises(tasks.TaskError):
        tasks.write_tasks(DOCUMENTS, tmp_path / "tasks", lastword_items=10 ** 4)
    with pytest.raises(OptionError, match="window is 1; give a number at least 2"):
        tasks.write_tasks(DOCUMENTS, tmp_path / "tasks", window=1)
    assert list(tmp_path.iterdir()) == []


def test_windows_pack_the_whole_text(tmp_path, llama_folder):
    tasks.write_tasks(DOCUMENTS, tmp_path / "tasks", window=16, lastword_items=4, continuation_items=4)
    items = tasks.read_windows(tmp_path / "tasks" / "heldout_ppl.jsonl", tokenizer=str(llama_folder))["test"]
    ids = pico.tokenizer()("\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    packed = list(chain.from_iterable(items["ids"]))
    assert packed == ids[:len(ids) // 16 * 16]
    assert "".join(items["text"]) == pico.tokenizer().decode(packed)
    predicted = pico.tokenizer().decode(items[0]["ids"][1:])
    assert items[0]["bytes"] == len(predicted.encode()) < len(items[0]["text"].encode())
