"""docs/architecture.md: its picture is drawn from the imports, and its four worked examples are executed."""
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from kdp import workflow
from kdp_core.score import evaluate
from tests import forks
from tests.test_structure import ROOT
from tests.workflow.project import Project

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
BEFORE = {"kdp_core/model/families.py": ")\nFAMILIES: dict", "tests/pico.py": '}\n"""What the configuration'}
"""File -> what the snippet that is added to it comes before."""


def snippets():
    """What the page says to create or to add: path -> (whether the file is new, code)."""
    found = re.findall(r"(Create|Add to `\w+` in)\s`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return {path: (word == "Create", code) for word, path, code in found}


@pytest.fixture
def copy(tmp_path):
    """A copy of the code to add to."""
    for name in ("kdp_core", "tests", "workflow_scripts", "rules", "envs", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def add(root, path):
    """Do what the page says about one file."""
    new, code = snippets()[path]
    file = root / path
    assert file.exists() is not new
    if new:
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        return
    text = file.read_text(encoding="utf-8")
    assert text.count(BEFORE[path]) == 1
    file.write_text(text.replace(BEFORE[path], code + BEFORE[path]), encoding="utf-8")


def passed(root, *arguments):
    """How many tests pass in a copy; a failing one fails here."""
    done = subprocess.run([forks.python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments],
                          cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_page_has_the_four_examples():
    assert list(snippets()) == ["kdp_core/methods/alternate.py", "kdp_core/model/families.py", "tests/pico.py",
                                "my_tasks/opposites.yaml", "my_tasks/opposites.jsonl", "kdp_core/figures/bars.py"]


def test_a_method_is_added(copy):
    add(copy, "kdp_core/methods/alternate.py")
    assert passed(copy, "tests/kdp_core/methods/test_battery.py", "-k", "every_second and llama") >= 6


def test_a_family_is_added(copy):
    for path in BEFORE:
        add(copy, path)
    assert passed(copy, "tests/kdp_core/methods/test_battery.py", "-k",
                  "starcoder2 and (linear_prefix or shortgpt or slicegpt) and not fine_tuned") >= 12


def test_a_task_is_added(llama_folder, tmp_path, monkeypatch):
    for path in ("my_tasks/opposites.yaml", "my_tasks/opposites.jsonl"):
        add(tmp_path, path)
    monkeypatch.chdir(tmp_path)
    score, = evaluate.evaluate(llama_folder, tasks=["opposites"], task_folders=["my_tasks"]).scores
    assert (score.task, score.metric, score.items) == ("opposites", "acc", 4)
    assert score.value in (0, 0.25, 0.5, 0.75, 1)
    checked = workflow.merged(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")),
                              yaml.safe_load(re.search(r"```yaml\n(evaluate: .*?)```", PAGE, re.DOTALL)[1]))
    (tmp_path / "mine.yaml").write_text(yaml.dump(checked), encoding="utf-8")
    assert workflow.checked(tmp_path / "mine.yaml")["evaluate"]["task_folders"] == ["my_tasks"]


def test_a_figure_is_added(copy, tmp_path_factory):
    add(copy, "kdp_core/figures/bars.py")
    project = Project(tmp_path_factory.mktemp("pico")).make()
    command = project.command("--dry-run", "results/figures/perplexity-bars.png")
    command[command.index(str(ROOT / "Snakefile"))] = str(copy / "Snakefile")
    planned = subprocess.run([forks.python(), *command[1:]], cwd=project.folder, env=project.environment(),
                             capture_output=True, text=True, check=False)
    assert planned.returncode == 0 and "figure_all" in planned.stdout, planned.stdout[-2000:] + planned.stderr[-2000:]
    code = ("import pandas as pd\nfrom kdp_core.figures import figure_of\nfrom kdp_core.figures.style import save\n"
            "summary = pd.DataFrame({'method': ['dense', 'kdp'], 'ratio': [0.0, 0.2], 'k_max': [0, 3], "
            "'ppl_ratio': [1.0, 2.5]})\n"
            "save(figure_of('perplexity-bars').draw(summary), 'bars', dpi=100)\n")
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    assert (copy / "bars.png").stat().st_size > 1000
    assert (copy / "bars.csv").read_text(encoding="utf-8") == "method,ratio,k_max,ppl_ratio\nkdp,0.2,3,2.5\n"


def test_the_picture_is_drawn_from_the_imports(tmp_path):
    """The words of the picture and the places of its dots; fonts may differ between machines."""
    code = "import sys, pathlib, draw_architecture as d; d.main(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "new.svg")], cwd=ROOT / "docs", check=True)
    new, kept = (path.read_text(encoding="utf-8") for path in
                 (tmp_path / "new.svg", ROOT / "docs/images/architecture.svg"))
    for pattern in (r"<use [^>]*>", r"<text[^>]*>[^<]*</text>"):
        assert re.findall(pattern, new) == re.findall(pattern, kept) != [], "run `python docs/draw_architecture.py`"
