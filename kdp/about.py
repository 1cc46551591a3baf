"""Writes the two files that describe a checkpoint of `kdp prune`: the model card, and the file with the provenance."""
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdp_core.base import provenance, store
from kdp_core.base.measurements import Efficiency, Score, Scores
from kdp_core.base.records import ModelFacts, PrunedFacts
from kdp_core.results import card

PLAIN = ("ratio", "calibration", "heldout", "method", "k_max", "sequences", "length", "seed", "dtype")
"""The settings that `kdp prune` has as options with the same names."""


def write(out: Path, found: Mapping[str, Any], facts: ModelFacts, pruned: PrunedFacts) -> None:
    """Write the model card and the provenance into the checkpoint. `found` is the summary that `kdp prune` stored."""
    own = found["settings"]
    shown = {"versions": found["versions"], "git": found["git"], "seeds": {"calibration": own["seed"]},
             "inputs": {"calibration tokens": found["tokens_sha256"], "held-out windows": found["heldout_sha256"]}}
    stock = "auto_map" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
    made = card.Made(own["method"], own["method"], own["ratio"], again(own), shown, stock)
    measured = card.Measured(scores(found["ppl_dense"]), scores(found["ppl_pruned"]), Efficiency(**found["efficiency"]))
    store.write_text(out / provenance.CARD, card.card(facts, pruned, made, measured))
    store.write_json(out / provenance.MADE, {"settings": own, "source_sha256": facts.sha256, **shown,
                                             "pruned": pruned._asdict()})


def scores(scored: Mapping[str, Any]) -> Scores:
    """Convert a perplexity that `kdp prune` measured into a record `Scores`, which the workflow also uses."""
    return Scores([Score("held-out text", "ppl", scored["ppl"], scored["stderr"], len(scored["nats"]), False, "ppl")],
                  0.0, {})


def again(own: Mapping[str, Any]) -> str:
    """The command that makes the checkpoint again."""
    words = ["kdp", "prune", own["model"], "--out", "DIR"]
    words += [word for name in PLAIN for word in (f"--{name.replace('_', '-')}", str(own[name]))]
    words += [word for part, one in own["options"].items() for key, value in one.items()
              for word in ("--option", f"{part}.{key}={json.dumps(value)}")]
    return f"    {shlex.join(words)}\n\nOf a local path, only the last part is shown here."
