"""Reads the facts about a checkpoint: the record of its pruning, its provenance, and the sizes of its layers."""
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from kdp import show
from kdp_core.base import provenance, store
from kdp_core.model import checkpoints, families
from kdp_core.model.sizes import count_params

KEPT = ".kdp"


def pruned(folder: Path) -> dict[str, Any] | None:
    """The record of the pruning by `kdp prune` or by the workflow; None for a checkpoint without a record."""
    # the workflow writes the record next to the folder `checkpoint`; a copied checkpoint has it in its own file
    places = [folder / KEPT / "pruned.json"] + [folder.parent / "pruned.json"] * (folder.name == "checkpoint")
    found = next((place for place in places if place.is_file()), None)
    return carried(folder).get("pruned") if found is None else store.read(found)._asdict()


def carried(folder: Path) -> dict[str, Any]:
    """The provenance that is stored in the checkpoint itself; an empty dict if the checkpoint has no provenance."""
    file = folder / provenance.MADE
    return store.read_json(file) if file.is_file() else {}


def facts(folder: Path) -> Table:
    """A table of method, parameters and provenance; facts that are not on disk are left out."""
    table = show.plain_table("", "")
    table.show_header, table.columns[1].justify = False, "left"
    if (done := pruned(folder)) is None:
        size = count_params(checkpoints.on_meta(checkpoints.config_of(folder)))
        table.add_row("parameters", f"{size:,}")
        table.add_row("method", "unknown: the folder has no record of a pruning")
    else:
        table.add_row("method", done["method"])
        table.add_row("parameters", f"{done['params_before']:,} before, {done['params_after']:,} after "
                                    f"({done['params_removed']:.1%} removed)")
        table.add_row("removed", show.words_of(done))
    summary = folder / KEPT / "summary.json"
    known = _provenance(store.read_json(summary)) if summary.is_file() else _of_workflow(carried(folder))
    for name, value in known.items():
        table.add_row(name, value)
    return table


def _provenance(summary: dict[str, Any]) -> dict[str, str]:
    """The sources and settings of a pruning, and the perplexities of the dense and the pruned model."""
    own = summary["settings"]
    settings = ", ".join(f"{name} {own[name]}" for name in ("ratio", "k_max", "sequences", "length", "seed", "dtype"))
    options = ", ".join(f"{part}.{key}={value}" for part, one in own["options"].items() for key, value in one.items())
    return {"model": own["model"], "model, sha256": summary["facts"]["sha256"], "calibration": own["calibration"],
            "tokens, sha256": summary["tokens_sha256"],
            # a pruning by an earlier version has no provenance
            "held-out windows, sha256": summary.get("heldout_sha256", ""),
            "settings": settings, "options": options or "defaults",
            "perplexity": f"{show.spread(summary['ppl_dense'])} dense, {show.spread(summary['ppl_pruned'])} pruned, on "
                          f"{own['heldout']}",
            **_code(summary)}


def _of_workflow(made: dict[str, Any]) -> dict[str, str]:
    """The facts about a checkpoint that was copied or that the workflow made, from the provenance in the checkpoint."""
    point, config = made.get("point", {}), made.get("config", {})
    model = config.get("models", {}).get(point.get("model"), {})
    known = {"model": model.get("source", ""), "point": ", ".join(f"{name} {value}" for name, value in point.items()),
             "settings": json.dumps(made["settings"]) if "settings" in made else "",
             "options": json.dumps(config.get("methods", {})) if config else "",
             "tokens, sha256": made.get("tokens_sha256", ""),
             "inputs, sha256": "\n".join(f"{digest} {name}" for name, digest in made.get("inputs", {}).items()),
             "seeds": ", ".join(f"{name} {seed}" for name, seed in made.get("seeds", {}).items())}
    return {name: value for name, value in known.items() if value} | _code(made)


def _code(made: dict[str, Any]) -> dict[str, str]:
    """The versions of packages and the commit of the code, if the provenance has them."""
    versions, git = made.get("versions"), made.get("git")
    known = {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())} if versions else {}
    return known | ({"code": f"commit {git['commit']}" + (" with changes" if git["changed"] else "")} if git else {})


def shape(folder: Path) -> dict[str, Any]:
    """The sizes of a checkpoint's layers, as the argument `config` of `show.layers`."""
    config = checkpoints.config_of(folder)
    channels = families.family_of(config).names.get("intermediate_size", "intermediate_size")
    return {"layers": config.num_hidden_layers, families.HEADS: config.num_attention_heads,
            # GPT-2's configuration leaves out the width of the MLP if it is four times the width of the states
            families.CHANNELS: getattr(config, channels) or 4 * config.hidden_size,
            "stand_ins": getattr(config, "stand_ins", []), "widths": getattr(config, "widths", []),
            "dropped_parts": getattr(config, "dropped_parts", {})}
