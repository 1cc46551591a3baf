"""What all rules have, and the environments that they run in."""
import subprocess
import sys

import yaml

from tests.workflow.project import ROOT, Project


def test_environments_pin_what_the_constraints_pin():
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for path in sorted((ROOT / "envs").glob("*.yaml")):
        entries = yaml.safe_load(path.read_text())["dependencies"]
        pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
        for pin in pip:
            name, version = pin.lower().replace("[hf]", "").split("==")
            assert pins[name] == version, f"{path.name}: {pin}"


def test_lint_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "Congratulations" in done.stdout, done.stdout


def test_every_rule_has_message_log_benchmark_resources_and_conda():
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ResourceSettings

    with SnakemakeApi() as api:
        workflow_api = api.workflow(resource_settings=ResourceSettings(cores=1), snakefile=ROOT / "Snakefile",
                                    workdir=ROOT)
        workflow_api.dag()
        rules = [rule for rule in workflow_api._workflow.rules if rule.name != "all"]
        assert len(rules) > 15
        for rule in rules:
            lacking = [name for name in ("message", "log", "benchmark", "conda_env") if not getattr(rule, name)]
            lacking += [name for name in ("mem_mb", "runtime") if name not in rule.resources]
            assert not lacking, f"rule {rule.name} lacks {', '.join(lacking)}"


def test_the_tests_of_the_embedded_default_are_a_target_of_their_own(tmp_path):
    project = Project(tmp_path).make()
    assert project.planned("test") == {"test": 1}
    project.config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert project.planned("test") == {"text": 2, "dense": 1, "test": 1}
    assert "test" not in project.planned()
