"""The schema of the configuration: built once for each state of the library, and kept."""
import subprocess
import sys
import time

import pytest
from planning import schema

from tests.workflow.project import ROOT


def test_the_schema_is_built_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "FOLDER", tmp_path / "cache")
    built = []
    monkeypatch.setattr(schema, "_build", lambda file: (built.append(file), file.write_text("{}")))
    first = schema.schema_file()
    assert schema.schema_file() == first and len(built) == 1 and first.read_text() == "{}"
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [first.name], "no temporary file is left"
    # a process that builds at the same time writes a file of its own
    assert built[0].name != first.name


def test_a_changed_source_is_another_schema_and_old_ones_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "FOLDER", tmp_path)
    monkeypatch.setattr(schema, "_build", lambda file: file.write_text("{}"))
    for number in range(schema.KEPT + 2):
        monkeypatch.setattr(schema, "sources", lambda number=number: f"hash{number}")
        schema.schema_file()
        time.sleep(0.01)
    assert {file.stem for file in tmp_path.iterdir()} == {f"hash{number}" for number in range(2, schema.KEPT + 2)}


def test_the_hash_covers_the_library_but_not_what_no_option_comes_from(tmp_path, monkeypatch):
    for name in ("kdp_core/methods/mine.py", "kdp_core/results/page.py", "workflow_scripts/planning/sections.py",
                 "workflow_scripts/planning/signatures.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("A = 1\n")
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    seen = [schema.sources()]
    for name in ("kdp_core/results/page.py", "kdp_core/methods/mine.py", "workflow_scripts/planning/sections.py"):
        (tmp_path / name).write_text("A = 2\n")
        seen.append(schema.sources())
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_a_schema_that_cannot_be_built_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "FOLDER", tmp_path)
    monkeypatch.setattr(schema, "ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(schema, "sources", lambda: "hash")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(schema.SchemaError, match=r"planning/schema\.py` with a Python that has the packages"):
        schema.schema_file()
    assert not list(tmp_path.glob("*"))


def test_planning_imports_neither_torch_nor_methods():
    said = ("import planning.code, planning.config, planning.figures, sys; "
            "print({'torch', 'transformers', 'kdp_core.methods'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT / "workflow_scripts", text=True, capture_output=True,
                          check=True)
    assert done.stdout.strip() == "set()"
