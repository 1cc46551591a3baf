"""Rule `cards` writes a model card for every checkpoint, and completes the checkpoint's provenance.

The card and the provenance are written next to the checkpoint. The card and the provenance are also written into the
checkpoint, so that they stay with every copy of the checkpoint.
"""
import json
from pathlib import Path

import yaml
from gather import folder
from job import job

from kdp_core.base import provenance, store
from kdp_core.results import card


def again(config: dict, checkpoint: Path) -> str:
    """The configuration and the command that make a checkpoint again."""
    page = yaml.safe_dump(provenance.without_places(config), sort_keys=False, allow_unicode=True)
    return (f"Save this configuration as `again.yaml` in a checkout of kdp:\n\n```yaml\n{page}```\n\nThen run\n\n"
            f"    snakemake --configfile again.yaml {checkpoint}\n\nOf a local path, only the last part is shown "
            "here.")


def write_card(own: dict) -> None:
    """Write the card and the provenance of one point next to its checkpoint, and also into the checkpoint."""
    point = own["point"]
    at, base = folder(point), Path("results", point["model"])
    begun = store.read_json(at / "checkpoint" / provenance.MADE)
    tokens = store.read(base / point["calib"] / "tokens.safetensors").provenance["sha256"]
    about = begun | {"point": point, "config": provenance.without_places(own["config"]), "seeds": own["seeds"],
                     "tokens_sha256": tokens}
    shown = {name: about[name] for name in ("versions", "git", "seeds")} | {"inputs": {"calibration tokens": tokens}}
    stock = "auto_map" not in json.loads((at / "checkpoint/config.json").read_text(encoding="utf-8"))
    made = card.Made(own["method"], point["method"], float(point["ratio"]), again(own["config"], at / "checkpoint"),
                     shown, stock)
    text = card.card(store.read(base / "facts.json"), store.read(at / "pruned.json"), made, card.Measured(
        store.read(base / "scores.json"), store.read(at / "scores.json"), store.read(at / "efficiency.json")))
    for path in (at / "card.md", at / "checkpoint" / provenance.CARD):
        store.write_text(path, text)
    for path in (at / "provenance.json", at / "checkpoint" / provenance.MADE):
        store.write_json(path, about)


if __name__ == "__main__":
    with job(snakemake):
        for one in snakemake.params.points:
            write_card(one)
