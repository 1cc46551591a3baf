"""Evaluation split by task: each task a job, the scores those of one job, and what a failed task costs."""
import shutil

import pytest

from kdp_core.base import store
from tests.workflow.project import Project

SCORES = "results/pico/scores.json"
TASKS = ("heldout_ppl", "heldout_lastword", "heldout_continuation")
JUDGE = "def judge(doc, results):\n    {}\n"


@pytest.fixture(scope="module")
def split(built, tmp_path_factory):
    """The built project, its dense model scored anew by task."""
    project = Project(tmp_path_factory.mktemp("split") / "project")
    shutil.copytree(built.folder, project.folder, symlinks=True)
    for name in ("scores.json", "samples", "scored"):
        path = project.folder / "results/pico" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # a task to ask for later, which fails at first
    own = project.folder / "own"
    own.mkdir()
    (own / "own.yaml").write_text(f"include: {project.folder}/results/tasks/heldout_lastword.yaml\ntask: own\n"
                                  "process_results: !function own.judge\n", encoding="utf-8")
    (own / "own.py").write_text(JUDGE.format("raise RuntimeError('not yet')"), encoding="utf-8")
    project.config["evaluate"] |= {"split": True, "task_folders": ["own"]}
    assert project.planned(SCORES) == {"score_dense": 3, "evaluate_dense": 1}
    project.run(SCORES)
    return project


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".jsonl"}


def test_scores_and_samples_are_those_of_one_job(split, built):
    ours, theirs = (store.read(project.folder / SCORES) for project in (split, built))
    assert ours._replace(seconds=theirs.seconds) == theirs
    samples = [contents(project.folder / "results/pico/samples") for project in (split, built)]
    assert samples[0] == samples[1] and len(samples[0]) == 3
    assert split.planned(SCORES) == {}


def test_each_job_leaves_what_it_scored_and_the_last_loads_no_model(split):
    records = [store.read(split.folder / f"results/pico/scored/{task}.json") for task in TASKS]
    for task, record in zip(TASKS, records, strict=True):
        assert {score.task for score in record.scores} == {task} and record.seconds > 0
        log = (split.folder / f"results/logs/score/pico-{task}.log").read_text(encoding="utf-8")
        assert f"{task}, task 1 of 1: done" in log
    log = (split.folder / "results/logs/evaluate/pico.log").read_text(encoding="utf-8")
    assert log.count("kept from an earlier run") == 3 and ": done" not in log
    assert store.read(split.folder / SCORES).seconds == sum(record.seconds for record in records)


def test_a_task_that_fails_costs_itself_alone(split):
    split.config["evaluate"]["tasks"] = ["own", *TASKS]
    assert split.planned(SCORES) == {"score_dense": 1, "evaluate_dense": 1}
    before = contents(split.folder / "results/pico/scored")
    text = split.run(SCORES, check=False)
    assert "score_dense: RuntimeError: not yet" in text and contents(split.folder / "results/pico/scored") == before
    mended = JUDGE.format("return {'acc': 1.0, 'perplexity': results[0][0]}")
    (split.folder / "own/own.py").write_text(mended, encoding="utf-8")
    assert split.planned(SCORES) == {"score_dense": 1, "evaluate_dense": 1}
    split.run(SCORES)
    found = {(score.task, score.metric): score.value for score in store.read(split.folder / SCORES).scores}
    assert found["own", "acc"] == 1.0 and {task for task, _ in found} == {"own", *TASKS}


def test_the_switch_gives_what_is_there_again_and_can_be_left_out_of_the_count(copied):
    copied.config["evaluate"]["split"] = True
    planned = copied.planned("results/summary.csv")
    assert (planned["score"], planned["score_dense"], planned["evaluate"], planned["evaluate_dense"]) == (9, 3, 3, 1)
    assert not {"dense", "tokens", "hidden", "blocks", "step", "fold", "efficiency", "diagnose"} & set(planned)
    copied.run("plan")
    counted = {cost["stage"]: cost["jobs"] for cost in store.read_json(copied.folder / "results/plan.json")["costs"]}
    assert counted["score"] == 12 and counted["evaluate"] == 4
    # without the set of inputs among its reasons, snakemake sees nothing to do
    assert copied.planned("results/summary.csv", "--rerun-triggers", "mtime", "params", "code", "software-env") == {}
