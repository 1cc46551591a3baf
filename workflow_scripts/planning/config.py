"""The check of a configuration before any job: keys, types, values, and the names that refer to each other."""
import itertools
from functools import partial
from pathlib import Path
from typing import Any

from planning import extents, grid, variants
from planning.evaluation import benchmark_files, check_tasks
from planning.messages import ConfigError, refuse, require
from planning.resources import batch_sequences, batches_of, calibration_tokens
from planning.schema import schema
from planning.sources import check_folders, check_forms

RESERVED = ("benchmarks", "figures", "logs", "resume", "tables", "tasks", "texts")
"""Names of result folders that no model may have."""


def check(config: dict[str, Any]) -> dict[str, Any]:
    """The checked configuration, with a variant added for every named method without a variant.

    Raises ConfigError for an unknown key, a wrong type or value, or an undefined name.
    """
    refuse(schema(), config, [])
    config = variants.completed(config)
    _check_searches(config)
    config = variants.with_draws(config)
    for name, variant in config["methods"].items():
        own = {key: value for key, value in (variant or {}).items() if key not in ("base", "finetune")}
        refuse(schema()["methods"][variants.base_of(config, name)], own, ["methods", name])
        _check_finetune(config, name)
    _check_grid(config)
    _check_methods(config)
    _check_theory(config)
    _check_views(config)
    for section in ("figures", "spaces", "generation", "choices"):
        require(f"{section}.variants", config.get(section, {}).get("variants", []),
                dict.fromkeys(config["grid"]["methods"]), "name a variant of grid.methods, or add it there")
    if (ratio := config.get("answers", {}).get("ratio")) not in (None, *config["grid"]["ratios"]):
        raise ConfigError(f"config: answers.ratio is {ratio}, which is no ratio of the grid; choose one of "
                          f"{', '.join(map(str, config['grid']['ratios']))}")
    _check_agreement(config)
    _check_ablations(config)
    _check_similarity(config)
    _check_shards(config)
    _check_devices(config)
    _check_benchmarks(config)
    check_forms(config)
    check_folders(config)
    check_tasks(config)
    extents.check(config)
    return config


def _check_finetune(config: dict[str, Any], name: str) -> None:
    """Check a fine-tuned variant.

    A fine-tuned variant may set only `finetune`, because it has the blocks and fits of its base.
    """
    variant = config["methods"][name] or {}
    base = config["methods"].get(variant.get("base")) or {}
    if "finetune" not in variant:
        if "finetune" in base:
            raise ConfigError(f"config: methods.{name} is based on {variant['base']!r}, which is fine-tuned; give "
                              f"{name} its own `finetune`, or the `base` of {variant['base']!r}")
        return
    if variant.get("base") not in config["methods"]:
        raise ConfigError(f"config: methods.{name}.finetune starts from the checkpoint of a variant; name one of "
                          f"methods as `base` ({variant.get('base')!r} is none)")
    if more := sorted(set(variant) - {"base", "finetune"}):
        raise ConfigError(f"config: methods.{name} is fine-tuned and sets {more[0]!r} too; set {more[0]!r} in a "
                          "separate variant, and name that variant as `base`")
    refuse(schema()["finetune"], variant["finetune"], ["methods", name, "finetune"])


def _check_grid(config: dict[str, Any]) -> None:
    for key in ("models", "calibrations", "methods"):
        require(f"grid.{key}", config["grid"][key], config[key], f"add it under {key}")
    for name, calibration in config["calibrations"].items():
        require(f"calibrations.{name}.mix", calibration["mix"], config["texts"], "add it under texts")
    for name, sets in grid.seed_sets(config).items():
        if taken := [made for made in sets if made != name and made in config["calibrations"]]:
            raise ConfigError(f"config: calibrations.{name}.seeds makes a set {taken[0]!r}, which already exists; "
                              "rename the existing set")
    require("evaluate.text", [config["evaluate"]["text"]], config["texts"], "add it under texts")
    for name in config["models"]:
        if name in RESERVED:
            raise ConfigError(f"config: models.{name}: results/{name} is a folder of the workflow itself; "
                              "choose another name")


def _check_methods(config: dict[str, Any]) -> None:
    for name in config["methods"]:
        sized = variants.options(config, name).get("block", {}).get("sized_as")
        require(f"methods.{name}.block.sized_as", [sized] if sized else [], config["methods"],
                "name a variant of methods")


def _check_theory(config: dict[str, Any]) -> None:
    if "theory" not in config:
        return
    method = config["theory"]["method"]
    require("theory.method", [method], config["methods"], "name a variant of methods")
    if "kernel" not in variants.steps(config, method):
        raise ConfigError(f"config: theory.method {method!r} has no step `kernel`; name a variant that is based on kdp")
    extents.check_theory(config)


def _check_views(config: dict[str, Any]) -> None:
    views = config.get("views", {})
    require("views.variants", views.get("variants", []), config["methods"], "name a variant of methods")
    for name in views.get("variants", []):
        first = variants.method_schema(config, name)["properties"].get("kernel", {})
        if first.get("x-module") != "kdp_core.methods.kdp.kernel":
            raise ConfigError(f"config: views.variants names {name!r}, which trains no kernel; name a variant that "
                              "is based on kdp")
        if "blocks" not in views and name not in config["grid"]["methods"]:
            raise ConfigError(f"config: views.variants names {name!r}, of which the grid trains no block; add it to "
                              "grid.methods or name views.blocks")
    for block in views.get("blocks", []):
        start, stop = map(int, block.split("-"))
        if start >= stop:
            raise ConfigError(f"config: views.blocks names {block!r}, an empty run; give the first layer and the last "
                              "layer plus one")


def _check_searches(config: dict[str, Any]) -> None:
    """Check the names in agreement.variants, from which `agreement.draws` makes further variants."""
    chosen = config.get("agreement", {}).get("variants", [])
    require("agreement.variants", chosen, config["methods"], "add it under methods")
    for name in chosen:
        if not variants.searches(config, name):
            raise ConfigError(f"config: agreement.variants names {name!r}, which searches under no objective; name a "
                              "variant that is based on layer_search")


def _check_agreement(config: dict[str, Any]) -> None:
    if "agreement" in config and len(grid.compared(config)) < 2:
        raise ConfigError(f"config: agreement compares the variants {grid.compared(config)}; name at least two that "
                          "are based on layer_search in agreement.variants or grid.methods")


def _check_ablations(config: dict[str, Any]) -> None:
    numbered: dict[int, str] = {}
    for name, ablation in config.get("ablations", {}).items():
        if ablation.get("paper") in numbered:
            raise ConfigError(f"config: ablations.{name}.paper is {ablation['paper']}, and so is that of "
                              f"{numbered[ablation['paper']]}; remove it from one of the two")
        numbered |= {ablation["paper"]: name} if "paper" in ablation else {}
    for name, ablation in config.get("ablations", {}).items():
        at = f"ablations.{name}"
        require(f"{at}.variants", ablation["variants"], config["methods"], "add it under methods")
        require(f"{at}.calibrations", ablation.get("calibrations", []), config["calibrations"],
                "add it under calibrations")
        for variant, option in itertools.product(ablation["variants"], (x for x in ablation["x"] if "." in x)):
            part, key = option.split(".")
            if key not in variants.options(config, variant).get(part, {}):
                raise ConfigError(f"config: {at}.x is {option}, which methods.{variant} does not set; "
                                  "write it into the variant")


def _check_similarity(config: dict[str, Any]) -> None:
    known, own = schema()["properties"]["similarity"]["properties"], config.get("similarity", {})
    asked, batch = (own.get(name, known[name]["default"]) for name in ("tokens", "batch"))
    for calib in dict.fromkeys(point["calib"] for point in grid.points(config)):
        if (tokens := min(asked or calibration_tokens(config, calib), calibration_tokens(config, calib))) < batch:
            raise ConfigError(f"config: similarity.batch is {batch}, but only {tokens} tokens of calibrations.{calib} "
                              "are compared, which do not fill one batch; lower similarity.batch or add sequences")


def _check_shards(config: dict[str, Any]) -> None:
    count = config.get("hidden", {}).get("shards", 1)
    for calib in dict.fromkeys(point["calib"] for point in grid.points(config)):
        if (batches := batches_of(config, calib)) < count:
            raise ConfigError(f"config: hidden.shards is {count}, but calibrations.{calib} has {batches} batches of "
                              f"hidden.batch_sequences {batch_sequences(config)}; take at most {batches} shards, or "
                              "smaller batches")


def _check_devices(config: dict[str, Any]) -> None:
    for name, own in config["models"].items():
        device, gpus = own.get("device", "cpu"), own.get("gpus", 1)
        for key in ("gpus", "max_memory"):
            if key in own and device != "balanced":
                raise ConfigError(f"config: models.{name}.{key} is {own[key]}, but device {device} is a single device; "
                                  f"set device to balanced, or remove {key}")
        for place in own.get("max_memory", {}):
            if place != "cpu" and not (str(place).isdigit() and int(place) < gpus):
                raise ConfigError(f"config: models.{name}.max_memory names {place!r}; name cpu, or a GPU by its "
                                  f"number, below models.{name}.gpus, which is {gpus}")
    spread = [name for name in config["grid"]["models"] if config["models"][name].get("device") == "balanced"]
    run = map(partial(_needs_one_device, config), grid.run_variants(config))
    for needs in [*run, *(f"`{name}`" for name in ("spaces", "agreement") if name in config)]:
        if spread and needs:
            raise ConfigError(f"config: models.{spread[0]}.device is balanced, but {needs} needs a model on one "
                              "device; leave it out, or set a device that holds the model")


def _needs_one_device(config: dict[str, Any], variant: str) -> str:
    """The part of a variant that needs the model on one device: it trains or changes the model, or runs single layers.

    The function returns an empty text if the variant has no such part.
    """
    tuned = variants.source_of(config, variant) != variant
    part = "finetune" if tuned else variants.method_schema(config, variant)["x-one-device"]
    return f"`{part}` of variant {variant!r}" if part else ""


def _check_benchmarks(config: dict[str, Any]) -> None:
    chosen = config["evaluate"].get("benchmarks", {})
    named = chosen.get("tasks", [])
    require("choices.tasks", config.get("choices", {}).get("tasks", []), dict.fromkeys(named),
            "add it to evaluate.benchmarks.tasks, since its items are those that are scored")
    require("evaluate.benchmarks.limits", chosen.get("limits", {}), dict.fromkeys(named), "add it to its tasks")
    for name in named:
        if name in config["evaluate"]["tasks"]:
            raise ConfigError(f"config: {name!r} is in evaluate.tasks and in evaluate.benchmarks.tasks; name it "
                              "once")
        if schema()["x-benchmarks"][name]["code"] and not chosen.get("allow_code"):
            raise ConfigError(f"config: evaluate.benchmarks.tasks names {name!r}, which runs programs that the model "
                              "writes; set evaluate.benchmarks.allow_code to true to run them with limits, or leave "
                              "it out")
    for file in benchmark_files(config["evaluate"]):
        if not Path(file).is_file():
            raise ConfigError(f"config: evaluate.benchmarks.data: {file} does not exist; add the file, set "
                              "`data: hub`, or remove the task")
