"""What the workflow knows of itself: the checked config, the grid, the rows of methods, and hashes of library code.

Imports neither torch nor kdp_core, so that planning stays quick; what it must know of the methods stands in
config.schema.json, which workflow_scripts/schema.py writes from the library's signatures.
"""
import ast
import difflib
import hashlib
import itertools
import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jsonschema

ROOT = Path(__file__).resolve().parents[1]
RESERVED = ("benchmarks", "figures", "logs", "resume", "tables", "tasks", "texts")
"""Names of result folders that no model may have."""
TABLE = ROOT / "kdp_core" / "methods" / "__init__.py"
TASK_FILES = ROOT / "kdp_core" / "score" / "task_files"


class ConfigError(ValueError):
    """A config that cannot be run, in one sentence."""


@cache
def schema() -> dict[str, Any]:
    """The config's JSON schema."""
    return json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8"))


def check(config: dict[str, Any]) -> None:
    """Refuse an unknown key, a wrong type or value, a name that nothing defines; ConfigError names place and remedy."""
    _refuse(schema(), config, [])
    for name, row in config["methods"].items():
        own = {key: value for key, value in (row or {}).items() if key not in ("base", "finetune")}
        _refuse(schema()["methods"][base_of(config, name)], own, ["methods", name])
        _check_finetune(config, name)
    _check_names(config)


def _refuse(rules: dict[str, Any], value: Any, place: list[str]) -> None:
    errors = list(jsonschema.Draft202012Validator(rules).iter_errors(value))
    if errors:
        raise ConfigError(_sentence(min(errors, key=lambda error: (len(error.path), str(error.path))), place))


def _sentence(error: jsonschema.ValidationError, above: list[str]) -> str:
    place = ".".join(map(str, [*above, *error.path])) or "the top level"
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        patterns = error.schema.get("patternProperties", {})
        unknown = next(key for key in error.instance
                       if key not in known and not any(re.search(pattern, str(key)) for pattern in patterns))
        near = difflib.get_close_matches(str(unknown), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}" if known else (
            "names hold letters, digits, '_', '.' and '-'")
        return f"config: unknown key {unknown!r} at {place}; {hint}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"config: {place} lacks {missing!r}; {error.schema['properties'][missing].get('description', 'add it')}"
    words = error.schema.get("description", "")
    return f"config: {place} is {error.instance!r}, but {_demand(error)}. {words}".rstrip()


def _demand(error: jsonschema.ValidationError) -> str:
    """What a value must be, in words."""
    limit = error.validator_value
    return {"type": f"must be of type {limit}", "enum": f"must be one of {limit}",
            "minimum": f"must be at least {limit}",
            "exclusiveMinimum": f"must be above {limit}", "exclusiveMaximum": f"must be below {limit}",
            "pattern": f"must match {limit}", "minItems": "must not be empty", "minProperties": "must not be empty",
            "uniqueItems": "must not hold a value twice"}.get(error.validator, error.message)


def base_of(config: dict[str, Any], name: str) -> str:
    """The method of METHODS that a row stands on, through `base` of rows on rows."""
    seen, row = [name], name
    while "base" in (config["methods"].get(row) or {}):
        row = config["methods"][row]["base"]
        if row in seen:
            raise ConfigError(f"config: methods.{name} stands on itself ({' -> '.join([*seen, row])}); mend its `base`")
        if row not in config["methods"] and row not in schema()["methods"]:
            raise ConfigError(f"config: methods.{seen[-1]}.base is {row!r}, which is neither a row nor a method; "
                              f"methods are {', '.join(schema()['methods'])}")
        seen.append(row)
        if row not in config["methods"]:
            break
    if row not in schema()["methods"]:
        raise ConfigError(f"config: methods.{row} is no method; give it a `base` from {', '.join(schema()['methods'])}")
    return row


def source_of(config: dict[str, Any], name: str) -> str:
    """The row whose checkpoint a row starts from: the first one below it without `finetune`, often itself."""
    while "finetune" in (config["methods"].get(name) or {}):
        name = config["methods"][name]["base"]
    return name


def _check_finetune(config: dict[str, Any], name: str) -> None:
    """A fine-tuned row shares blocks, steps and checkpoint with a row, so it may hold nothing else of its own."""
    row = config["methods"][name] or {}
    base = config["methods"].get(row.get("base")) or {}
    if "finetune" not in row:
        if "finetune" in base:
            raise ConfigError(f"config: methods.{name} stands on {row['base']!r}, which is fine-tuned; give it a "
                              "`finetune` of its own, or the row below as `base`")
        return
    if row.get("base") not in config["methods"]:
        raise ConfigError(f"config: methods.{name}.finetune starts from the checkpoint of a row of methods; name one "
                          f"as `base` ({row.get('base')!r} is none)")
    if more := sorted(set(row) - {"base", "finetune"}):
        raise ConfigError(f"config: methods.{name} is fine-tuned and sets {more[0]!r} too; set that in a row of its "
                          "own and take it as `base`")
    _refuse(schema()["finetune"], row["finetune"], ["methods", name, "finetune"])


def options(config: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """A row's options by step, its own over those of the rows it stands on."""
    row = config["methods"].get(name) or {}
    below = options(config, row["base"]) if "base" in row else {}
    own = {step: given for step, given in row.items() if step != "base"}
    return {step: below.get(step, {}) | own.get(step, {}) for step in [*below, *(s for s in own if s not in below)]}


def steps(config: dict[str, Any], name: str) -> list[str]:
    """What a row fits block by block, in order."""
    return schema()["methods"][base_of(config, name)]["x-steps"]


def has(config: dict[str, Any], name: str, part: str) -> bool:
    """Whether a row's method has a `search` or a `compose`."""
    return part in schema()["methods"][base_of(config, name)]["properties"]


def fits(config: dict[str, Any], name: str) -> list[str]:
    """What a row's fits are called: its steps, or `compose`."""
    return ["compose"] if has(config, name, "compose") else steps(config, name)


def search_row(config: dict[str, Any], name: str) -> str:
    """The row whose search a row reads: the lowest of those it stands on that searches with the same options."""
    mine = options(config, name).get("search", {})
    base = (config["methods"].get(name) or {}).get("base")
    if base in config["methods"] and options(config, base).get("search", {}) == mine:
        return search_row(config, base)
    return name


def size_options(config: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Those of a row's options that decide how many parameters its stand-ins have."""
    sizing = schema()["methods"][base_of(config, name)]["x-size"]
    return {step: {option: value for option, value in given.items() if f"{step}.{option}" in sizing}
            for step, given in options(config, name).items() if step not in ("block", "search", "finetune")}


def size_of(config: dict[str, Any], model: str) -> dict[str, float]:
    """Parameters, hidden width and layers of a model, as well as they are known so far.

    Its facts say, once it is fetched; before that a folder's config.json, or the number in the source's name, as in
    hf:meta-llama/Llama-2-7b-hf. A model of which nothing is known has no size.
    """
    facts = Path(f"results/{model}/facts.json")
    if facts.is_file():
        fields = json.loads(facts.read_text(encoding="utf-8"))["fields"]
        return {"params": fields["params_total"], "width": fields["width"], "layers": fields["layers"]}
    source = config["models"][model]["source"]
    if (described := Path(source) / "config.json").is_file():
        return _size_of_config(json.loads(described.read_text(encoding="utf-8")))
    named = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", source.lower())
    return {"params": float(named[1]) * {"m": 1e6, "b": 1e9}[named[2]] if named else 0, "width": 0, "layers": 0}


def _size_of_config(config: dict[str, Any]) -> dict[str, float]:
    """The size of a model of this configuration, none of whose weights are tied or shared: at least its true one."""
    config = config | config.get("text_config", {})
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    inner = config.get("intermediate_size") or config.get("ffn_dim") or 4 * width
    heads = config["num_attention_heads"] * config.get("head_dim", width // config["num_attention_heads"])
    # embedding and head; queries, keys, values, output; gate, up, down
    params = 2 * config["vocab_size"] * width + layers * (4 * width * heads + 3 * width * inner)
    return {"params": params, "width": width, "layers": layers}


def weights_mb(config: dict[str, Any], model: str) -> float:
    """Megabytes of a model's weights at its precision."""
    precision = config["models"][model].get("dtype", "float32")
    return size_of(config, model)["params"] * (4 if precision == "float32" else 2) / 1e6


def calibration_tokens(config: dict[str, Any], calib: str) -> int:
    """Tokens of a calibration set."""
    return sum(config["calibrations"][calib]["mix"].values()) * config["calibrations"][calib]["length"]


def state_mb(config: dict[str, Any], model: str, calib: str) -> float:
    """Megabytes of one state of all calibration tokens, float32."""
    return calibration_tokens(config, calib) * size_of(config, model)["width"] * 4 / 1e6


def device(config: dict[str, Any], model: str) -> str:
    """Where a model runs, as `kdp_core.model.checkpoints.load_model` takes it: with what each place may hold behind `balanced`."""
    own = config["models"][model]
    limits = ",".join(f"{place}={size}" for place, size in own.get("max_memory", {}).items())
    return ":".join(filter(None, (own.get("device", "cpu"), limits)))


def shards(config: dict[str, Any], calib: str) -> list[tuple[int, int]]:
    """Sequences of each shard of an extraction, the first and one past the last: whole batches, as even as they go."""
    sequences, batch = sum(config["calibrations"][calib]["mix"].values()), _batch(config)
    count, batches = config.get("hidden", {}).get("shards", 1), _batches(config, calib)
    borders = [min(batches * shard // count * batch, sequences) for shard in range(count + 1)]
    return list(itertools.pairwise(borders))


def _batch(config: dict[str, Any]) -> int:
    default = schema()["properties"]["hidden"]["properties"]["batch_sequences"]["default"]
    return config.get("hidden", {}).get("batch_sequences", default)


def _batches(config: dict[str, Any], calib: str) -> int:
    return -(-sum(config["calibrations"][calib]["mix"].values()) // _batch(config))


def gathered_states(config: dict[str, Any], model: str, calib: str) -> float:
    """What the similarity holds in units of `state_mb`: a state as stored and converted, the chosen tokens of all."""
    tokens = calibration_tokens(config, calib)
    chosen = min(config.get("similarity", {}).get("tokens", 8192), tokens)
    return 2 + 2 * (size_of(config, model)["layers"] + 1) * chosen / tokens


def _check_names(config: dict[str, Any]) -> None:
    grid = config["grid"]
    for key, known in (("models", "models"), ("calibrations", "calibrations"), ("methods", "methods")):
        _known(f"grid.{key}", grid[key], config[known], f"add it under {known}")
    for name, calibration in config["calibrations"].items():
        _known(f"calibrations.{name}.mix", calibration["mix"], config["texts"], "add it under texts")
    for name, sets in seed_sets(config).items():
        if taken := [made for made in sets if made != name and made in config["calibrations"]]:
            raise ConfigError(f"config: calibrations.{name}.seeds makes a set {taken[0]!r}, which is there already; "
                              "rename that one")
    _known("evaluate.text", [config["evaluate"]["text"]], config["texts"], "add it under texts")
    for name in config["methods"]:
        sized = options(config, name).get("block", {}).get("sized_as")
        _known(f"methods.{name}.block.sized_as", [sized] if sized else [], config["methods"], "name a row of methods")
    if "theory" in config:
        _known("theory.method", [config["theory"]["method"]], config["methods"], "name a row of methods")
        if "kernel" not in steps(config, config["theory"]["method"]):
            raise ConfigError(f"config: theory.method {config['theory']['method']!r} has no step `kernel`; name a row "
                              "that stands on kdp")
        if config["theory"]["run"][0] >= config["theory"]["run"][1]:
            raise ConfigError(f"config: theory.run is {config['theory']['run']}, an empty run; give the first layer "
                              "and one past the last")
    _check_views(config)
    for section in ("figures", "spaces"):
        _known(f"{section}.rows", config.get(section, {}).get("rows", []), dict.fromkeys(config["grid"]["methods"]),
               "name a row of grid.methods, or add it there")
    _check_ablations(config)
    _check_shards(config)
    _check_devices(config)
    _check_benchmarks(config)
    for name in config["models"]:
        if name in RESERVED:
            raise ConfigError(f"config: models.{name}: results/{name} is the workflow's own folder; "
                              "choose another name")


def _check_benchmarks(config: dict[str, Any]) -> None:
    chosen = config["evaluate"].get("benchmarks", {})
    named = chosen.get("tasks", [])
    _known("evaluate.benchmarks.limits", chosen.get("limits", {}), dict.fromkeys(named), "add it to its tasks")
    for name in named:
        if name in config["evaluate"]["tasks"]:
            raise ConfigError(f"config: {name!r} stands in evaluate.tasks and in evaluate.benchmarks.tasks; name it "
                              "once")
        if schema()["x-benchmarks"][name]["code"] and not chosen.get("allow_code"):
            raise ConfigError(f"config: evaluate.benchmarks.tasks names {name!r}, which runs programs that the model "
                              "writes; set evaluate.benchmarks.allow_code to true to run them with limits, or leave "
                              "it out")
    for file in benchmark_files(config["evaluate"]):
        if not Path(file).is_file():
            raise ConfigError(f"config: evaluate.benchmarks.data: {file} does not exist; put it there, take "
                              "`data: hub`, or leave its task out")


def evaluated(config: dict[str, Any]) -> list[str]:
    """The tasks of an evaluation by the names in the config: a group of lm-eval is one."""
    return [*config["evaluate"]["tasks"], *config["evaluate"].get("benchmarks", {}).get("tasks", [])]


def one_task(evaluate: dict[str, Any], name: str) -> dict[str, Any]:
    """The section `evaluate` with one task in the place of all: what is said of other tasks is gone."""
    made = evaluate | {"tasks": [task for task in evaluate["tasks"] if task == name]}
    if chosen := evaluate.get("benchmarks"):
        limits = {task: limit for task, limit in chosen.get("limits", {}).items() if task == name}
        made["benchmarks"] = chosen | {"tasks": [task for task in chosen.get("tasks", []) if task == name],
                                       "limits": limits}
    return made


def benchmark_files(evaluate: dict[str, Any]) -> list[str]:
    """The local data files of the chosen benchmarks, with those of few-shot examples; none where the hub has them."""
    chosen = evaluate.get("benchmarks", {})
    if chosen.get("data", "hub") == "hub":
        return []
    found = []
    for row in (schema()["x-benchmarks"][name] for name in chosen.get("tasks", [])):
        shots = row["fewshot"] if row["fixed"] else chosen.get("fewshot", row["fewshot"])
        found += [row["local"], *([row["shots"]] if row["shots"] and shots else [])]
    return [str(Path(chosen["data"]) / file) for file in found]


@cache
def task_files() -> str:
    """Hash of the task definitions, which no script imports."""
    files = sorted(path for path in TASK_FILES.iterdir() if path.suffix in (".yaml", ".py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _check_devices(config: dict[str, Any]) -> None:
    for name, own in config["models"].items():
        device, gpus = own.get("device", "cpu"), own.get("gpus", 1)
        for key in ("gpus", "max_memory"):
            if key in own and device != "balanced":
                raise ConfigError(f"config: models.{name}.{key} is {own[key]}, but device {device} is one place; set "
                                  f"device to balanced, or leave {key} out")
        for place in own.get("max_memory", {}):
            if place != "cpu" and not (str(place).isdigit() and int(place) < gpus):
                raise ConfigError(f"config: models.{name}.max_memory names {place!r}; name cpu, or a GPU by its "
                                  f"number, below models.{name}.gpus, which is {gpus}")
    spread = [name for name in config["grid"]["models"] if config["models"][name].get("device") == "balanced"]
    for needs in [*map(partial(_needs_one_device, config), rows(config)), "`spaces`" if "spaces" in config else ""]:
        if spread and needs:
            raise ConfigError(f"config: models.{spread[0]}.device is balanced, but {needs} needs a model on one "
                              "device; leave it out, or set a device that holds the model")


def _needs_one_device(config: dict[str, Any], row: str) -> str:
    """What of a row runs single layers of the model, trains or changes it; nothing where it reads stored states."""
    part = "finetune" if source_of(config, row) != row else schema()["methods"][base_of(config, row)]["x-one-device"]
    return f"`{part}` of row {row!r}" if part else ""


def _check_shards(config: dict[str, Any]) -> None:
    count = config.get("hidden", {}).get("shards", 1)
    for calib in dict.fromkeys(point["calib"] for point in points(config)):
        if (batches := _batches(config, calib)) < count:
            raise ConfigError(f"config: hidden.shards is {count}, but calibrations.{calib} has {batches} batches of "
                              f"hidden.batch_sequences {_batch(config)}; take at most {batches} shards, or smaller "
                              "batches")


def _check_views(config: dict[str, Any]) -> None:
    views = config.get("views", {})
    _known("views.rows", views.get("rows", []), config["methods"], "name a row of methods")
    for name in views.get("rows", []):
        first = schema()["methods"][base_of(config, name)]["properties"].get("kernel", {})
        if first.get("x-module") != "kdp_core.methods.kdp.kernel":
            raise ConfigError(f"config: views.rows names {name!r}, which trains no kernel; name a row that stands on "
                              "kdp")
        if "blocks" not in views and name not in config["grid"]["methods"]:
            raise ConfigError(f"config: views.rows names {name!r}, of which the grid trains no block; add it to "
                              "grid.methods or name views.blocks")
    for block in views.get("blocks", []):
        start, stop = map(int, block.split("-"))
        if start >= stop:
            raise ConfigError(f"config: views.blocks names {block!r}, an empty run; give the first layer and one past "
                              "the last")


def _check_ablations(config: dict[str, Any]) -> None:
    numbered: dict[int, str] = {}
    for name, ablation in config.get("ablations", {}).items():
        if ablation.get("paper") in numbered:
            raise ConfigError(f"config: ablations.{name}.paper is {ablation['paper']}, and so is that of "
                              f"{numbered[ablation['paper']]}; take it from one of them")
        numbered |= {ablation["paper"]: name} if "paper" in ablation else {}
    for name, ablation in config.get("ablations", {}).items():
        at = f"ablations.{name}"
        _known(f"{at}.rows", ablation["rows"], config["methods"], "add it under methods")
        _known(f"{at}.calibrations", ablation.get("calibrations", []), config["calibrations"],
               "add it under calibrations")
        for row, option in itertools.product(ablation["rows"], (x for x in ablation["x"] if "." in x)):
            step, key = option.split(".")
            if key not in options(config, row).get(step, {}):
                raise ConfigError(f"config: {at}.x is {option}, which methods.{row} does not set; "
                                  "write it into the row")


def _known(place: str, names: Any, known: dict[str, Any], remedy: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else remedy
            raise ConfigError(f"config: {place} names {name!r}, which is not defined; {hint}")


def points(config: dict[str, Any]) -> list[dict[str, str]]:
    """All that is pruned and measured, as wildcards of each point: the grid, then what ablations add to it."""
    made = [*grid_points(config), *(point for name in config.get("ablations", {})
                                    for point in ablation_points(config, name))]
    return list({tuple(point.values()): point for point in made}.values())


def grid_points(config: dict[str, Any]) -> list[dict[str, str]]:
    """The grid's own points, in the order of the config."""
    return _product(config, config["grid"], config["grid"]["methods"])


def ablation_points(config: dict[str, Any], name: str) -> list[dict[str, str]]:
    """The points of an ablation: its rows at its calibration sets, ratios and K_max, or at the grid's."""
    return _product(config, config["grid"] | config["ablations"][name], config["ablations"][name]["rows"])


def _product(config: dict[str, Any], grid: dict[str, Any], rows: list[str]) -> list[dict[str, str]]:
    # a fine-tuned row's point names the row that it starts from too, and one that is searched the row with the search
    more = {}
    for row in rows:
        source = source_of(config, row)
        search = _search_or_none(config, source)
        more[row] = ({"source": source} if source != row else {}) | ({"search": search} if search else {})
    return [dict(model=model, calib=calib, method=method, ratio=f"{ratio:g}", k_max=str(k_max), **more[method])
            for model, calib, method, ratio, k_max in itertools.product(
                grid["models"], grid["calibrations"], rows, grid["ratios"], grid["k_max"])]


def rows(config: dict[str, Any]) -> list[str]:
    """The rows of methods that are run, the grid's first."""
    return list(dict.fromkeys(point["method"] for point in points(config)))


def seed_sets(config: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each calibration set with further seeds, the sets that it stands for with their seeds, its own first."""
    return {name: {name: own["seed"], **{f"{name}-s{seed}": seed for seed in own["seeds"] if seed != own["seed"]}}
            for name, own in config["calibrations"].items() if "seeds" in own}


def seed_families(config: dict[str, Any]) -> dict[str, str]:
    """For every calibration set that is one of several seeds, the set that it is a seed of."""
    return {made: name for name, sets in seed_sets(config).items() if len(sets) > 1 for made in sets}


def with_seeds_apart(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a calibration set of its own for every seed, run wherever the set that names the seeds is."""
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


def calibration_sizes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Sequences and tokens of each calibration set."""
    return {name: (sum(own["mix"].values()), own["length"] * sum(own["mix"].values()))
            for name, own in config["calibrations"].items()}


def paper_ablations(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The ablations that are a table of the paper, by its number, as `ablation` gives them."""
    return {own["paper"]: ablation(config, name) for name, own in config.get("ablations", {}).items() if "paper" in own}


def ablation(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An ablation as kdp_core.results.ablations.Ablation takes it."""
    own = config["ablations"][name]
    varied = {row: options(config, row) for row in own["rows"]}
    tokens = {calib: size[1] for calib, size in calibration_sizes(config).items()}
    return {"name": f"ablation-{name}", "title": own["title"], "x": own["x"],
            "metrics": own.get("metrics", ["ppl", "acc"]), "points": ablation_points(config, name), "tokens": tokens,
            "settings": {row: {option: varied[row][step][key] for option in own["x"] if "." in option
                               for step, key in [option.split(".")]} for row in own["rows"]}}


def workload(config: dict[str, Any]) -> dict[str, Any]:
    """What the planner counts: the points with their rows, and all sizes that the config knows."""
    run = list(dict.fromkeys(name for row in rows(config) for name in (row, source_of(config, row))))
    # a row may read the search of one that is not run
    run += [row for name in run if (row := _search_or_none(config, name)) and row not in run]
    hidden = config.get("hidden", {})
    return {"points": points(config), "diagnosed": grid_points(config),
            "rows": {name: {"base": base_of(config, name), "options": options(config, name), "fits": fits(config, name),
                            "search": _search_or_none(config, name), "source": source_of(config, name),
                            "sized": sized_as(config, name)} for name in run},
            "models": {name: {"source": one["source"], "dtype": one.get("dtype", "float32")}
                       for name, one in config["models"].items()},
            "calibrations": {name: {"sequences": sum(one["mix"].values()), "length": one["length"]}
                             for name, one in config["calibrations"].items()},
            "split": len(evaluated(config)) if config["evaluate"].get("split") else 0,
            "state_bytes": 4 if hidden.get("dtype") == "float32" else 2, "state_layers": hidden.get("layers"),
            "shards": hidden.get("shards", 1)}


def _search_or_none(config: dict[str, Any], name: str) -> str | None:
    return search_row(config, name) if has(config, name, "search") else None


def sized_as(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The method whose stand-ins are counted for a row, and the options that size them."""
    row = options(config, name).get("block", {}).get("sized_as", name)
    return {"method": base_of(config, row), "options": size_options(config, row)}


def point_dir(point: dict[str, str]) -> str:
    """The folder of a grid point's results."""
    return "results/{model}/{calib}/{method}/r{ratio}-k{k_max}".format(**point)


def learned(config: dict[str, Any]) -> list[str]:
    """The grid's rows that train a kernel and its inverse; a row of no epochs has no curves to draw."""
    return [name for name in config["grid"]["methods"] if steps(config, name) == ["kernel", "inverse"]
            and options(config, name).get("kernel", {}).get("epochs") != 0 and source_of(config, name) == name]


def looks(config: dict[str, Any], points: list[dict[str, str]]) -> dict[str, list[Any]]:
    """How the rows of these points are drawn, the same in every figure: see kdp_core.figures.style.Row.

    The place of the row's method in the table of methods, the row's number among the config's rows that stand on this
    method, and what the method does.
    """
    methods, found, seen = list(schema()["methods"]), {}, {}
    # a row named like its method comes first, whichever way round they stand
    for name in sorted(config["methods"], key=lambda name: name not in methods):
        base = base_of(config, name)
        group = "fine-tuned" if source_of(config, name) != name else schema()["methods"][base]["x-group"]
        # rows of a method that the config does not name as such leave the method its own look
        number = seen[base] = seen.get(base, -1 if name == base else 0) + 1
        found[name] = [methods.index(base), number, group]
    return {name: found[name] for name in dict.fromkeys(point["method"] for point in points)}


def chosen_points(config: dict[str, Any], section: str) -> list[dict[str, str]]:
    """The grid's points of the rows that a section of the config chooses, or of all."""
    rows = config.get(section, {}).get("rows", config["grid"]["methods"])
    return [point for point in grid_points(config) if point["method"] in rows]


def calibrated(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Every model and calibration set of the grid."""
    return list(itertools.product(config["grid"]["models"], config["grid"]["calibrations"]))


def labels(calibrated: list[tuple[str, str]]) -> list[str]:
    """Names of models in figures, the calibration set beside them where there are several."""
    several = len({calib for _, calib in calibrated}) > 1
    return [f"{model}, {calib}" if several else model for model, calib in calibrated]


def jointly(config: dict[str, Any]) -> list[str]:
    """The grid's rows whose stand-ins are trained together, over at least one epoch."""
    trains = {name for name, method in schema()["methods"].items()
              if "kl_weight" in method["properties"].get("compose", {}).get("properties", {})}
    return [name for name in config["grid"]["methods"] if base_of(config, name) in trains
            and options(config, name).get("compose", {}).get("epochs") != 0 and source_of(config, name) == name]


def theory_kernel(config: dict[str, Any]) -> dict[str, Any]:
    """Options of step 1 on the run of `theory`: those of the row it names, and its own over them."""
    theory = config.get("theory", {})
    return (options(config, theory["method"]).get("kernel", {}) if theory else {}) | theory.get("kernel", {})


def theory_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of `theory` that are not about which kernel is fitted where."""
    return {key: value for key, value in config.get("theory", {}).items() if key not in ("method", "kernel", "run")}


def figure_entries(config: dict[str, Any]) -> list[dict[str, str]]:
    """Every figure of the report, in order: name, title, rule that makes it, caption."""
    made = [_entry("score-ratio", "Score against ratio", "figure_score_ratio",
                   "Mean accuracy and perplexity against the share of all parameters really removed, one line a method "
                   "and K max; bars are one standard error. KDP paper, Figure 6."),
            _entry("tasks-ratio", "Every task against the ratio", "figure_tasks",
                   "The main metric of each task against the share of all parameters really removed, one line a method "
                   "and K max; bars are one standard error over the task's items. KDP paper, Figures 6 and 7."),
            _entry("layers", "Layers that go", "figure_layers",
                   "Which layers each grid point removes or replaces, a panel a ratio; half a layer is its attention "
                   "(upper) or its MLP (lower) alone. LoRP, Figure 4."),
            _entry("similarity-models", "Similarity of layers, all models", "figure_models",
                   "Cosine (mean over tokens) and linear CKA of the hidden states before each pair of layers, on one "
                   "colour scale; RLS is low where layers resemble each other all over the depth. KDP paper, Figure 1; "
                   "LoRP, Figure 1."),
            _entry("locality", "Similarity by distance", "figure_locality",
                   "Mean cosine of two layers' inputs by their distance as a share of the depth; the band holds the "
                   "middle half of the pairs of layers at that distance. LoRP, Figure 2."),
            *_ablation_entries(config)]
    for model, calib in calibrated(config):
        at, of = f"{model}/{calib}", f"{model}, {calib}"
        made.append(_entry(f"{at}/similarity", f"Similarity of layers: {of}", "figure_similarity",
                           "Similarity of the hidden states before each pair of layers. KDP paper, Figure 1."))
        if "theory" in config:
            made.append(_entry(f"{at}/theory", f"Theorems 1 and 2: {of}", "figure_theory",
                               "Theorem 1's bounds beside the errors that they bound, by horizon; then held-out errors "
                               "of random and learned features beside linear maps of states, and how Theorem 2's risk "
                               "falls with the kernel's width whatever becomes of the state."))
        made += [_entry(f"{at}/errors-r{ratio:g}", f"Error of states at ratio {ratio:g}: {of}", "figure_errors",
                        "Relative squared error of the pruned models' states against the dense model's, on held-out "
                        "windows.") for ratio in config["grid"]["ratios"]]
        made += _view_entries(config, at, of)
        made += _spaces_entries(config, at, of)
        for method in learned(config):
            made += [_entry(f"{at}/{method}-training", f"Training: {method}, {of}", "figure_training",
                            "Losses of both steps and the cosine of step 1 by epoch, a line a block. KDP paper, "
                            "Figure 3."),
                     _entry(f"{at}/{method}-operators", f"Operator norms: {method}, {of}", "figure_operators",
                            "Norms of the operators and of the mean-free features in training. KDP paper, Figure 5.")]
        made += [_entry(f"{at}/{method}-joint", f"Joint training: {method}, {of}", "figure_joint",
                        "Divergence of the outputs from the dense model's by epoch, a line a grid point; epoch 0 is "
                        "the closed form.") for method in jointly(config)]
    return made


def _view_entries(config: dict[str, Any], at: str, of: str) -> list[dict[str, str]]:
    if "views" not in config:
        return []
    return [_entry(f"{at}/trajectories", f"Paths of the states: {of}", "views_trajectories",
                   "One token a sample through the layers, its place in a t-SNE of all layers across. Beside it, how "
                   "straight the paths are: 1 is a straight line; dashed are walks whose steps have the same lengths "
                   "and unrelated directions, and a t-SNE of theirs. KDP paper, Figure 10."),
            *(_entry(f"{at}/{row}-heatmaps", f"Kernel space: {row}, {of}", "views_heatmaps",
                     "Predicted and true features after each block at a few positions of a held-out sequence, on one "
                     "colour range, and their difference on its own. KDP paper, Figures 4 and 9.")
              for row in config["views"].get("rows", []))]


def _spaces_entries(config: dict[str, Any], at: str, of: str) -> list[dict[str, str]]:
    if "spaces" not in config:
        return []
    paper = "Representation hierarchies, Figure"
    made = [_entry(f"{at}/spaces-layers", f"Three spaces, layer by layer: {of}", "figure_spaces_layers",
                   "1 - cosine of states, logits and probabilities with those of the dense model, right after a layer "
                   "whose attention or MLP or both are left out; bands are one standard error over held-out windows. "
                   f"{paper} 4."),
            _entry(f"{at}/spaces-split", f"Along and across: {of}", "figure_spaces_split",
                   "The same change of states and logits, as its part along the dense vector and the rest, relative to "
                   f"that vector's norm. {paper} 5."),
            _entry(f"{at}/spaces-estimates", f"Estimates beside changes: {of}", "figure_spaces_estimates",
                   "Second-order estimates from the logits' change beside the change measured, a point a token, layer "
                   f"and part left out; on the dotted line both are equal. {paper} 6.")]
    for ratio in config["grid"]["ratios"]:
        made += [_entry(f"{at}/spaces-steps-r{ratio:g}", f"Decoding step by step at ratio {ratio:g}: {of}",
                        "figure_spaces_steps",
                        "Cosine with the dense model after a prompt, by decoding step: above, both models read what "
                        "the dense one says, below, each what it says itself; bands are one standard error over "
                        f"prompts. {paper} 7."),
                 _entry(f"{at}/spaces-choices-r{ratio:g}", f"Letters beside all tokens at ratio {ratio:g}: {of}",
                        "figure_spaces_choices",
                        "Multiple-choice items asked for a letter: change of the probabilities over all tokens and "
                        "over the letters alone, and where the letters stand among all tokens of the dense model; bars "
                        f"are one standard error over items. {paper} 8.")]
    return made


def _ablation_entries(config: dict[str, Any]) -> list[dict[str, str]]:
    return [_entry(f"ablation-{name}", f"Ablation: {own['title']}", "ablation",
                   f"{own['caption']} Bars are one standard error; dotted, with its own: the dense model.")
            for name, own in config.get("ablations", {}).items()]


def _entry(name: str, title: str, rule: str, caption: str) -> dict[str, str]:
    return {"name": name, "title": title, "rule": rule, "caption": caption}


def entry_of(entries: list[dict[str, str]], name: str) -> dict[str, str]:
    """The entry of a figure; of one that the report does not show, its name and no caption."""
    return next((entry for entry in entries if entry["name"] == name), _entry(name, name, "", ""))


def as_rst(text: str) -> str:
    """Plain words as reStructuredText: no character of theirs means anything."""
    return re.sub(r"([\\*_`|])", r"\\\1", text)


def seeds(config: dict[str, Any]) -> dict[str, int]:
    """Every seed that the grid uses."""
    made = {f"calibration {point['calib']}": config["calibrations"][point["calib"]]["seed"]
            for point in points(config)}
    made["evaluation"] = config["evaluate"].get("seed", 0)
    for name in rows(config):
        own = schema()["methods"][base_of(config, name)]["properties"] if source_of(config, name) == name else [
            "finetune"]
        made |= {f"{name}, {part}": options(config, name).get(part, {}).get("seed", 0) for part in own
                 if part != "block"}
    return made


@cache
def _imports(path: Path) -> tuple[str, frozenset[Path]]:
    """A module's code without docstrings and comments, and the files of kdp_core that it imports.

    Of the table of methods only the functions count as its code: a new row must not rerun the others.
    """
    tree = _bare(ast.parse(path.read_text(encoding="utf-8")))
    found: set[Path] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {file for name in names if name.startswith("kdp_core.") and (file := _file(name))}
    if path == TABLE:
        tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.AnnAssign)]
    return ast.dump(tree), frozenset(found)


def _file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _modules(method: str, steps: tuple[str, ...] | None = None) -> set[Path]:
    """The files that hold a method's functions (of some of its steps)."""
    parts = schema()["methods"][method]["properties"]
    return {_file(part["x-module"]) for name, part in parts.items() if steps is None or name in steps}


def _hash(start: Path, left_out: frozenset[Path] = frozenset()) -> str:
    todo, seen = [start], {}
    while todo:
        path = todo.pop()
        if path not in seen:
            seen[path], more = _imports(path)
            todo += [other for other in more if path != TABLE or other not in left_out]
    library = {str(path.relative_to(ROOT)): text for path, text in seen.items()
               if path.parent.name != "workflow_scripts"}
    return hashlib.sha256(repr(sorted(library.items())).encode()).hexdigest()[:16]


@cache
def code(script: str, method: str | None = None, steps: tuple[str, ...] | None = None) -> str:
    """Hash of the library code that a workflow script runs: the modules it imports, and theirs.

    Snakemake sees the script, not what it imports. As a param this reruns the rule when the library's code changes,
    and not when a comment or a docstring does. With a method (and some of its steps), modules of other methods that
    the table imports are left out.
    """
    others = {file for name in schema()["methods"] for file in _modules(name)}
    left_out = others - _modules(method, steps) if method else set()
    return _hash(ROOT / "workflow_scripts" / f"{script}.py", frozenset(left_out))


@cache
def step_code(method: str, step: str) -> str:
    """Hash of the library code of one step of a method, or of its search or compose."""
    return _hash(_file(schema()["methods"][method]["properties"][step]["x-module"]))


def blocks_code(method: str, sized: str) -> str:
    """Hash of the library code that selects blocks for a method with the stand-ins of the method `sized`."""
    return code("blocks") + step_code(method, "block") + function_code(schema()["methods"][sized]["x-params"])


@cache
def function_code(name: str) -> str:
    """Hash of one function, and of the constants it names and functions it calls in its module: no edit beside it
    counts."""
    module, function = name.rsplit(".", 1)
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    known = {part: node for node in tree.body for part in _defined(node)}
    todo, seen = [function], {}
    while todo:
        part = todo.pop()
        if part not in seen:
            seen[part] = known[part]
            todo += [name for name in _used(known[part]) if name in known]
    text = [(part, ast.dump(_bare(node))) for part, node in sorted(seen.items())]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def _used(node: ast.stmt) -> list[str]:
    """Constants that a statement names and functions that it calls; one that it only names is not run."""
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    called = {part.func.id for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
    return [name for name in names if name in called or not name.islower()]


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module gives a meaning."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _bare(tree: ast.AST) -> ast.AST:
    """The tree, its docstrings gone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
