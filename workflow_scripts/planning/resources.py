"""Computes the needs of jobs: sizes of models and states, devices and shards.

This module also collects the numbers from which the planner estimates a run.
"""
import itertools
import json
import re
from pathlib import Path
from typing import Any

from planning import variants
from planning.evaluation import evaluated
from planning.grid import grid_points, points, run_variants
from planning.schema import schema
from planning.sources import params_of, shape_of


def size_of(config: dict[str, Any], model: str) -> dict[str, float]:
    """Parameters, width of the states and number of layers of a model, if they are known.

    The sizes of a fetched model come from its facts. The sizes of a model that is not fetched yet come from the
    config.json of its local folder. For a model without a local folder, only the number of parameters is known, from
    the source's name (hf:meta-llama/Llama-2-7b-hf). Unknown numbers are 0.
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
    """The sizes of the model with this config.json, computed by the library's own functions."""
    width, layers = shape_of(config)
    return {"params": params_of(config), "width": width, "layers": layers}


def weights_mb(config: dict[str, Any], model: str) -> float:
    """Megabytes of a model's weights at its precision."""
    precision = config["models"][model].get("dtype", "float32")
    return size_of(config, model)["params"] * (4 if precision == "float32" else 2) / 1e6


def calibration_tokens(config: dict[str, Any], calib: str) -> int:
    """Number of tokens in a calibration set."""
    return sum(config["calibrations"][calib]["mix"].values()) * config["calibrations"][calib]["length"]


def state_mb(config: dict[str, Any], model: str, calib: str) -> float:
    """Megabytes of the states of one layer over all calibration tokens, float32."""
    return calibration_tokens(config, calib) * size_of(config, model)["width"] * 4 / 1e6


def block_states(start: int, stop: int) -> int:
    """Memory that the fit of a block needs, in units of one layer's states.

    The fit uses the states before and after each layer of the block. Memory contains three copies of these states: as
    read, stacked, and split.
    """
    return 3 * (stop - start + 1)


def norm_states(config: dict[str, Any], model: str) -> float:
    """Memory for the norms of all states when shards are joined, in units of one layer's states."""
    size = size_of(config, model)
    return 4 * (size["layers"] + 1) / max(size["width"], 1)


def gathered_states(config: dict[str, Any], model: str, calib: str) -> float:
    """Memory that the similarity needs, in units of one layer's states.

    Memory contains two copies of the chosen tokens of all layers, and the last token of each sequence. States are read
    chunk by chunk.
    """
    tokens, length = calibration_tokens(config, calib), config["calibrations"][calib]["length"]
    chosen = min(config.get("similarity", {}).get("tokens", 8192), tokens)
    return (size_of(config, model)["layers"] + 1) * (2 * chosen / tokens + 1 / length)


def device(config: dict[str, Any], model: str) -> str:
    """The text that `load_model` gets as `device` for a model. The text includes limits of memory if there are any."""
    own = config["models"][model]
    limits = ",".join(f"{place}={size}" for place, size in own.get("max_memory", {}).items())
    return ":".join(filter(None, (own.get("device", "cpu"), limits)))


def gpus(config: dict[str, Any], model: str) -> int:
    """Number of GPUs of a job that runs the model.

    On the device `balanced`, the layers of the model are distributed over all GPUs of the job.
    """
    kind = device(config, model).split(":")[0]
    return {"balanced": config["models"][model].get("gpus", 1), "auto": 1, "cuda": 1}.get(kind, 0)


def shards(config: dict[str, Any], calib: str) -> list[tuple[int, int]]:
    """The range [first, last + 1) of the sequences of each shard of an extraction.

    Each shard of an extraction consists of whole batches. The numbers of batches of two shards differ by at most one.
    """
    sequences, batch = sum(config["calibrations"][calib]["mix"].values()), batch_sequences(config)
    count, batches = config.get("hidden", {}).get("shards", 1), batches_of(config, calib)
    borders = [min(batches * shard // count * batch, sequences) for shard in range(count + 1)]
    return list(itertools.pairwise(borders))


def batch_sequences(config: dict[str, Any]) -> int:
    """Number of sequences in a batch of the extraction."""
    default = schema()["properties"]["hidden"]["properties"]["batch_sequences"]["default"]
    return config.get("hidden", {}).get("batch_sequences", default)


def batches_of(config: dict[str, Any], calib: str) -> int:
    """Number of batches in a calibration set; the last batch may be smaller."""
    return -(-sum(config["calibrations"][calib]["mix"].values()) // batch_sequences(config))


def workload(config: dict[str, Any]) -> dict[str, Any]:
    """The input of the planner: the points, their variants, and all sizes that the configuration gives."""
    run = list(dict.fromkeys(name for variant in run_variants(config)
                             for name in (variant, variants.source_of(config, variant))))
    # a variant may read the search of a variant that is not run
    run += [search for name in run if (search := variants.search_of(config, name)) and search not in run]
    hidden = config.get("hidden", {})
    return {"points": points(config), "diagnosed": grid_points(config),
            "variants": {name: {"base": variants.base_of(config, name), "options": variants.options(config, name),
                            "fits": variants.fits(config, name), "search": variants.search_of(config, name),
                            "source": variants.source_of(config, name), "sized": variants.sized_as(config, name)}
                     for name in run},
            "models": {name: {"source": one["source"], "dtype": one.get("dtype", "float32")}
                       for name, one in config["models"].items()},
            "calibrations": {name: {"sequences": sum(one["mix"].values()), "length": one["length"]}
                             for name, one in config["calibrations"].items()},
            "split": len(evaluated(config)) if config["evaluate"].get("split") else 0,
            "state_bytes": 4 if hidden.get("dtype") == "float32" else 2, "state_layers": hidden.get("layers"),
            "shards": hidden.get("shards", 1)}
