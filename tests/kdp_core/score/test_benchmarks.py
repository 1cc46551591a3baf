"""The table of benchmarks: every task built from the hub's data, refusals, and the page that lists them."""
import re
from pathlib import Path

import pytest
import yaml

from kdp_core.score import benchmarks, evaluate
from kdp_core.score.benchmarks import BENCHMARKS, BenchmarkError, Chosen
from tests.kdp_core.score.hub import built, local


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hubs_data_set_is_asked_for_and_prompts_are_made(name, hub):
    entry = BENCHMARKS[name]
    task = built(Chosen([name], allow_code=True, fewshot=0), name)
    (path, config, options), = hub
    assert (path, config) == entry.hub[:2] and options == {"revision": entry.hub.revision, **entry.hub.options}
    task.build_all_requests(limit=2)
    assert task.instances and all(text for one in task.instances for text in one.arguments if text != "")
    target = task.doc_to_target(task.eval_docs[0])
    assert target is not None and target != ""
    metrics = {metric if isinstance(metric, str) else metric.__name__ for metric in task.aggregation()}
    assert entry.metric in metrics


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    data = local(tmp_path / "data", "piqa")
    for chosen, words in (
            (Chosen(["piqqa"]), "'piqqa' is unknown; did you mean 'piqa'"),
            (Chosen(["piqa"], limits={"pika": 2}), "'pika' is unknown"),
            (Chosen(["humaneval"]), "runs programs that the model writes; set evaluate.benchmarks.allow_code"),
            (Chosen(["piqa", "copa"], data=data), "eval/copa_val.jsonl does not exist; put it there"),
            (Chosen(["piqa"], data=data, fewshot=2), "calib/piqa_train.jsonl does not exist")):
        with pytest.raises(BenchmarkError, match=words):
            benchmarks.write_tasks(tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_every_definition_is_used_and_every_benchmark_has_one():
    own = {path.stem for path in benchmarks.FILES.glob("*.yaml") if not path.stem.startswith("heldout")}
    assert own <= set(BENCHMARKS)
    assert all(name in own or (benchmarks.stock_folder() / entry.stock).is_file()
               for name, entry in BENCHMARKS.items())
    assert yaml.safe_load((benchmarks.FILES / "xsum.yaml").read_text().replace("!function ", ""))[
        "generation_kwargs"]["max_gen_toks"] == 64


def test_every_function_that_a_task_file_names_is_covered_by_the_hash_of_the_code():
    named = {name for file in benchmarks.FILES.glob("*.yaml")
             for name in re.findall(r"!function (kdp_core[\w.]+)", file.read_text(encoding="utf-8"))}
    named |= {f"{benchmarks.DATA}.{name}" for name in ("read_local", "read_cmmlu")}
    modules = {module.__name__: module for module in evaluate.CALLED_BY_NAME}
    assert len(named) > 15
    for name in named:
        module, _, function = name.rpartition(".")
        assert callable(getattr(modules[module], function)), name


def test_the_page_has_every_benchmark_as_the_table_does():
    lines = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    for name, entry in BENCHMARKS.items():
        chance = "–" if entry.chance is None else f"{entry.chance:.3g}"
        told = [f"`{entry.hub.path}`", f"| {entry.metric} | {chance} |", f"`{entry.local}`"]
        assert all(part in rows[name] for part in told + [f"(`{entry.shots}`)"] * bool(entry.shots)), name
