"""The package as others meet it: the wheel in a place of its own, pinned versions, licence and citation."""
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from kdp_core.methods import METHODS
from tests import pico
from tests.test_structure import ROOT, git_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENTS = ("cpu", "gpu")
COMMAND_LINE = {"rich", "typer"}
"""What only the command line needs; jobs of the workflow do not run it."""
BLOCKED = ("snakemake", "pytest", "workflow_scripts", "planning")
"""What is not there outside a checkout."""


def plain(name):
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    """The packages of a list of requirements, without versions and extras."""
    return {plain(re.match(r"[\w.-]+", one)[0]) for one in requirements}


def pins(lines):
    """Package -> version of lines such as `lm_eval[hf]==0.4.13`."""
    found = [re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==(\S+)", line) for line in lines]
    return {plain(one[1]): one[2] for one in found}


def constraints():
    return pins((ROOT / "constraints.txt").read_text(encoding="utf-8").split())


def environment(name):
    """The pip packages of a conda environment."""
    made = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text(encoding="utf-8"))
    return pins(next(one["pip"] for one in made["dependencies"] if isinstance(one, dict)))


# Versions -------------------------------------------------------------------------------------------------------------

def test_every_dependency_is_pinned():
    extras = PROJECT["optional-dependencies"]
    wanted = names([*PROJECT["dependencies"], *(one for extra in extras.values() for one in extra)])
    # setuptools comes with torch, which says which one it takes
    assert wanted - {"kdp", "setuptools"} - set(constraints()) == set()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_conda_environment_has_the_pinned_versions_of_all_that_jobs_need(name):
    found, pinned = environment(name), constraints()
    assert found == {package: pinned[package] for package in found}
    assert names(PROJECT["dependencies"]) - COMMAND_LINE - set(found) == set()
    # the last job of a run tests the results with pytest, on a CPU
    assert "pytest" in environment("cpu")


def test_one_version_and_one_licence_are_told_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert {PROJECT["version"], cited["version"], newest} == {PROJECT["version"]}
    assert PROJECT["license"] == cited["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


def test_the_catalog_of_workflows_is_told_of_conda_and_the_report():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text(encoding="utf-8"))["usage"]
    assert usage["software-stack-deployment"]["conda"] is usage["report"] is True


def test_links_of_the_contribution_guide_lead_somewhere():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\(([\w./]+)#?([\w-]*)\)", text):
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, path


# The wheel ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the tracked files, unpacked into an empty folder."""
    source, made, place = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "place"))
    if not (tracked := git_files()):
        pytest.skip("not in a git checkout")
    for name in tracked:
        if name.startswith(("kdp/", "kdp_core/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(made)], cwd=source, check=True, capture_output=True)
    file, = made.iterdir()
    zipfile.ZipFile(file).extractall(place)
    return place


def alone(wheel, *arguments, cwd):
    """`kdp` from the wheel alone, in a folder that is no checkout and without the packages of the workflow."""
    code = (f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
            f"import kdp, kdp_core\n"
            f"assert kdp.__file__.startswith({str(wheel)!r}) and kdp_core.__file__.startswith({str(wheel)!r})\n"
            "from kdp.app import app\napp(prog_name='kdp')")
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(wheel)}, check=False)


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    inside = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    tracked = {name for name in git_files() if name.startswith(("kdp/", "kdp_core/"))}
    assert {"kdp/py.typed", "kdp_core/py.typed"} <= tracked <= inside
    assert {Path(name).parts[0] for name in inside} == {"kdp", "kdp_core", f"kdp-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    # what pip makes the command `kdp` from
    made = (wheel / f"kdp-{PROJECT['version']}.dist-info/entry_points.txt").read_text(encoding="utf-8")
    assert made.split() == ["[console_scripts]", "kdp", "=", "kdp.app:app"]


def test_the_wheel_asks_for_the_workflow_only_as_an_extra(wheel):
    metadata = (wheel / f"kdp-{PROJECT['version']}.dist-info" / "METADATA").read_text(encoding="utf-8")
    lines = re.findall(r"^Requires-Dist: (?:snakemake|pytest|mypy|mkdocs).*$", metadata, re.MULTILINE)
    assert len(lines) >= 6 and all("extra ==" in line for line in lines)


def test_the_wheel_lists_the_methods_without_snakemake(wheel, tmp_path):
    done = alone(wheel, "methods", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in METHODS)


def test_the_wheel_prunes_a_model_that_answers(wheel, llama_folder, tmp_path):
    for name, seed in (("news", 0), ("other", 1)):
        lines = [json.dumps({"text": document}) for document in pico.documents(60, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done = alone(wheel, "prune", llama_folder, "--calibration", "news.jsonl", "--heldout", "other.jsonl", "--out",
                 "small", "--method", "remove", "--ratio", "0.2", "--sequences", "40", "--length", "24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = alone(wheel, "generate", "small", "the council", "--tokens", "3", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_plan_says_in_one_line_that_it_needs_a_checkout(wheel, tmp_path):
    (tmp_path / "mine.yaml").write_text("grid: {ratios: [0.2]}\n", encoding="utf-8")
    done = alone(wheel, "plan", "mine.yaml", cwd=tmp_path)
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("kdp: the workflow is not here"), done.stderr


def test_the_completion_is_installed_for_the_name_of_the_command(tmp_path):
    code = "from kdp.app import app; app(['--install-completion', 'bash'], prog_name='kdp')"
    asked = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | asked, capture_output=True, check=True)
    made, = (tmp_path / ".bash_completions").iterdir()
    assert made.name == "kdp.sh" and "_KDP_COMPLETE" in made.read_text(encoding="utf-8")
    assert str(made) in (tmp_path / ".bashrc").read_text(encoding="utf-8")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_commands(shell):
    asked = {"_KDP_COMPLETE": f"complete_{shell}", "COMP_WORDS": "kdp pr", "COMP_CWORD": "1",
             "_TYPER_COMPLETE_ARGS": "kdp pr", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
             "_TYPER_COMPLETE_WORD_TO_COMPLETE": "pr"}
    done = subprocess.run([sys.executable, "-m", "kdp"], cwd=ROOT, env=os.environ | asked, capture_output=True,
                          text=True, check=True)
    assert "prune" in done.stdout and "generate" not in done.stdout
