"""Checks whether models and calibration sets are large enough for the sections of the configuration.

The config.json of a model's checkpoint gives the numbers of its layers and positions. The config.json may be missing
before the model is fetched. Without config.json the model is not checked here; the first job that runs the model
repeats the check (`refusals.stop_before_work`).
"""
import json
from pathlib import Path
from typing import Any, NamedTuple

from planning import grid, variants
from planning.messages import ConfigError
from planning.schema import schema
from planning.sources import FamilyError, learns_positions, positions_of, shape_of


class Extent(NamedTuple):
    """The sizes of a model."""
    layers: int
    positions: int
    """Largest number of tokens in one input of the model."""
    learned: bool
    """Whether the model has a learned vector for each position; positions after the last vector cannot be used."""


def check(config: dict[str, Any]) -> None:
    """Raise ConfigError for the first section for which a model or a calibration set is too small."""
    extents = {name: extent for name in config["grid"]["models"] if (extent := extent_of(config, name))}
    calibrations = {name: config["calibrations"][name] for _, name in grid.calibrated(config)}
    for name, own in calibrations.items():
        sequences, length = sum(own["mix"].values()), own["length"]
        _check_views(config, name, sequences, length, extents)
        _check_spaces(config, name, length)
        for model, extent in extents.items():
            if extent.learned and length > extent.positions:
                raise ConfigError(f"config: calibrations.{name}.length is {length}, but models.{model} has "
                                  f"{extent.positions} positions; give at most {extent.positions}")
    for model, extent in extents.items():
        _check_runs(config, model, extent)
        asked = config["efficiency"]["tokens"] + config["efficiency"]["decode_steps"] if "efficiency" in config else 0
        if extent.positions and asked > extent.positions:
            raise ConfigError(f"config: efficiency.tokens {config['efficiency']['tokens']} and decode_steps "
                              f"{config['efficiency']['decode_steps']} are more than the {extent.positions} positions "
                              f"of models.{model}; take fewer")


def extent_of(config: dict[str, Any], model: str) -> Extent | None:
    """The sizes of a model, from its converted checkpoint or from its local folder; None if they are not known."""
    source = config["models"][model]["source"].strip()
    facts, described = Path("results", model, "facts.json"), Path(source).expanduser() / "config.json"
    try:
        if facts.is_file():
            made_of = json.loads(facts.read_text(encoding="utf-8"))["fields"]["source"].strip()
            # results of another model that had this name before are ignored
            if made_of in (source, Path(source).name):
                described = Path("results", model, "dense", "config.json")
        entries = json.loads(described.read_text(encoding="utf-8"))
        return Extent(shape_of(entries)[1], positions_of(entries), learns_positions(entries))
    except (OSError, ValueError, KeyError, FamilyError):
        return None


def _stored(config: dict[str, Any], layers: int) -> list[int]:
    """The layers whose states are stored."""
    chosen = config.get("hidden", {}).get("layers")
    return list(range(layers + 1)) if chosen is None else sorted(set(chosen))


def _check_runs(config: dict[str, Any], model: str, extent: Extent) -> None:
    """Check the layers that `views.blocks` and `theory.run` name: the model must have these layers, and the states of
    these layers must be stored."""
    runs = {f"views.blocks names {block!r}": tuple(map(int, block.split("-")))
            for block in config.get("views", {}).get("blocks", [])}
    if "theory" in config:
        runs[f"theory.run is {config['theory']['run']}"] = tuple(config["theory"]["run"])
    stored = _stored(config, extent.layers)
    for words, (start, stop) in runs.items():
        if stop > extent.layers:
            raise ConfigError(f"config: {words}, but models.{model} has layers 0 to {extent.layers - 1}; end at "
                              f"{extent.layers} at most")
        if missing := sorted(set(range(start, stop + 1)) - set(stored)):
            raise ConfigError(f"config: {words}, but state {missing[0]} is not stored; add it to hidden.layers")


def _check_views(config: dict[str, Any], calib: str, sequences: int, length: int, extents: dict[str, Extent]) -> None:
    if "views" not in config:
        return
    positions = config["views"].get("heatmaps", {}).get("positions")
    if positions is not None and (not positions or min(positions) >= length):
        raise ConfigError(f"config: views.heatmaps.positions is {positions}, but sequences of calibrations.{calib} "
                          f"have {length} tokens; give positions below that")
    samples, perplexity = (_option(config, "views", "trajectories", name) for name in ("samples", "perplexity"))
    for model, extent in extents.items():
        states = len(_stored(config, extent.layers))
        if states < 3:
            raise ConfigError(f"config: views draws paths through {states} states of models.{model}, which have no "
                              "bend; store three or more (hidden.layers)")
        if (points := min(samples, sequences) * states) <= 3 * perplexity:
            raise ConfigError(f"config: views.trajectories.perplexity is {perplexity:g}, but calibrations.{calib} and "
                              f"models.{model} give {points} points; give less than a third of them")


def _check_spaces(config: dict[str, Any], calib: str, length: int) -> None:
    if "spaces" not in config:
        return
    # windows are as long as calibration sequences
    if (positions := _option(config, "spaces", "probe", "positions")) >= length:
        raise ConfigError(f"config: spaces.probe.positions is {positions}, but windows have the {length} tokens of "
                          f"calibrations.{calib}, of which the first is left out; give 1 to {length - 1}")
    if (prompt := _option(config, "spaces", "compare", "prompt_tokens")) > length:
        raise ConfigError(f"config: spaces.compare.prompt_tokens is {prompt}, but windows have the {length} tokens of "
                          f"calibrations.{calib}; give 2 to {length}")


def check_theory(config: dict[str, Any]) -> None:
    """Raise ConfigError if the run of layers is empty, a gap is longer than the run, or no sequence remains for a fit
    or for its judgement."""
    own = config["theory"]
    start, stop = own["run"]
    if start >= stop:
        raise ConfigError(f"config: theory.run is {own['run']}, an empty run; give the first layer and the last layer "
                          "plus one")
    gaps = own.get("gaps")
    if gaps is not None and (not gaps or max(gaps) > stop - start):
        raise ConfigError(f"config: theory.gaps is {gaps}, but theory.run {own['run']} has {stop - start} layers; give "
                          f"1 to {stop - start}, or lengthen the run")
    heldout = variants.theory_kernel(config).get("heldout", 0.1)
    for _, calib in grid.calibrated(config):
        sequences = sum(config["calibrations"][calib]["mix"].values())
        if not 0 < round(heldout * sequences) < sequences:
            raise ConfigError(f"config: theory holds out {heldout} of the {sequences} sequences of "
                              f"calibrations.{calib}, which leaves none to fit on or none to judge on; change "
                              "theory.kernel.heldout or add sequences")


def _option(config: dict[str, Any], *keys: str) -> Any:
    """A value of the configuration, or its default in the schema."""
    given, known = config, schema()
    for key in keys:
        given, known = given.get(key, {}), known["properties"][key]
    return known["default"] if given == {} else given
