"""Hashes of library code, rows on rows, the schema and the launcher."""
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.workflow.project import CONFIG, ROOT

sys.path.insert(0, str(ROOT / "rules"))
import plumbing


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library that plumbing hashes instead of the real one."""
    for name in ("kdp_core", "workflow_scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "config.schema.json", tmp_path)
    monkeypatch.setattr(plumbing, "ROOT", tmp_path)
    monkeypatch.setattr(plumbing, "TABLE", tmp_path / "kdp_core/methods/__init__.py")
    fresh(monkeypatch)
    yield tmp_path
    fresh(monkeypatch)


def fresh(monkeypatch):
    for name in ("_imports", "code", "step_code"):
        getattr(plumbing, name).cache_clear()


def hashes():
    return {"hidden": plumbing.code("hidden"), "figure": plumbing.code("figure"),
            "kernel": plumbing.step_code("kdp", "kernel"), "inverse": plumbing.step_code("kdp", "inverse"),
            "fit": plumbing.step_code("linear", "fit"), "blocks": plumbing.code("blocks", "kdp", ("block",)),
            "fold remove": plumbing.code("fold", "remove"), "fold kdp": plumbing.code("fold", "kdp")}


def changed_by(library, monkeypatch, file, old, new):
    before = hashes()
    text = (library / file).read_text(encoding="utf-8")
    assert old in text
    (library / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    fresh(monkeypatch)
    return {name for name, value in hashes().items() if value != before[name]}


def test_comments_and_docstrings_rerun_nothing(library, monkeypatch):
    for file, old, new in (("kernel", '"""Step 1 of KDP', '"""Words, step 1 of KDP'),
                           ("hidden", "HALF_MAX = 65504.0", "# words\nHALF_MAX = 65504.0")):
        assert changed_by(library, monkeypatch, f"kdp_core/{file}.py", old, new) == set()


def test_an_edit_reruns_the_stages_that_import_the_module(library, monkeypatch):
    assert changed_by(library, monkeypatch, "kdp_core/linear.py", "1e-12", "1e-13") == {"fit"}
    assert changed_by(library, monkeypatch, "kdp_core/inverse.py", "1e-12", "1e-13") == {"inverse", "fold kdp"}
    assert changed_by(library, monkeypatch, "kdp_core/kernel.py", "1e-3", "2e-3") == {"kernel", "inverse", "fold kdp"}
    assert changed_by(library, monkeypatch, "kdp_core/blocks.py", "0.5", "0.6") == {"blocks", "fold remove", "fold kdp"}
    assert changed_by(library, monkeypatch, "kdp_core/figures.py", "#0072B2", "#0072B3") == {"figure"}


def test_a_new_row_of_the_table_reruns_no_other(library, monkeypatch):
    row = '    "mine": Method("", blocks.most_similar, {}, None, _no_params),\n}'
    assert changed_by(library, monkeypatch, "kdp_core/methods/__init__.py", "\n}\n", f"\n{row}\n") == set()


def test_the_schema_file_is_what_the_library_says():
    sys.path.insert(0, str(ROOT / "workflow_scripts"))
    import schema

    assert json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8")) == schema.build(), \
        "run `python workflow_scripts/schema.py`"


CONFIGS = sorted([ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path):
    base = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    from snakemake.utils import update_config

    update_config(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    plumbing.check(base)


def test_a_row_overrides_its_base_key_by_key():
    config = {**CONFIG, "methods": {**CONFIG["methods"], "a": {"base": "kdp", "kernel": {"features": 8}},
                                    "b": {"base": "a", "inverse": {"width": 4}}}}
    plumbing.check(config)
    assert plumbing.base_of(config, "b") == "kdp" and plumbing.steps(config, "b") == ["kernel", "inverse"]
    assert plumbing.options(config, "b") == {"kernel": {"features": 8, "epochs": 2, "batch_sequences": 20},
                                             "inverse": {"width": 4, "epochs": 2}}


def test_only_rows_that_train_have_curves_to_draw():
    rows = {"still": {"base": "kdp", "kernel": {"epochs": 0}}}
    config = {**CONFIG, "methods": CONFIG["methods"] | rows,
              "grid": CONFIG["grid"] | {"methods": ["linear", "kdp", "still"]}}
    assert plumbing.learned(config) == ["kdp"]
    assert not any("still" in entry["name"] for entry in plumbing.figure_entries(config))


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
