"""Versions, the state of the code, hashes, and sources without the paths of a user."""
import hashlib
import subprocess

import pytest
import torch

from kdp_core.base.provenance import git_state, hashes, here, without_place, without_places


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.example", *words], check=True,
                   capture_output=True)


def test_the_state_of_the_code_is_its_commit_and_whether_it_was_changed(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["changed"] is False
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_state(tmp_path) == {**clean, "changed": True}


def test_versions_are_those_of_the_process():
    assert here()["versions"]["torch"] == torch.__version__.split("+")[0] or \
        here()["versions"]["torch"] == torch.__version__


def test_inputs_are_hashed_by_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hashes({"x": tmp_path / "a"}) == {"x": hashlib.sha256(b"abc").hexdigest()}


@pytest.mark.parametrize("source, shown", [
    ("hf:org/name@main", "hf:org/name@main"), ("pypi:a==1/b/c.gguf", "pypi:a==1/b/c.gguf"), ("models/a", "models/a"),
    ("/home/someone/m.gguf", "m.gguf"), ("~/m", "m"), ("C:\\Users\\someone\\m", "m"), ("", ""), ("/", ""),
])
def test_a_source_loses_the_place_on_this_machine(source, shown):
    assert without_place(source) == shown
    assert without_places({"a": [{"source": source, "n": 1}]}) == {"a": [{"source": shown, "n": 1}]}
