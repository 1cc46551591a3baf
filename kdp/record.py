"""What is known of a checkpoint: the record of its pruning, its provenance, and the shape of its layers."""
from pathlib import Path
from typing import Any

from rich.table import Table

from kdp import show
from kdp_core.base import store
from kdp_core.model import checkpoints, families
from kdp_core.model.sizes import count_params

KEPT = ".kdp"


def pruned(folder: Path) -> dict[str, Any] | None:
    """The record of the pruning, of `kdp prune` or of the workflow; None for a checkpoint that has none."""
    # the workflow writes it beside the folder `checkpoint`
    places = [folder / KEPT / "pruned.json"] + [folder.parent / "pruned.json"] * (folder.name == "checkpoint")
    found = next((place for place in places if place.is_file()), None)
    return None if found is None else store.read(found)._asdict()


def facts(folder: Path) -> Table:
    """Method, parameters and provenance, as far as they are on disk."""
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
    for name, value in (_provenance(store.read_json(summary)) if summary.is_file() else {}).items():
        table.add_row(name, value)
    return table


def _provenance(summary: dict[str, Any]) -> dict[str, str]:
    """What the pruning was made of, and what it scored."""
    own = summary["settings"]
    settings = ", ".join(f"{name} {own[name]}" for name in ("ratio", "k_max", "sequences", "length", "seed", "dtype"))
    options = ", ".join(f"{part}.{key}={value}" for part, one in own["options"].items() for key, value in one.items())
    return {"model": own["model"], "model, sha256": summary["facts"]["sha256"], "calibration": own["calibration"],
            "tokens, sha256": summary["tokens_sha256"], "settings": settings, "options": options or "defaults",
            "perplexity": f"{show.spread(summary['ppl_dense'])} dense, {show.spread(summary['ppl_pruned'])} pruned, on "
                          f"{own['heldout']}",
            "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items())}


def shape(folder: Path) -> dict[str, Any]:
    """The shape of a checkpoint's layers, as `show.layers` takes it."""
    config = checkpoints.config_of(folder)
    channels = families.family_of(config).names.get("intermediate_size", "intermediate_size")
    return {"layers": config.num_hidden_layers, families.HEADS: config.num_attention_heads,
            # GPT-2 leaves its width out where it is four times that of the states
            families.CHANNELS: getattr(config, channels) or 4 * config.hidden_size,
            "stand_ins": getattr(config, "stand_ins", []), "widths": getattr(config, "widths", []),
            "dropped_parts": getattr(config, "dropped_parts", {})}
