"""The grid: its points, the folders of their results, calibration seeds, and the points that ablations add.

A point is a dict of five texts, the values of the wildcards: model, calibration set, variant (`method`), ratio and K
max. A point of a fine-tuned variant also has `source`, the variant from which the fine-tuning starts. If the method has
a search, the point also has `search`, the variant under whose name the search is stored.
"""
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planning import variants
from planning.schema import schema

KEYS = ("model", "calib", "method", "ratio", "k_max")
"""The wildcards that name a point."""
POINT = "results/{model}/{calib}/{method}/r{ratio}-k{k_max}"
"""The folder of a point's results."""
POINT_NAME = "{model}-{calib}-{method}-r{ratio}-k{k_max}"
"""The name of a point in the names of log and benchmark files."""
BLOCK = "results/{model}/{calib}/{method}/blocks/{start}-{stop}"
"""The folder for the fits of a variant on one block; all points with this block share the folder."""
SEARCH = "results/{model}/{calib}/{method}/search-k{k_max}.json"
"""The file of a variant's search; all ratios share this file."""


def folder(point: dict[str, Any]) -> str:
    """The folder of a point's results."""
    return POINT.format(**point)


def source_point(point: dict[str, Any]) -> dict[str, Any]:
    """The point whose blocks, fits and search `point` uses.

    For a fine-tuned point, this is the point from which the fine-tuning started. For any other point, this is `point`
    itself.
    """
    return {key: point[key] for key in KEYS} | {"method": point.get("source", point["method"])}


def fitted_files(point: dict[str, Any], fits: list[str]) -> list[str]:
    """The files of the fitted records from which a point is folded, in the order of its blocks.

    If the variant has steps, the blocks are read from plan.json, so plan.json must exist.
    """
    point = source_point(point)
    if fits == ["compose"]:
        return [f"{folder(point)}/composed.safetensors"]
    fields = json.loads(Path(folder(point), "plan.json").read_text(encoding="utf-8"))["fields"]
    return [f"{BLOCK.format(**point, start=start, stop=stop)}/{step}.safetensors"
            for start, stop in fields["blocks"] for step in fits]


def search_file(point: dict[str, Any]) -> str | None:
    """The file of the search from which a point's layers were selected; None for a point without a search."""
    return SEARCH.format(**point | {"method": point["search"]}) if "search" in point else None


def points(config: dict[str, Any]) -> list[dict[str, str]]:
    """All points that are pruned and measured: first the points of the grid, then the points that ablations add."""
    made = [*grid_points(config), *(point for name in config.get("ablations", {})
                                    for point in ablation_points(config, name))]
    return list({tuple(point.values()): point for point in made}.values())


def grid_points(config: dict[str, Any]) -> list[dict[str, str]]:
    """The grid's own points, in the order of the configuration."""
    return _product(config, config["grid"], config["grid"]["methods"])


def ablation_points(config: dict[str, Any], name: str) -> list[dict[str, str]]:
    """The points of an ablation: all combinations of its variants, models, calibration sets, ratios and K max.

    If the ablation has no list of models, calibration sets, ratios or K max, the grid's list is used.
    """
    return _product(config, config["grid"] | config["ablations"][name], config["ablations"][name]["variants"])


def _product(config: dict[str, Any], grid: dict[str, Any], names: list[str]) -> list[dict[str, str]]:
    more = {}
    for name in names:
        source = variants.source_of(config, name)
        search = variants.search_of(config, source)
        more[name] = ({"source": source} if source != name else {}) | ({"search": search} if search else {})
    made = [dict(model=model, calib=calib, method=name, ratio=f"{ratio:g}", k_max=str(k_max), **more[name])
            for model, calib, name, ratio, k_max in itertools.product(
                grid["models"], grid["calibrations"], names, grid["ratios"], grid["k_max"])]
    left_out = {tuple(one["point"].values()) for one in config.get("refused", [])}
    return [point for point in made if tuple(point[key] for key in KEYS) not in left_out]


def chosen_points(config: dict[str, Any], section: str) -> list[dict[str, str]]:
    """The grid's points of the variants that a section of the configuration names; all points if it names none."""
    chosen = config.get(section, {}).get("variants", config["grid"]["methods"])
    return [point for point in grid_points(config) if point["method"] in chosen]


def compared(config: dict[str, Any]) -> list[str]:
    """The variants whose searches `agreement` compares.

    `agreement` compares the variants in `agreement.variants`, or all variants of the grid that search under an
    objective.
    """
    named = config.get("agreement", {}).get("variants")
    return named or [name for name in config["grid"]["methods"] if variants.searches(config, name)]


def answering(config: dict[str, Any]) -> list[dict[str, str]]:
    """The points whose models answer prompts.

    These points have the ratio `answers.ratio`; its default is the largest ratio of the grid.
    """
    if "answers" not in config:
        return []
    ratio = config["answers"].get("ratio", max(config["grid"]["ratios"]))
    return [point for point in chosen_points(config, "figures") if point["ratio"] == f"{ratio:g}"]


def answering_names(points: list[dict[str, str]]) -> list[str]:
    """The names of the models in a record of answers: `dense`, and a name for each point."""
    several = len({point["k_max"] for point in points}) > 1
    return ["dense", *(point["method"] + (f", K max {point['k_max']}" if several else "") for point in points)]


def points_like(points: list[dict[str, str]], wildcards: dict[str, str]) -> list[dict[str, str]]:
    """The points that have the values of these wildcards."""
    return [point for point in points if all(point.get(key, value) == value for key, value in wildcards.items())]


def variants_and_k_max(points: list[dict[str, str]]) -> list[list[Any]]:
    """The variant and K max of each point; figures identify a point by this pair."""
    return [[point["method"], int(point["k_max"])] for point in points]


def by_layer(files: Iterable[str]) -> list[str]:
    """The files, sorted by block: by its first layer, then by its end. The folder of a file has the name of the
    block."""
    return sorted(files, key=lambda file: [int(layer) for layer in Path(file).parent.name.split("-")])


def run_variants(config: dict[str, Any]) -> list[str]:
    """The variants that are run; the variants of the grid come first."""
    return list(dict.fromkeys(point["method"] for point in points(config)))


def calibrated(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Every model and calibration set of the grid."""
    return list(itertools.product(config["grid"]["models"], config["grid"]["calibrations"]))


def labels(calibrated: list[tuple[str, str]]) -> list[str]:
    """Names of models in figures; a name includes the calibration set if there are several sets."""
    several = len({calib for _, calib in calibrated}) > 1
    return [f"{model}, {calib}" if several else model for model, calib in calibrated]


def calibration_sizes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Sequences and tokens of each calibration set."""
    return {name: (sum(own["mix"].values()), own["length"] * sum(own["mix"].values()))
            for name, own in config["calibrations"].items()}


def seed_sets(config: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each calibration set with `seeds`, the names of the sets that are made from it, with their seeds.

    The first set is made with the calibration set's own `seed` and keeps its name.
    """
    return {name: {name: own["seed"], **{f"{name}-s{seed}": seed for seed in own["seeds"] if seed != own["seed"]}}
            for name, own in config["calibrations"].items() if "seeds" in own}


def seed_families(config: dict[str, Any]) -> dict[str, str]:
    """Name of each calibration set that is made for one seed of a list -> name of the set that lists the seeds."""
    return {made: name for name, sets in seed_sets(config).items() if len(sets) > 1 for made in sets}


def with_seeds_apart(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a separate calibration set for every seed.

    In the grid and in ablations, the separate calibration sets replace the set that lists the seeds.
    """
    sets = seed_sets(config)
    calibrations = {made: {key: value for key, value in own.items() if key != "seeds"} | {"seed": seed}
                    for name, own in config["calibrations"].items()
                    for made, seed in sets.get(name, {name: own["seed"]}).items()}

    def apart(part: dict[str, Any]) -> dict[str, Any]:
        if "calibrations" not in part:
            return part
        return part | {"calibrations": [made for name in part["calibrations"] for made in sets.get(name, [name])]}

    studies = {name: apart(own) for name, own in config.get("ablations", {}).items()}
    return config | {"calibrations": calibrations, "grid": apart(config["grid"])} | (
        {"ablations": studies} if studies else {})


def alone(config: dict[str, Any], point: dict[str, str]) -> dict[str, Any]:
    """The part of a configuration that is sufficient to make the checkpoint of one point, if it is merged over
    config.yaml."""
    names, name = [], point["method"]
    while name in config["methods"]:
        names.append(name)
        sized = variants.options(config, name).get("block", {}).get("sized_as")
        names += [sized] if sized and sized not in names else []
        name = (config["methods"][name] or {}).get("base")
    calibration = config["calibrations"][point["calib"]]
    chosen = {"models": [point["model"]], "texts": list(calibration["mix"]), "calibrations": [point["calib"]],
              "methods": list(dict.fromkeys(names))}
    made = {section: {one: config[section][one] for one in keys} for section, keys in chosen.items()}
    made["grid"] = {"models": [point["model"]], "calibrations": [point["calib"]], "methods": [point["method"]],
                    "ratios": [float(point["ratio"])], "k_max": [int(point["k_max"])]}
    return made | {section: config[section] for section in ("hidden", "similarity") if section in config}


def seeds(config: dict[str, Any]) -> dict[str, int]:
    """Every seed that the grid uses."""
    return {name: seed for point in points(config) for name, seed in seeds_of(config, point).items()}


def seeds_of(config: dict[str, Any], point: dict[str, str]) -> dict[str, int]:
    """Every seed that a point uses."""
    name, calib = point["method"], point["calib"]
    own = schema()["methods"][variants.base_of(config, name)]["properties"] \
        if variants.source_of(config, name) == name else ["finetune"]
    return {f"calibration {calib}": config["calibrations"][calib]["seed"],
            "evaluation": config["evaluate"].get("seed", 0),
            **{f"{name}, {part}": variants.options(config, name).get(part, {}).get("seed", 0) for part in own
               if part != "block"}}


def ablation(config: dict[str, Any], name: str) -> dict[str, Any]:
    """One ablation of the configuration, as a dict with the fields of `kdp_core.results.ablations.Ablation`."""
    own = config["ablations"][name]
    varied = {variant: variants.options(config, variant) for variant in own["variants"]}
    tokens = {calib: size[1] for calib, size in calibration_sizes(config).items()}
    return {"name": f"ablation-{name}", "title": own["title"], "x": own["x"],
            "metrics": own.get("metrics", ["ppl", "acc"]), "points": ablation_points(config, name), "tokens": tokens,
            "settings": {variant: {option: varied[variant][part][key] for option in own["x"] if "." in option
                                   for part, key in [option.split(".")]} for variant in own["variants"]}}


def paper_ablations(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of a table of the KDP paper -> the ablation with the same comparison, as `ablation` returns it."""
    return {own["paper"]: ablation(config, name) for name, own in config.get("ablations", {}).items() if "paper" in own}
