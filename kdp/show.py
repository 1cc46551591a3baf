"""What the commands print: progress of the stages, tables, and the picture of a model's layers."""
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kdp_core.model.families import CHANNELS, HEADS

STAGES = {"calibration": "calibration text", "heldout": "held-out text", "facts": "dense model", "tokens": "tokens",
          "states": "hidden states", "similarity": "similarity of layers", "search": "search", "plan": "selection",
          "composed": "fit", "pruned": "fold", "ppl_dense": "perplexity, dense", "ppl_pruned": "perplexity, pruned",
          "efficiency": "latency"}
"""Stage -> its name on the screen."""
CELLS = 20
"""Number of characters of a full bar. A line of the picture with two such bars fits into 80 columns."""


def label(stage: str) -> str:
    """The name of a stage on the screen.

    For the fit of a block, such as `7-9-fit`, the name on the screen has the step and the layers.
    """
    if stage in STAGES:
        return STAGES[stage]
    start, stop, step = stage.split("-")
    return f"{step} of layers {start} to {int(stop) - 1}"


class Stages(logging.Handler):
    """A progress bar that prints a line for each finished stage. Messages of the library are shown next to the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                            console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=len(STAGES))
        self.stage, self.started = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message of the library next to the stage.

        A warning of the library is also printed on a separate line.
        """
        if record.levelno >= logging.WARNING:
            self.bar.console.print(f"warning: {record.getMessage()}", markup=False)
        self.bar.update(self.task, description=f"{self.stage}: {record.getMessage()}"[:100])

    def begin(self, stage: str) -> None:
        """Show that this stage begins and that the previous stage is finished."""
        self.end()
        self.stage, self.started = label(stage), time.perf_counter()
        self.bar.update(self.task, description=self.stage)

    def found(self, stage: str) -> None:
        """Show that the record of this stage is already on disk."""
        self.end()
        self.bar.console.print(f"[dim]{label(stage)}: done before[/dim]")
        self.bar.advance(self.task)

    def end(self) -> None:
        """Show that the current stage is finished."""
        if self.stage:
            self.bar.console.print(f"{self.stage}: {time.perf_counter() - self.started:.1f} s")
            self.bar.advance(self.task)
        self.stage = ""


@contextmanager
def stages(console: Console) -> Iterator[Stages]:
    """Show the progress of the stages that run inside the `with` block."""
    shown, library = Stages(console), logging.getLogger("kdp_core")
    library.addHandler(shown)
    library.setLevel(logging.INFO)
    library.propagate = False
    try:
        with shown.bar:
            yield shown
            shown.end()
    finally:
        library.removeHandler(shown)
        library.propagate = True


def plain_table(*heads: str) -> Table:
    """A table without frames whose first column is a name."""
    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right", overflow="fold")
    return table


def summary(found: Mapping[str, Any]) -> Table:
    """A table that compares the dense and the pruned model."""
    pruned, costs = found["pruned"], found["efficiency"]
    dense, after = found["ppl_dense"], found["ppl_pruned"]
    table = plain_table("", "dense", "pruned")
    table.add_row("parameters", f"{pruned['params_before']:,}", f"{pruned['params_after']:,}")
    table.add_row("layers", str(pruned["layers_before"]), str(pruned["layers_before"] - pruned["layers_removed"]))
    table.add_row("perplexity, held out", spread(dense), spread(after))
    for name, words in (("prefill", f"prompt of {costs['tokens']} tokens, ms"), ("decode", "next token, ms")):
        table.add_row(words, f"{costs[f'{name}_dense_ms']:.1f}", f"{costs[f'{name}_ms']:.1f}")
    return table


def sentences(found: Mapping[str, Any], out: Path) -> str:
    """Sentences for the user: what was removed, the change of the perplexity, and the speed-up."""
    pruned, costs = found["pruned"], found["efficiency"]
    return (f"\n{found['settings']['method']} removed {pruned['params_removed']:.1%} of the parameters: "
            f"{words_of(pruned)}.\nPerplexity on held-out text is {ratio(found['ppl_pruned'], found['ppl_dense'])} "
            f"times the dense model's. A prompt is processed {costs['speedup_prefill']:.2f} times as fast, and "
            f"a token is generated {costs['speedup_decode']:.2f} times as fast.\nThe pruned model is in {out}.")


def ratio(after: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """The perplexity `after` divided by the perplexity `dense`.

    `infinitely many` if the pruned model has collapsed; its perplexity is then null in the record.
    """
    return "infinitely many" if after["ppl"] is None else f"{after['ppl'] / dense['ppl']:.2f}"


def spread(scored: Mapping[str, Any]) -> str:
    """A perplexity with its standard error."""
    if scored["ppl"] is None:
        return "infinite"
    return f"{scored['ppl']:.2f}" + ("" if scored["stderr"] is None else f" ± {scored['stderr']:.2f}")


def words_of(pruned: Mapping[str, Any]) -> str:
    """The removed layers, parts and weights as a text for the user."""
    runs = ", ".join(f"{start}" if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in pruned["blocks"])
    parts = ", ".join(f"{part} of layer {layer}" for layer, part in pruned["parts"])
    zeroed = f"{pruned['params_zeroed']:,} weights set to zero" if pruned["params_zeroed"] else ""
    layers = f"{pruned['layers_removed']} layers ({runs})" if pruned["layers_removed"] else ""
    added = f"{pruned['params_added']:,} parameters added" if pruned["params_added"] else ""
    return "; ".join(filter(None, (layers, parts, zeroed, added))) or "heads, channels or widths inside the layers"


def layers(config: Mapping[str, Any], pruned: Mapping[str, Any] | None) -> Table:
    """The picture of the layers: one line for each layer of the dense model. Without a record of the pruning, only the
    layers of the checkpoint are drawn.

    config: `layers`, HEADS and CHANNELS of the checkpoint, its `stand_ins`, `widths` and `dropped_parts`.
    """
    blocks = [tuple(block) for block in pruned["blocks"]] if pruned else []
    removed = {layer for start, stop in blocks for layer in range(start, stop)}
    total = config["layers"] + len(removed)
    kinds = [entry["kind"] for entry in config["stand_ins"]]
    stands = dict(zip((start for start, _ in sorted(blocks)), kinds, strict=False)) if pruned else {}
    table, kept = plain_table("layer", "heads", "channels", ""), 0
    for column in table.columns:
        column.justify = "left"
    for layer in range(total):
        if layer in removed:
            table.add_row(str(layer), "", "", f"stand-in: {stands[layer]}" if layer in stands else "removed",
                          style="magenta" if layer in stands else "dim")
        else:
            table.add_row(str(layer), *_kept(config, kept))
            kept += 1
    for entry in [] if pruned else config["stand_ins"]:
        where = "after" if entry["after"] else "before"
        table.add_row("", "", "", f"stand-in {where} layer {entry['layer']}: {entry['kind']}", style="magenta")
    return table


def _kept(config: Mapping[str, Any], place: int) -> list[str]:
    """The columns of one layer of the checkpoint: bars for its heads and channels, and the names of removed parts."""
    sizes = config["widths"][place] if config["widths"] else {}
    cells, lacks = [], [part for part, numbers in config["dropped_parts"].items() if place in numbers]
    for part, kind in (("attention", HEADS), ("mlp", CHANNELS)):
        own = 0 if part in lacks else sizes.get(kind, config[kind])
        cells.append(f"{bar(own, config[kind])} {own}")
    return [*cells, ", ".join(f"{part} removed" for part in lacks)]


def bar(value: int, full: int) -> str:
    """A bar of CELLS characters."""
    filled = round(CELLS * value / full) if full else 0
    return "█" * filled + "·" * (CELLS - filled)
