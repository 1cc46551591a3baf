"""Builds the schema of the configuration from the signatures and docstrings of the library.

schema.py runs this module in a process of its own, since it imports the library: `python -m planning.signatures FILE`.
"""
import json
import sys
from pathlib import Path
from typing import Any, get_args

from kdp_core import figures
from kdp_core.methods import (
    METHODS,
    arguments,
    method_schema,
    option_schema,
    parts,
)
from kdp_core.methods.kdp import kernel
from kdp_core.prune import finetune
from kdp_core.score import benchmarks
from kdp_core.states import hidden, similarity
from kdp_core.study import agreement, answers, planner, single_step, spaces, theory, views
from planning.sections import ABLATION, CALIBRATION, GRID, MODEL, TASK, TEXT, block, count, named, some, text


def signature_block(description: str, function: Any, filled: tuple[str, ...] = (),
                    known: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema of a section of the config. The keys of the section are the keyword-only options of a function,
    without the options in `filled`, whose values the workflow sets.

    For the options in `known`, the schema contains the defaults, because the check before any job needs these defaults.
    """
    made = {**option_schema(function, filled), "description": description}
    for name in known:
        made["properties"][name]["default"] = arguments(function, filled)[name].default
    return made


def hidden_block() -> dict[str, Any]:
    """The section `hidden`: how states are stored, and for how long."""
    made = signature_block("Hidden states.", hidden.extract, known=("batch_sequences",))
    made["properties"]["shards"] = count("Number of jobs that share the extraction of a calibration set; each job "
                                         "has whole batches. The states do not depend on this number. 1 unless set.")
    made["properties"]["keep"] = {
        "type": "boolean", "description": "With false, a model's states are deleted when the last job that reads "
                                          "them has ended. If a variant is added later, the states are extracted "
                                          "again, and all jobs that read them run again. True unless set."}
    return made


def similarity_block() -> dict[str, Any]:
    """The section `similarity`: how layers are compared."""
    return signature_block("Similarity of layers.", similarity.similarity, ("device",), known=("tokens", "batch"))


def theory_block() -> dict[str, Any]:
    """The section `theory`: options of step 1 on a run of layers, and options of the measurement.

    The measurement of the theorems has no own options `heldout` and `seed`: their values come from the options of step
    1.
    """
    measured = option_schema(theory.measure)["properties"]
    return block("Theorems 1 and 2 as numbers; without this section the theorems are not measured.", {
        "method": text("Variant whose options of step `kernel` are used."),
        "kernel": {**option_schema(kernel.fit), "description": "Options of step 1 that override the variant's."},
        "run": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2,
                "description": "First layer of the run, and last layer plus one; the horizon grows over the layers."},
        **{name: entry for name, entry in measured.items() if name not in ("heldout", "seed")}}, ("method", "run"))


def views_block() -> dict[str, Any]:
    """The section `views`: the kernel spaces that are drawn, and the options of the figures."""
    return block("Kernel-space heat maps and paths of the states; without this section they are not drawn.", {
        "variants": some({"type": "string"}, "Variants that are based on kdp; their trained blocks are drawn."),
        "blocks": some({"type": "string", "pattern": "^[0-9]+-[0-9]+$"},
                       "First layer and last layer plus one, such as 14-16. A block that is not fitted yet is fitted. "
                       "All blocks that the grid trains unless set."),
        "heatmaps": signature_block("Features of a held-out sequence.", views.kernel_view),
        "trajectories": signature_block("Paths of the states.", views.paths, known=("samples", "perplexity"))})


def spaces_block() -> dict[str, Any]:
    """The section `spaces`: the pruned models whose states, logits and probabilities are compared."""
    filled = ("device", "dtype", "dropped")
    return block("States, logits and probabilities against the dense model's; not compared without this section.", {
        "variants": some({"type": "string"}, "Variants of grid.methods; all of them unless set."),
        "probe": signature_block("One part of one layer is removed at a time.", spaces.probe, filled, ("positions",)),
        "compare": signature_block("Pruned models are compared with the dense model.", spaces.compare, filled,
                                   ("prompt_tokens",))})


def generation_block() -> dict[str, Any]:
    """The section `generation`: the pruned models whose generation is predicted, and the amount of text."""
    return block("Prediction whether pruned models still generate text; not made without this section.", {
        "variants": some({"type": "string"}, "Variants of grid.methods; all of them unless set."),
        "statistics": signature_block("Next-token predictions on held-out text.", single_step.measure,
                                      ("device", "dtype"))})


def choices_block() -> dict[str, Any]:
    """The section `choices`: the multiple-choice items whose probabilities are compared."""
    return block("Probabilities of multiple-choice items; not compared without this section.", {
        "variants": some({"type": "string"}, "Variants of grid.methods; all of them unless set."),
        "tasks": some({"type": "string"}, "Tasks of evaluate.benchmarks that score several choices after one context."),
        "limit": count("Largest number of items of a task; the first scored items are taken.")}, ("tasks",))


def agreement_block() -> dict[str, Any]:
    """The section `agreement`: the searches for layers that are compared, and the amount of held-out text."""
    return block("Agreement of searches for layers; not measured without this section.", {
        "variants": some({"type": "string"}, "Variants that are based on layer_search, in the grid or not; all such "
                                             "variants of grid.methods unless set."),
        "draws": count("Number of draws of calibration text. The search of each variant is repeated on each draw; draw "
                       "k makes another variant <name>-dk. Only the given variants unless set."),
        "heldout": signature_block("Held-out text.", agreement.measure, ("device", "dtype"))})


def answers_block() -> dict[str, Any]:
    """The section `answers`: the prompts, and the pruned models that answer the prompts."""
    made = signature_block("Prompts that the dense and pruned models continue for the report.",
                           answers.answers, ("device", "dtype"))
    made["properties"]["prompts"] |= {"minItems": 1}
    made["properties"]["ratio"] = {"type": "number", "description": "A ratio of the grid. The models with this ratio "
                                                                    "answer. The largest ratio unless set."}
    return made | {"required": ["prompts"]}


def method_block(name: str) -> dict[str, Any]:
    """The schema of a method's options, ordered by part, with the names of the functions that the method's jobs run."""
    made, method = method_schema(name), METHODS[name]
    functions = {**parts(method), "module_params": method.module_params,
                 **({"module": method.module} if method.module else {})}
    made["x-functions"] = {part: f"{one.__module__}.{one.__name__}" for part, one in functions.items()}
    return made


def plan_block() -> dict[str, Any]:
    """The section `plan`: the planner's assumptions about the machines."""
    made = signature_block("Assumptions of `snakemake plan`.", planner.plan)
    for entry in made["properties"].values():
        entry["exclusiveMinimum"] = 0
    return made


def finetune_block() -> dict[str, Any]:
    """Options of fine-tuning."""
    return signature_block("Low-rank fine-tuning of the checkpoint of the variant named by `base`.",
                           finetune.finetune)


def evaluate_block() -> dict[str, Any]:
    """The section `evaluate`: the tasks and benchmarks on which models are scored."""
    chosen = block("Benchmarks of docs/benchmarks.md, scored in addition to `tasks`; none unless set.", {
        "tasks": some({"type": "string", "enum": list(benchmarks.BENCHMARKS)}, "Names of docs/benchmarks.md."),
        "data": text("`hub`, or a folder with the local files that docs/benchmarks.md names."),
        "limit": count("Largest number of items of a task; the first items are taken."),
        "limits": named("Largest number of items of single tasks.", count("Items.")),
        "fewshot": count("Examples in a prompt, for tasks that do not fix the number.", 0),
        "allow_code": {"type": "boolean", "description": "Run programs that the model writes (humaneval, mbpp), in "
                                                         "processes with limits; off unless set."},
    })
    return block("Evaluation by lm-eval.", {
        "text": text("Name under texts of the held-out text from which the heldout_ tasks are made."),
        "window": count("Tokens of a window of heldout_ppl.", 2),
        "lastword_items": count("Number of items of heldout_lastword."),
        "continuation_items": count("Number of items of heldout_continuation."),
        "seed": count("Seed for the choice of items.", 0),
        "tasks": some({"type": "string", "pattern": TASK},
                      "lm-eval tasks, groups or tags; heldout_ppl, heldout_lastword and heldout_continuation are made "
                      "from the held-out text."),
        "task_folders": some({"type": "string"}, "Folders with further lm-eval task files."),
        "limit": count("Largest number of items of a task; the first items are taken."),
        "fewshot": count("Examples in a prompt, for tasks that do not fix the number.", 0),
        "scorer": {"type": "string", "enum": list(get_args(benchmarks.Scorer)), "description":
                   "How log-likelihoods are computed; fast unless set. No score depends on this choice."},
        "batch_size": count("Sequences of a forward pass."),
        "max_length": count("Largest number of tokens of a sequence."),
        "split": {"type": "boolean", "description": "If true, each task of each model is a separate job with its "
                                                    "own device; otherwise one job scores a model. Off unless set. "
                                                    "No score depends on this choice."},
        "benchmarks": chosen,
    }, ("text", "tasks"))


def build() -> dict[str, Any]:
    """The whole schema. Each variant is checked against the schema of its method under `methods`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **block("Config of kdp.", {
            "models": named("Dense models by name.", MODEL),
            "texts": named("Texts by name.", TEXT),
            "calibrations": named("Calibration sets by name.", CALIBRATION),
            "grid": GRID,
            "hidden": hidden_block(),
            "similarity": similarity_block(),
            "methods": named("Variants by name; `base` names the variant or method on which a variant is based.",
                             {"type": ["object", "null"], "properties": {
                                 "base": {"type": "string"}, "block": {"type": "object", "properties": {
                                     "sized_as": {"type": "string"}}}, "finetune": {"type": "object"}}}),
            "ablations": named("Studies by name.", ABLATION),
            "evaluate": evaluate_block(),
            "efficiency": block("Latency and memory.", {
                "tokens": count("Tokens of the prompt."),
                "decode_steps": count("Decoded tokens of a timed run."), "repeats": count("Number of timed runs."),
                "threads": count("CPU threads of the timed runs.")}),
            "diagnose": block("Comparison of pruned and dense models on held-out windows.", {
                "windows": count("Windows of held-out text.", 2)}),
            "theory": theory_block(),
            "views": views_block(),
            "spaces": spaces_block(),
            "generation": generation_block(),
            "agreement": agreement_block(),
            "choices": choices_block(),
            "answers": answers_block(),
            "training": block("All trainings.", {
                "save_every_s": count("Seconds between two saved states, from which an interrupted training continues; "
                                      "0 saves after every update. No result depends on this value.", 0)}),
            "plan": plan_block(),
            "figures": block("Look of the figures.", {
                "colormap": text("matplotlib colour map of the heat maps."),
                "dpi": count("Resolution of the PNG files.", 50),
                "variants": some({"type": "string"}, "Variants of grid.methods in figures of many variants; all of "
                                                     "them unless set."),
                "tasks": some({"type": "string"}, "Tasks of the figure of scores by task; all of them unless set.")}),
            "checkpoints": text("copies, or links. With links, checkpoints of one dense model share the files of equal "
                                "layers as hard links. copies unless set.", enum=["copies", "links"]),
            "cache": text("Folder for downloaded files."),
        }, ("models", "texts", "calibrations", "grid", "methods", "evaluate")),
        "methods": {name: method_block(name) for name in METHODS},
        "finetune": finetune_block(),
        "x-figures": figures.described(),
        "x-benchmarks": {name: {"local": task.local, "shots": task.shots, "fewshot": task.fewshot, "fixed": task.fixed,
                                "code": task.code} for name, task in benchmarks.BENCHMARKS.items()},
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(build(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
