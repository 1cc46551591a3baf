"""The JSON schema of the configuration, from which planning also learns what the methods are."""
import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def schema() -> dict[str, Any]:
    """The schema: of the whole configuration, of each method's options (`methods`), and of fine-tuning (`finetune`)."""
    return json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8"))
