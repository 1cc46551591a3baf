"""Finds the grid points that cannot be made. A run leaves out the points that cannot be made, and lists them; all other
points are made.

Some points are impossible for every calibration text. The library finds such points before the run, from the
configuration and the facts of a model, if they are known (`foreseen`). Other points fail in a job, for example because
a kernel collapses. The failed job writes the reason to FILE in the folder of the point (`record`). Later runs leave out
a point with this file until the library or the configuration of the point changes.
"""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from planning import extents, grid, variants
from planning.messages import ConfigError
from planning.schema import ROOT, sources

FILE = "refused.json"
RULES = ("search", "blocks", "step", "compose", "fold", "finetune")
"""The rules whose jobs make the checkpoint of a point."""
NOT_FOR_GOOD = ("StoreError", "HiddenError", "ModelError", "Stopped")
"""Errors of the library that concern files or an interrupted training. After an error with files or an interruption,
the same job may succeed the next time."""
CACHE = ROOT / ".cache" / "refusals"
KEPT = 64
"""Number of answers that are kept in the cache; the newest answers are kept."""

Point = dict[str, str]


def without_refused(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without variants that have no point left. The key `refused` of the returned configuration lists
    the points that are left out, and the reasons.

    Raises ConfigError if no point is left.
    """
    every = grid.points(config)
    reasons = foreseen(config, every)
    for point in every:
        if reason := _recorded(config, point):
            reasons.setdefault(_name(point), reason)
    refused = [{"point": {key: point[key] for key in grid.KEYS}, "reason": reason} for point in every
               if (reason := reasons.get(_name(point)) or reasons.get(_name(grid.source_point(point))))]
    if not refused:
        return config
    made = config | {"refused": refused}
    if not grid.grid_points(made):
        first = next(iter(named(made).items()))
        raise ConfigError(f"config: no point of the grid can be made; {first[0]}: {first[1]}")
    return _without_empty(made)


def named(config: dict[str, Any]) -> dict[str, str]:
    """For each point that is left out: a description of the point -> the reason."""
    words = "{method} on {model}, {calib}, ratio {ratio}, K max {k_max}"
    return {words.format(**one["point"]): one["reason"] for one in config.get("refused", [])}


def _name(point: Point) -> tuple[str, ...]:
    return tuple(point[key] for key in grid.KEYS)


def _without_empty(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the variants, ratios and K max that have no point left.

    Variants without a point are also removed from the other sections of the configuration.
    """
    left = grid.grid_points(config)
    kept = {key: {point[key] for point in left} for key in grid.KEYS}
    own = config["grid"]
    made = config | {"grid": own | {
        "methods": [name for name in own["methods"] if name in kept["method"]],
        "ratios": [ratio for ratio in own["ratios"] if f"{ratio:g}" in kept["ratio"]],
        "k_max": [k_max for k_max in own["k_max"] if str(k_max) in kept["k_max"]]}}
    gone = set(own["methods"]) - kept["method"]
    for section in ("figures", "spaces", "views"):
        if "variants" in made.get(section, {}):
            made[section] = made[section] | {"variants": [name for name in made[section]["variants"]
                                                          if name not in gone]}
    studies = {name: study | {"variants": [one for one in study["variants"] if any(
        point["method"] == one for point in grid.ablation_points(config, name))]}
        for name, study in config.get("ablations", {}).items()}
    return made | ({"ablations": {name: study for name, study in studies.items() if study["variants"]}}
                   if studies else {})


# Foreseen -------------------------------------------------------------------------------------------------------------

def question(config: dict[str, Any], point: Point) -> dict[str, Any]:
    """The question whether a point can be made: its model, and the arguments that `reach.refusal` needs."""
    name = variants.source_of(config, point["method"])
    sized, calibration = variants.sized_as(config, name), config["calibrations"][point["calib"]]
    tuned = variants.options(config, point["method"])["finetune"] if name != point["method"] else None
    return {"model": point["model"], "source": config["models"][point["model"]]["source"].strip(),
            "method": variants.base_of(config, name),
            "calibration": {"sequences": sum(calibration["mix"].values()), "length": calibration["length"],
                            "states": config.get("hidden", {}).get("layers"),
                            "treatment": config.get("similarity", {}).get("treatment", "mask")},
            "given": {"ratio": float(point["ratio"]), "k_max": int(point["k_max"]), "finetune": tuned,
                      "options": {part: {key: value for key, value in own.items() if key != "sized_as"}
                                  for part, own in variants.options(config, name).items() if part != "finetune"},
                      "sized": sized["method"], "sized_options": sized["options"]}}


def foreseen(config: dict[str, Any], points: list[Point]) -> dict[tuple[str, ...], str]:
    """For each point that cannot be made with any calibration text: the keys of the point -> the reason.

    If a model is not known yet, the result contains none of its points.
    """
    asked = {_name(point): question(config, point) for point in points}
    found = dict(zip(asked, _answers(list(asked.values())), strict=True))
    return {name: reason for name, reason in found.items() if reason}


def _descriptions(model: str, source: str) -> list[Path]:
    """The files from which the size of a model is read."""
    return [Path("results", model, "facts.json"), Path(source).expanduser() / "config.json"]


def _items(given: dict[str, Any]) -> list[Path]:
    """The files that the options of a point name."""
    named = given["options"].get("compose", {}).get("items")
    return [Path(named)] if named else []


def _answers(questions: list[dict[str, Any]]) -> list[str]:
    """The library's answers to the questions, from the cache.

    If the answers are not in the cache, a process computes them in a few seconds.
    """
    digest = hashlib.sha256(json.dumps([questions, sources()], sort_keys=True).encode())
    read = [path for one in questions for path in (*_descriptions(one["model"], one["source"]), *_items(one["given"]))]
    for path in dict.fromkeys(read):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    file = CACHE / f"{digest.hexdigest()[:24]}.json"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}.tmp")
        made.write_text(_asked(questions), encoding="utf-8")
        os.replace(made, file)
        for old in sorted(CACHE.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)
    return json.loads(file.read_text(encoding="utf-8"))


def _asked(questions: list[dict[str, Any]]) -> str:
    paths = [str(ROOT), str(ROOT / "workflow_scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([sys.executable, "-m", "planning.foreseen"], input=json.dumps(questions), text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, check=False)
    # if the library cannot describe a model, the model's own job refuses it with a better message
    return done.stdout.splitlines()[-1] if done.returncode == 0 else json.dumps([""] * len(questions))


# Found by a job -------------------------------------------------------------------------------------------------------

def key(config: dict[str, Any], point: Point) -> str:
    """A hash of everything from which a point is made.

    A point is made from its part of the configuration, the files that this part names, and the library.
    """
    files = _items({"options": variants.options(config, grid.source_point(point)["method"])})
    parts = [grid.alone(config, point), sources(), *[path.read_text(encoding="utf-8", errors="replace")
                                                     for path in files if path.is_file()]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _recorded(config: dict[str, Any], point: Point) -> str:
    file = Path(grid.folder(point), FILE)
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["reason"] if found["key"] == key(config, point) else ""


def record(rule: str, wildcards: dict[str, str], config: dict[str, Any], error: Exception) -> None:
    """Record that the points of a failed job cannot be made, if the job would always fail with the same error."""
    kind = type(error)
    if rule in RULES and kind.__module__.startswith("kdp_core") and kind.__name__ not in NOT_FOR_GOOD:
        for point in _of_job(rule, wildcards, config):
            _write(config, point, f"{kind.__name__}: {error}")


def stop_before_work(wildcards: dict[str, str], config: dict[str, Any]) -> None:
    """Before an expensive job, record the points that cannot be made with any calibration text.

    Raises ConfigError if no point that needs this job can be made, or if the model is too small for a section of the
    configuration.

    This function runs in a job, in which the library is loaded and the facts of the model are known.
    """
    from planning.foreseen import answers

    # the facts of the model may have been unknown when the run began
    extents.check(config)
    points = _of_job("search" if "k_max" in wildcards else "hidden", wildcards, config)
    reasons = answers([question(config, point) for point in points])
    for point, reason in zip(points, reasons, strict=True):
        if reason:
            _write(config, point, reason)
    if points and all(reasons):
        raise ConfigError(f"no point that needs this job can be made; {reasons[0]}")


def _write(config: dict[str, Any], point: Point, reason: str) -> None:
    file = Path(grid.folder(point), FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_suffix(f".{os.getpid()}.tmp")
    made.write_text(json.dumps({"reason": " ".join(reason.split()), "key": key(config, point)}), encoding="utf-8")
    os.replace(made, file)


def _of_job(rule: str, wildcards: dict[str, str], config: dict[str, Any]) -> list[Point]:
    """The points that need the job of this rule with these wildcards."""
    points = [point for point in grid.points(config) if all(point[name] == wildcards[name] for name in (
        "model", "calib", "ratio", "k_max") if name in wildcards)]
    if rule == "hidden":
        return points
    if rule == "search":
        return [point for point in points if point.get("search") == wildcards["method"]]
    points = [point for point in points if wildcards["method"] in (point["method"], point.get("source"))]
    return [point for point in points if _has_block(point, wildcards)] if rule == "step" else points


def _has_block(point: Point, wildcards: dict[str, str]) -> bool:
    plan = Path(grid.folder(grid.source_point(point)), "plan.json")
    return plan.is_file() and [int(wildcards["start"]), int(wildcards["stop"])] in \
        json.loads(plan.read_text(encoding="utf-8"))["fields"]["blocks"]
