"""Tasks, benchmarks and their files."""
from planning import evaluation, resources
from planning.config import check

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
