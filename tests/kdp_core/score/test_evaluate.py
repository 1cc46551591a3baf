"""Scores by lm-eval against direct computations on pico models."""
import json
import math
import socket
import statistics

import pytest
import torch

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.model import checkpoints
from kdp_core.results.summary import main_scores
from kdp_core.score import evaluate, fast, judge, task_records, tasks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.metrics import PPL_CEILING, PRIMARY
from tests import pico

DOCUMENTS = pico.documents(12, seed=3, words=90)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "heldout"
    tasks.write_tasks(DOCUMENTS, folder, window=16, lastword_items=12, continuation_items=8)
    return folder


@pytest.fixture(scope="module")
def scored(llama_folder, task_folder, tmp_path_factory):
    """(scores, folder of samples) of a pico model on all three tasks, by their tag, with the network shut."""
    samples = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        return evaluate.evaluate(llama_folder, tasks=["heldout"], task_folders=[task_folder],
                                 samples_folder=samples), samples


def _refuse(*_):
    raise AssertionError("an evaluation on local tasks reached for the network")


def _by_name(scores):
    return {(score.task, score.metric): score for score in scores.scores}


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_scores_are_there_with_unit_and_error(scored, tmp_path):
    found = _by_name(scored[0])
    assert {name: (score.unit, score.higher_is_better) for name, score in found.items()} == {
        ("heldout_continuation", "acc"): ("share", True), ("heldout_continuation", "acc_norm"): ("share", True),
        ("heldout_lastword", "acc"): ("share", True), ("heldout_lastword", "perplexity"): ("ppl", False),
        ("heldout_ppl", "ppl"): ("ppl", False), ("heldout_ppl", "bits_per_byte"): ("bits/byte", False)}
    assert found["heldout_lastword", "acc"].items == 12 and found["heldout_continuation", "acc"].items == 8
    assert all(score.stderr is not None for score in found.values())
    store.write(tmp_path / "scores.json", scored[0])
    assert store.read(tmp_path / "scores.json") == scored[0]


def test_ppl_is_that_of_the_logits(scored, llama_folder):
    ids = pico.tokenizer()("\n".join(DOCUMENTS), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids_ST = ids[:len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        log_probs_STV = checkpoints.load_model(llama_folder)(ids_ST).logits.double().log_softmax(-1)
    nll = -log_probs_STV[:, :-1].gather(-1, ids_ST[:, 1:, None]).squeeze(-1)
    found = _by_name(scored[0])["heldout_ppl", "ppl"]
    assert found.items == len(ids_ST)
    assert found.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    # windows of equal length: the delta method is ppl times the standard error of a mean
    window_means = nll.mean(1).tolist()
    expected = found.value * statistics.stdev(window_means) / math.sqrt(len(window_means))
    assert found.stderr == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_counts_predicted_bytes(scored, llama_folder, task_folder):
    windows = tasks.read_windows(task_folder / "heldout_ppl.jsonl", tokenizer=str(llama_folder))["test"]
    nats = math.log(_by_name(scored[0])["heldout_ppl", "ppl"].value) * 15 * len(windows)
    expected = nats / math.log(2) / sum(windows["bytes"])
    assert _by_name(scored[0])["heldout_ppl", "bits_per_byte"].value == pytest.approx(expected, rel=1e-6)


def test_lastword_score_is_that_of_the_logits(scored, llama_folder, task_folder):
    model, tokenizer = checkpoints.load_model(llama_folder), checkpoints.load_tokenizer(llama_folder)
    samples = _lines(scored[1] / "heldout_lastword.jsonl")
    for item, sample in zip(_lines(task_folder / "heldout_lastword.jsonl"), samples, strict=True):
        whole = tokenizer(f"{item['context']} {item['target']}", return_tensors="pt")["input_ids"]
        first = len(tokenizer(item["context"])["input_ids"])
        with torch.no_grad():
            logits_TV = model(whole).logits[0, first - 1:-1]
        ll = logits_TV.log_softmax(-1).gather(-1, whole[0, first:, None]).sum().item()
        assert sample["perplexity"] == pytest.approx(ll, rel=1e-4)
        assert sample["acc"] == float((logits_TV.argmax(-1) == whole[0, first:]).all())
        assert sample["target"] == f" {item['target']}"


def test_samples_carry_the_scores(scored):
    samples = _lines(scored[1] / "heldout_continuation.jsonl")
    for sample in samples:
        likelihoods = [ll for ll, _ in sample["responses"]]
        assert len(likelihoods) == 4
        assert sample["acc"] == float(likelihoods.index(max(likelihoods)) == sample["target"])
    mean = statistics.mean(sample["acc"] for sample in samples)
    assert mean == _by_name(scored[0])["heldout_continuation", "acc"].value


def test_scores_repeat(scored, llama_folder, task_folder):
    again = evaluate.evaluate(llama_folder, tasks=["heldout_continuation", "heldout_ppl"], task_folders=[task_folder])
    mine = _by_name(scored[0])
    assert all(score == mine[score.task, score.metric] for score in again.scores)


def test_limit_takes_the_first_items(llama_folder, task_folder):
    found = evaluate.evaluate(llama_folder, tasks=["heldout_ppl"], task_folders=[task_folder], limit=3, batch_size=2)
    assert {score.items for score in found.scores} == {3}


def test_a_broken_model_stands_at_the_ceiling(llama_folder, task_folder, monkeypatch, tmp_path):
    model = checkpoints.load_model(llama_folder)
    model.get_input_embeddings().weight.data[:] = math.nan
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: model)
    found = _by_name(evaluate.evaluate(llama_folder, tasks=["heldout_ppl"], task_folders=[task_folder],
                                       samples_folder=tmp_path))
    assert found["heldout_ppl", "ppl"][2:4] == (PPL_CEILING, None)
    assert _lines(tmp_path / "heldout_ppl.jsonl")[0]["ppl"] == [None, 15]


def test_groups_give_their_aggregate_and_named_members(llama_folder, task_folder, tmp_path):
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [heldout_lastword, heldout_continuation]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n")
    found = evaluate.evaluate(llama_folder, tasks=["both"], task_folders=[task_folder, tmp_path])
    by_name = _by_name(found)
    members = [by_name[f"both/heldout_{name}", "acc"] for name in ("lastword", "continuation")]
    whole = by_name["both", "acc"]
    assert whole.items == 20 and whole.stderr is not None
    assert whole.value == pytest.approx(sum(member.value * member.items for member in members) / 20)
    assert list(main_scores(found.scores, PRIMARY["acc"]).values()) == [whole]


@pytest.mark.parametrize(("wrong", "match"), [
    ({"tasks": []}, "no list of task names"), ({"tasks": "heldout_ppl"}, "no list of task names"),
    ({"task_folders": ["/nowhere"]}, "/nowhere")])
def test_wrong_arguments_are_refused_before_the_model_is_loaded(wrong, match, tmp_path):
    given = {"tasks": ["heldout_ppl"], "task_folders": []} | wrong
    with pytest.raises(evaluate.EvaluationError, match=match):
        evaluate.evaluate(tmp_path / "no model here", **given)


@pytest.mark.parametrize(("wrong", "match"), [
    ({"batch_size": 0}, "batch_size is 0; give a number at least 1"), ({"limit": 0}, "limit is 0"),
    ({"fewshot": -1}, "fewshot is -1; give a number at least 0"), ({"max_length": 0}, "max_length is 0")])
def test_numbers_out_of_range_are_refused_before_the_model_is_loaded(wrong, match, tmp_path):
    with pytest.raises(OptionError, match=match):
        evaluate.evaluate(tmp_path / "no model here", tasks=["heldout_ppl"], **wrong)


def test_unknown_tasks_name_their_neighbours(tmp_path, task_folder):
    with pytest.raises(evaluate.EvaluationError, match=r"'heldout_pll' is unknown .* heldout_ppl"):
        evaluate.evaluate(tmp_path / "no model here", tasks=["heldout_pll"], task_folders=[task_folder])


def test_missing_data_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: no_such_file.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: context\ndoc_to_target: target\n")
    with pytest.raises(evaluate.EvaluationError, match=r"tasks lost: data or code cannot be loaded .*no_such_file"):
        evaluate.evaluate(tmp_path / "no model here", tasks=["lost"], task_folders=[tmp_path])


def test_nothing_is_printed(llama_folder, task_folder, capfd):
    evaluate.evaluate(llama_folder, tasks=["heldout_lastword"], task_folders=[task_folder], limit=2)
    assert capfd.readouterr() == ("", "")


HELDOUT = ["heldout_continuation", "heldout_lastword", "heldout_ppl"]


@pytest.fixture
def loads(monkeypatch):
    """Folders of the models that were loaded."""
    found, load = [], checkpoints.load_model
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, **more: found.append(folder) or load(folder, **more))
    return found


def _kept(folder):
    return {path.name.rsplit("-", 1)[0]: path for path in folder.iterdir()}


def test_a_killed_evaluation_goes_on_at_the_task_it_was_in(scored, llama_folder, task_folder, tmp_path, monkeypatch,
                                                           loads):
    whole, run = tmp_path / "records", evaluate._run
    given = {"tasks": HELDOUT, "task_folders": [task_folder], "records_folder": whole}

    def killed(job, *rest):
        if job.name == "heldout_lastword":
            raise KeyboardInterrupt
        return run(job, *rest)

    monkeypatch.setattr(evaluate, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(llama_folder, **given)
    assert set(_kept(whole)) == {"heldout_continuation"}

    ran = []
    monkeypatch.setattr(evaluate, "_run", lambda job, *rest: ran.append(job.name) or run(job, *rest))
    found = evaluate.evaluate(llama_folder, **given, samples_folder=tmp_path / "samples")
    assert ran == ["heldout_lastword", "heldout_ppl"] and len(loads) == 2
    # as if never disturbed: same scores, same samples
    assert found.scores == scored[0].scores
    assert {path.name: path.read_text() for path in (tmp_path / "samples").iterdir()} == {
        path.name: path.read_text() for path in scored[1].iterdir()}

    again = evaluate.evaluate(llama_folder, **given)
    assert again == found and len(ran) == 2 and len(loads) == 2


def test_a_record_tells_the_value_of_each_item_and_both_scorers_agree(llama_folder, task_folder, tmp_path, loads):
    given = {"tasks": ["heldout_continuation"], "task_folders": [task_folder]}
    values = {}
    for scorer in ("fast", "lm_eval"):
        found = evaluate.evaluate(llama_folder, **given, scorer=scorer, records_folder=tmp_path / scorer)
        record = task_records.read(_kept(tmp_path / scorer)["heldout_continuation"])
        values[scorer] = task_records.item_values(record)
        assert set(values[scorer]) == {"acc", "acc_norm"} and len(values[scorer]["acc"]) == 8
        assert statistics.mean(values[scorer]["acc"].values()) == _by_name(found)["heldout_continuation", "acc"].value
    assert values["fast"] == values["lm_eval"] and len(loads) == 2


def test_what_changes_a_score_makes_its_record_anew(llama_folder, task_folder, tmp_path, loads):
    folder = tmp_path / "records"
    given = {"tasks": HELDOUT[:2], "task_folders": [task_folder], "records_folder": folder}
    evaluate.evaluate(llama_folder, **given)
    first = _kept(folder)
    evaluate.evaluate(llama_folder, **given | {"tasks": HELDOUT})
    second = _kept(folder)
    assert {name: second[name] for name in first} == first and len(second) == 3
    limited = evaluate.evaluate(llama_folder, **given, limit=3)
    assert {score.items for score in limited.scores} == {3}
    third = _kept(folder)
    # one record a task: those of another limit are gone, those not asked for stay
    assert len(list(folder.iterdir())) == 3 and third["heldout_ppl"] == second["heldout_ppl"]
    assert all(third[name] != first[name] for name in first)
    other = pico.save(tmp_path / "other", "llama", seed=1)
    evaluate.evaluate(other, **given, limit=3)
    assert all(_kept(folder)[name] != third[name] for name in first) and len(loads) == 4
    evaluate.evaluate(other, **given, limit=3, code="of another version")
    assert len(loads) == 5


def test_groups_are_put_together_from_records(llama_folder, task_folder, tmp_path):
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [heldout_lastword, heldout_continuation]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n")
    given = {"tasks": ["both"], "task_folders": [task_folder, tmp_path], "records_folder": tmp_path / "records"}
    assert evaluate.evaluate(llama_folder, **given) == evaluate.evaluate(llama_folder, **given)


def test_tasks_scored_one_by_one_are_put_together_without_the_model(scored, llama_folder, task_folder, tmp_path, loads):
    given = {"task_folders": [task_folder], "records_folder": tmp_path / "records"}
    alone = [evaluate.evaluate(llama_folder, tasks=[name], **given) for name in reversed(HELDOUT)]
    assert len(loads) == 3
    whole = evaluate.evaluate(llama_folder, tasks=HELDOUT, **given, kept_only=True, samples_folder=tmp_path / "samples")
    assert len(loads) == 3 and whole.scores == scored[0].scores and whole.versions == scored[0].versions
    assert whole.seconds == sum(found.seconds for found in reversed(alone))
    assert {path.name: path.read_text() for path in (tmp_path / "samples").iterdir()} == {
        path.name: path.read_text() for path in scored[1].iterdir()}
    with pytest.raises(evaluate.EvaluationError, match=r"'heldout_continuation': no record in .*records.* delete"):
        evaluate.evaluate(llama_folder, tasks=HELDOUT, **given, kept_only=True, limit=3)
    assert len(loads) == 3


@pytest.fixture
def own_tasks(task_folder, tmp_path):
    """Tasks that could be taken for one another: by their names in a folder, and by a draw when they are loaded."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "drawn.py").write_text(
        "import random\n\n\ndef shuffled(docs):\n    return docs.select(random.sample(range(len(docs)), len(docs)))\n")
    for name, more in (("own_a", ""), ("own-a", ""), ("drawn", "process_docs: !function drawn.shuffled\n")):
        (folder / f"{name}.yaml").write_text(f"include: {task_folder / 'heldout_lastword.yaml'}\ntask: {name}\n{more}")
    return folder


def test_a_record_is_found_whatever_else_is_asked_for(llama_folder, task_folder, own_tasks, tmp_path, loads):
    names = ["drawn", "own-a", "own_a"]
    given = {"task_folders": [task_folder, own_tasks], "records_folder": tmp_path / "records", "limit": 2}
    for name in names:
        evaluate.evaluate(llama_folder, tasks=[name], **given)
    found = evaluate.evaluate(llama_folder, tasks=["own_a", "drawn", "own-a"], **given, kept_only=True)
    assert {score.task for score in found.scores} == set(names) and len(loads) == 3
    items = [path.read_text().splitlines()[1:] for path in sorted((tmp_path / "records").iterdir())]
    assert items[0] != items[1] == items[2], "the draw counts"


@pytest.fixture
def data(tmp_path):
    """Local files of three benchmarks."""
    words = pico.documents(6, seed=4, words=24)
    items = {"piqa_val": [{"goal": text[:40], "sol1": text[40:70], "sol2": text[70:95], "label": i % 2}
                          for i, text in enumerate(words)],
             "wikitext2_test": [{"page": text} for text in words], "humaneval_test": [],
             "xsum_dev": [{"document": text, "summary": text[:30]} for text in words]}
    (tmp_path / "data" / "eval").mkdir(parents=True)
    for name, own in items.items():
        (tmp_path / "data" / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in own))
    return tmp_path / "data"


def test_benchmarks_are_scored_beside_other_tasks_with_limits_of_their_own(llama_folder, task_folder, data, loads):
    chosen = Chosen(["piqa", "wikitext", "xsum"], data=str(data), limit=4, limits={"xsum": 2})
    found = evaluate.evaluate(llama_folder, tasks=["heldout_lastword"], chosen=chosen, task_folders=[task_folder],
                              limit=3)
    by_name = _by_name(found)
    assert len(loads) == 1
    assert {task: score.items for (task, _), score in by_name.items()} == {
        "heldout_lastword": 3, "piqa": 4, "wikitext": 4, "xsum": 2}
    assert by_name["xsum", "rouge1"].unit == "share" and by_name["xsum", "rouge1"].stderr is not None
    ppl = by_name["wikitext", "word_perplexity"]
    assert (ppl.unit, ppl.higher_is_better) == ("ppl", False) and 0 < ppl.stderr < ppl.value
    assert by_name["wikitext", "bits_per_byte"].unit == "bits/byte"
    assert found.versions["data:piqa"] != found.versions["data:wikitext"]


def test_a_changed_data_file_is_seen(llama_folder, data, tmp_path, loads):
    given = {"tasks": [], "chosen": Chosen(["piqa"], data=str(data), limit=2), "records_folder": tmp_path / "records"}
    evaluate.evaluate(llama_folder, **given)
    file = data / "eval" / "piqa_val.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], *lines[3:]]))
    evaluate.evaluate(llama_folder, **given)
    assert len(loads) == 1, "beyond the limit"
    file.write_text("".join(reversed(lines)))
    evaluate.evaluate(llama_folder, **given)
    assert len(loads) == 2


def test_long_tasks_say_how_far_they_are(llama_folder, data, monkeypatch, caplog):
    monkeypatch.setattr(judge, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(fast, "ROW_TOKENS", 16)
    with caplog.at_level("INFO", logger="kdp_core"):
        evaluate.evaluate(llama_folder, tasks=[], chosen=Chosen(["piqa", "wikitext"], data=str(data)), batch_size=2)
    said = [record.getMessage() for record in caplog.records]
    assert "piqa, task 1 of 2: 6 items" in said and "wikitext, task 2 of 2: 6 items" in said
    assert any(text.startswith("piqa, task 1 of 2: 10 of 12 requests after") for text in said)
    assert any(text.startswith("wikitext, task 2 of 2: 4 of 6 requests after") for text in said)


def test_answers_count_once_in_the_progress(llama_folder, data, monkeypatch):
    counts = {}
    monkeypatch.setattr(judge.Progress, "advance", lambda self, requests: counts.update(
        {self._label: counts.get(self._label, 0) + requests}))
    evaluate.evaluate(llama_folder, tasks=[], chosen=Chosen(["piqa", "wikitext", "xsum"], data=str(data), limit=3))
    assert list(counts.values()) == [6, 3, 3]


def test_tasks_that_run_programs_are_refused_wherever_they_come_from(llama_folder, task_folder, tmp_path):
    (tmp_path / "risky.yaml").write_text(
        "include: " + str(task_folder / "heldout_lastword.yaml") + "\ntask: risky\nunsafe_code: true\n")
    with pytest.raises(evaluate.EvaluationError, match=r"'risky' runs programs .*allow_code to true"):
        evaluate.evaluate(tmp_path / "no model here", tasks=["risky"], task_folders=[tmp_path])


def test_a_task_and_a_benchmark_of_one_name_are_refused(tmp_path):
    with pytest.raises(evaluate.EvaluationError, match="'piqa' is named as task and as benchmark"):
        evaluate.evaluate(tmp_path / "no model here", tasks=["piqa"], chosen=Chosen(["piqa"]))
