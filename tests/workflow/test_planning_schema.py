"""The schema of the configuration."""
import json
import sys

from tests.workflow.project import ROOT


def test_the_schema_file_is_what_the_library_says():
    sys.path.insert(0, str(ROOT / "workflow_scripts"))
    import schema

    assert json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8")) == schema.build(), \
        "run `python workflow_scripts/schema.py`"
