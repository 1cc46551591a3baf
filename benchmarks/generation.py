"""Measures next-token statistics and the generated text of pruned models: `python benchmarks/generation.py`.

For each row, the model is pruned by one method to one ratio. First, statistics of single next-token predictions are
measured on a few windows of text, without any generation. Then the model generates text from other prompts. These
measures describe the generated text:
    agreement, divergence, repetition    greedy continuations of web text beside those of the dense model
    lambada                              the last word of passages as greedy text
    rouge1                               greedy summaries of XSum's news stories
    gsm8k                                only with --gsm8k, and only if the dense model solves some of it
With --choices, the command also compares the probabilities of multiple-choice items over all tokens with the
probabilities over the candidates. The data are real sets in a local folder (--data), with subfolders calib/ and eval/
as for retention.py.

The command prints its plan first (--plan only prints the plan). A row is written to <out>/generation/ as soon as it is
measured, and no row is measured twice. So the run can be stopped, continued, and split by --rows and --ratios. With
--earlier, the rows of earlier tables of the same sizes are not measured again and enter the tables. The command writes
    <out>/generation.csv             a row for each model, method and ratio
    <out>/generation_choices.csv     a row for each of these and each multiple-choice task, with --choices
`python benchmarks/pages/generation.py` fits the predictor to the table that is kept in docs/data/.
"""
import argparse
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import pandas as pd
import protocol
import retention
import torch
import yaml
from protocol import CKA, Setup, Variant
from rows import generation as tables
from rows import text

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.prune import fold
from kdp_core.score import evaluate, generation
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.generation import Stories
from kdp_core.study import candidates, single_step
from kdp_core.study.expect import LENGTH

logger = logging.getLogger("generation")
VARIANTS: dict[str, Variant] = {
    "shortgpt": Variant("shortgpt", 3, {}),
    "magnitude": Variant("magnitude", 3, {}),
    "angular": Variant("angular", 3, {}),
    "mlp_drop": Variant("mlp_drop", 3, {}),
    "linear": Variant("linear", 3, {"block": CKA}),
    "flap": Variant("flap", 3, {}),
    "wanda": Variant("wanda", 3, {}),
    "linear_prefix": Variant("linear_prefix", 3, {"block": CKA}),
    "slicegpt": Variant("slicegpt", 3, {}),
    "attn_drop": Variant("attn_drop", 3, {}),
    "laco": Variant("laco", 3, {}),
    "replaceme_lstsq": Variant("replaceme_lstsq", 3, {}),
    "shortened_taylor": Variant("shortened_taylor", 3, {}),
    "remove": Variant("remove", 3, {"block": CKA}),
    "slimgpt": Variant("slimgpt", 3, {}),
    "deepest": Variant("deepest", 3, {}),
    "kdp_residual": Variant("kdp_residual", protocol.FREE, {"search": {"order": "cka"},
                                                            "compose": {"dictionary": "none"}}),
    "llm_pruner": Variant("llm_pruner", 3, {}),
    "joint_drop": Variant("joint_drop", 3, {}),
    "streamline": Variant("streamline", 3, {}),
    "fragility": Variant("fragility", 3, {}),
    "sparsegpt": Variant("sparsegpt", 3, {}),
    "lorp": Variant("lorp", 3, {}),
    "layer_search": Variant("layer_search", 3, {"compose": {"strategy": "one_shot"}}),
    "shortened_magnitude": Variant("shortened_magnitude", 3, {}),
    "block_drop": Variant("block_drop", 3, {}),
    "cosine_run": Variant("cosine_run", 3, {}),
    "linear_sequential": Variant("linear_sequential", 3, {"block": CKA}),
    "kdp": Variant("kdp", 3, protocol.KDP),
    "replaceme_cosine": Variant("replaceme_cosine", 3, {}),
    "fragility_parts": Variant("fragility_parts", 3, {}),
    "lorp_masked": Variant("lorp_masked", 3, {}),
    "ziplm": Variant("ziplm", 3, {"compose": {"draws": 30}}),
    "shortened_ppl": Variant("shortened_ppl", 3, {}),
    "sleb": Variant("sleb", 3, {"search": {"sequences": 2, "largest": 0.35}}),
    "sliding_merge": Variant("sliding_merge", 3, {}),
    "streamline_relative": Variant("streamline_relative", 3, {}),
    "kdp_narrow": Variant("kdp_narrow", 3, {"compose": {"epochs": 0}}),
}
"""One variant for each method of the table. The fits of the first ones take about a minute, and those of the last ones
several minutes. The order of the first ones alternates between kinds of damage to the model, so that a stopped run has
measured several kinds of damage."""
CHOICES = ("piqa", "arc_easy", "copa")
"""Multiple-choice tasks of --choices."""
SKILLED = 2.0
"""GSM8K is used only if the dense model's score is above 0 by more than this number of standard errors."""


class Sizes(NamedTuple):
    """The amounts of text and of items that are measured for each row."""
    windows: int = 6
    """Number of windows of encyclopedia text for the statistics."""
    prompts: int = 8
    """Number of prompts of web text that the model continues."""
    length: int = LENGTH
    """Number of tokens of a window and of a prompt."""
    steps: int = 32
    """Tokens of a continuation."""
    passages: int = 40
    """Passages of LAMBADA."""
    passage_words: int = 60
    """Largest number of words of a passage; longer passages are left out."""
    stories: int = 8
    story_tokens: int = 96
    """Tokens of a story, without the question."""
    summary_steps: int = 20
    """Tokens of a summary."""


SIZES = Sizes()


class Asked(NamedTuple):
    """The text and items on which all rows are measured, tokenised for the model."""
    windows_ST: torch.Tensor
    prompt_BT: torch.Tensor
    passages: list[str]
    stories: Stories
    items: list[candidates.Item]


class Dense(NamedTuple):
    """The dense model and its continuations."""
    name: str
    setup: Setup
    model: torch.nn.Module
    tokenizer: Any
    asked: Asked
    h_STD: torch.Tensor
    """The dense model's last states (before the final norm) for all tokens of the windows."""
    said_BG: torch.Tensor
    """The dense model's continuations."""
    choices: list[candidates.Read]
    scores: dict[str, Any]


# What is measured -----------------------------------------------------------------------------------------------------

def asked_of(dense: Path, options: argparse.Namespace) -> Asked:
    """Read the windows, prompts, passages, stories and items."""
    sizes, reader, start = options.sizes, checkpoints.load_tokenizer(dense), first_token(checkpoints.config_of(dense))

    def cut(file: str, field: str, count: int) -> torch.Tensor:
        documents = texts.read_documents(options.data / f"eval/{file}.jsonl", format="jsonl", field=field)
        ids_ST = texts.windows(reader, documents, length=sizes.length, start=start)
        return ids_ST[torch.linspace(0, len(ids_ST) - 1, min(count, len(ids_ST))).long()]

    passages = texts.read_documents(options.data / "eval/lambada_openai_test.jsonl", format="jsonl", field="text")
    stories = pd.read_json(options.data / "eval/xsum_dev.jsonl", lines=True).to_dict("records")
    chosen = Chosen(options.tasks, data=str(options.data), limit=options.choices)
    return Asked(cut("wikitext2_test", "page", sizes.windows), cut("c4_sample", "text", sizes.prompts),
                 [one for one in passages if len(one.split()) <= sizes.passage_words][:sizes.passages],
                 generation.stories(stories, reader, count=sizes.stories, tokens=sizes.story_tokens),
                 candidates.items(dense, chosen) if options.choices else [])


def generated(model: torch.nn.Module, dense: Dense, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Generate text with a model, and measure the generated text."""
    sizes = options.sizes
    said_BG = generation.greedy(model, dense.asked.prompt_BT, sizes.steps)
    found: dict[str, Any] = generation.text_measures(said_BG, dense.said_BG)
    found["lambada"] = generation.lambada(model, dense.tokenizer, dense.asked.passages)
    found["rouge1"] = generation.rouge1(model, dense.tokenizer, dense.asked.stories, sizes.summary_steps)
    found["text"] = dense.tokenizer.decode(said_BG[0])
    if options.gsm8k and dense.scores.get("gsm8k", 1.0):
        found["gsm8k"], found["gsm8k_stderr"] = gsm8k(folder, options)
    return found


def gsm8k(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Share of GSM8K items that the model solves, with its standard error."""
    chosen = Chosen(("gsm8k",), data=str(options.data), limit=options.gsm8k)
    scores = evaluate.evaluate(folder, tasks=[], chosen=chosen).scores
    score = next(one for one in scores if one.metric.startswith("exact_match"))
    return score.value, score.stderr or 0.0


def prepare(name: str, options: argparse.Namespace) -> Dense:
    """Load the dense model, and generate its continuations of the prompts. The measures of its text are stored on
    disk."""
    folder = options.out / "generation" / name
    config = yaml.safe_load((embedded.ROOT / retention.MODELS[name]).read_text(encoding="utf-8"))
    default = embedded.default_config()
    checkpoint, facts = embedded.dense_model(folder, {**default, "models": {name: config["models"][name]}})
    model, asked = checkpoints.load_model(checkpoint), asked_of(checkpoint, options)
    setup = Setup(folder, checkpoint, facts, default, None)
    dense = Dense(name, setup, model, checkpoints.load_tokenizer(checkpoint), asked,
                  single_step.last_states(model, asked.windows_ST),
                  generation.greedy(model, asked.prompt_BT, options.sizes.steps), [], {})
    path = folder / "dense.json"
    if not path.exists():
        began = time.perf_counter()
        found = generated(model, dense, checkpoint, options)
        if "gsm8k" in found and found["gsm8k"] <= SKILLED * found["gsm8k_stderr"]:
            logger.warning("%s solves %.0f %% of GSM8K, not above 0 by %g standard errors; it is left out", name,
                           100 * found["gsm8k"], SKILLED)
            found["gsm8k"] = 0.0
        store.write_json(path, {"model": name, "method": "dense", "ratio": 0.0, "params_removed": 0.0, **found,
                                "sizes": options.sizes._asdict(), "measure_seconds": time.perf_counter() - began})
    scores = store.read_json(path)
    if scores["sizes"] != options.sizes._asdict():
        raise SystemExit(f"{path} was measured with {scores['sizes']}, not {options.sizes._asdict()}; name another "
                         "--out, or delete the folder")
    return dense._replace(scores=scores, choices=candidates.read(model, dense.tokenizer, asked.items))


def measure(name: str, ratio: float, dense: Dense, options: argparse.Namespace) -> None:
    """Prune the model for one row of the table, and measure its statistics, its generated text and its choices."""
    row, setup, variant = row_path(dense.setup.folder, name, ratio), dense.setup, VARIANTS[name]
    about, at = {"model": dense.name, "method": name, "ratio": ratio}, row.with_suffix("")
    calibrated = protocol.calibrated(setup, options.seed, lambda: text.calibration(
        setup.dense, options.data, options.sequences, options.seed, setup.facts.vocabulary))
    try:
        selection, search_seconds = protocol.chosen(variant, setup, calibrated, ratio)
        plan, seconds, _ = protocol.fitted(variant, setup, calibrated, selection)
        pruned = fold.fold(plan, setup.dense, at / "checkpoint")
    except protocol.REFUSALS as refusal:
        store.write_json(row, {**about, "refused": str(refusal)})
        return
    began, model = time.perf_counter(), checkpoints.load_model(at / "checkpoint")
    step = single_step.compare(dense.model, model, dense.asked.windows_ST, dense.h_STD)
    found = generated(model, dense, at / "checkpoint", options)
    items = candidates.measure(dense.model, model, dense.tokenizer, dense.asked.items, dense.choices)
    store.write_json(row, {**about, "params_removed": pruned.params_removed, "fit_seconds": seconds + search_seconds,
                           **step.values, **found, "choices": items, "measure_seconds": time.perf_counter() - began})
    shutil.rmtree(at)


def row_path(folder: Path, name: str, ratio: float) -> Path:
    """The file that stores the measures of a row."""
    return folder / "rows" / f"{name}-r{ratio:g}.json"


# The command ----------------------------------------------------------------------------------------------------------

def write_tables(denses: Sequence[Dense], options: argparse.Namespace) -> pd.DataFrame:
    """Write both tables from all rows on disk and from the earlier tables. Returns the first of them."""
    measured = {dense.name: (dense.scores, [store.read_json(path) for path in
                                            sorted((dense.setup.folder / "rows").glob("*.json"))])
                for dense in denses}
    return tables.write_tables(measured, options.out, options.earlier)


def left(dense: Dense, options: argparse.Namespace) -> list[tuple[str, float]]:
    """The rows that are not measured yet."""
    known = tables.known(options.earlier)
    return [(name, ratio) for name in options.rows for ratio in options.ratios
            if (dense.name, name, ratio) not in known and not row_path(dense.setup.folder, name, ratio).exists()]


def planned(denses: Sequence[Dense], options: argparse.Namespace) -> str:
    """The plan as a text for the user."""
    lines = []
    for dense in denses:
        todo, seconds = left(dense, options), dense.scores["measure_seconds"]
        lines.append(f"{dense.name}: {len(todo)} rows to measure, about {len(todo) * (seconds + 30) / 60:.0f} minutes; "
                     + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in options.sizes._asdict().items())
                     + (f", {options.choices} items of {', '.join(options.tasks)}" if options.choices else ""))
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real sets, with calib/ and eval/")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=list(retention.MODELS),
                        help="models (smollm2-135m)")
    parser.add_argument("--rows", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="ROW",
                        help=f"rows to measure, of {', '.join(VARIANTS)} (all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.25],
                        help="shares of all parameters to remove (0.1 0.25)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration (0)")
    parser.add_argument("--sequences", type=int, default=34,
                        help=f"calibration sequences of {text.LENGTH} tokens (34)")
    parser.add_argument("--choices", type=int, default=0, help="items of each multiple-choice task (0: none)")
    parser.add_argument("--tasks", nargs="+", default=list(CHOICES), metavar="TASK",
                        help=f"multiple-choice tasks of --choices ({' '.join(CHOICES)})")
    parser.add_argument("--gsm8k", type=int, default=0, help="items of GSM8K (0: none)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--plan", action="store_true", help="print the plan and measure no row")
    parser.add_argument("--earlier", type=Path, metavar="FOLDER", help="folder with both tables of an earlier run, "
                        "such as docs/data (none)")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    options = parser.parse_args(given)
    if not (options.data / "calib").is_dir() or not (options.data / "eval").is_dir():
        parser.error(f"--data {options.data}: it has no folders calib/ and eval/; name the folder of the real sets")
    if wrong := [ratio for ratio in options.ratios if not 0 < ratio < 1]:
        parser.error(f"--ratios has {wrong[0]:g}; give shares between 0 and 1, such as 0.25")
    options.sizes = SIZES
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the plan, measure the rows that are not on disk, write both tables."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    denses = [prepare(name, options) for name in options.models]
    print(planned(denses, options), flush=True)
    for dense in [] if options.plan else denses:
        for name, ratio in left(dense, options):
            measure(name, ratio, dense, options)
            write_tables(denses, options)
            logger.info("%s, ratio %g: %s", dense.name, ratio, name)
    frame = write_tables(denses, options)
    print(frame[[name for name in tables.FIRST if name in frame]].to_string(index=False, float_format="%.3g"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
