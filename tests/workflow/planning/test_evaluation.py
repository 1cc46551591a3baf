"""Tasks, benchmarks and their files."""
import pytest
from planning import evaluation, resources
from planning.config import check
from planning.messages import ConfigError

from tests.workflow.project import CONFIG


def test_a_task_by_itself_knows_nothing_of_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("eval/piqa_val.jsonl", "eval/wikitext2_test.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    chosen = {"tasks": ["piqa", "wikitext"], "data": "data", "limit": 4, "limits": {"wikitext": 2}}
    config = {**CONFIG, "evaluate": CONFIG["evaluate"] | {"benchmarks": chosen, "limit": 3, "split": True}}
    check(config)
    own = config["evaluate"]["tasks"]
    assert evaluation.evaluated(config) == [*own, "piqa", "wikitext"] and resources.workload(config)["split"] == 5
    alone = {name: evaluation.one_task(config["evaluate"], name) for name in ("piqa", own[0])}
    assert alone["piqa"]["tasks"] == [] and alone["piqa"]["limit"] == 3
    assert alone["piqa"]["benchmarks"] == {"tasks": ["piqa"], "data": "data", "limit": 4, "limits": {}}
    assert alone[own[0]]["tasks"] == own[:1] and alone[own[0]]["benchmarks"]["tasks"] == []
    assert evaluation.benchmark_files(alone["piqa"]) == ["data/eval/piqa_val.jsonl"]
    assert evaluation.benchmark_files(alone[own[0]]) == []
    # an evaluation without benchmarks has none for its tasks either
    assert "benchmarks" not in evaluation.one_task(CONFIG["evaluate"], own[0])
    assert resources.workload(CONFIG)["split"] == 0


def test_a_task_that_nobody_knows_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CACHE", tmp_path)
    monkeypatch.setattr(evaluation, "ASK", "print('a warning'); print('[\"hellaswag\", \"piqa\"]')")
    wrong = {"evaluate": {"tasks": ["heldout_ppl", "hellaswagg"]}}
    with pytest.raises(ConfigError, match=r"names 'hellaswagg', which neither kdp nor lm-eval .* mean 'hellaswag'"):
        evaluation.check_tasks(wrong)
    evaluation.check_tasks({"evaluate": {"tasks": ["heldout", "piqa"]}})
    # a folder of the user may define the name
    evaluation.check_tasks({"evaluate": {**wrong["evaluate"], "task_folders": ["own"]}})
    # the answer is kept
    monkeypatch.setattr(evaluation, "ASK", "raise SystemExit(1)")
    evaluation.check_tasks({"evaluate": {"tasks": ["heldout_ppl", "piqa"]}})
    with pytest.raises(ConfigError, match="neither"):
        evaluation.check_tasks(wrong)
    for file in tmp_path.iterdir():
        file.unlink()
    evaluation.check_tasks(wrong)


def test_lm_eval_is_asked_for_its_own_names(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CACHE", tmp_path)
    assert {"hellaswag", "piqa", "mmlu", "lambada_openai"} <= set(evaluation._of_lm_eval())
