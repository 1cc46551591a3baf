"""Compares pruned models on real tasks at the same share of removed parameters: `python benchmarks/retention.py`.

Every structured method is calibrated on the same mix of eight sources: web pages, encyclopedia, school and question
texts, but no news. Every method removes the same share of ALL parameters. Every model is scored on the same items:
multiple-choice tasks and last words of LAMBADA. Perplexity is measured on news, encyclopedia and web text. The speed of
each model is compared with the dense model's. The data are real sets in a local folder (--data); its subfolder calib/
has the calibration files, and eval/ has the items.

The command prints its plan first (--plan prints only the plan): the number of items, the expected standard error, and
the hours that the remaining rows need on this machine. A row is written to <out>/retention/ as soon as it is measured,
and no row is measured twice. So the run can be stopped, continued, and split by --models, --rows, --ratios and --seeds.
The outcome of every item is stored, so that models are compared item by item. The command writes
    <out>/retention.csv        a row for each model, method, ratio and calibration seed
    <out>/retention_tests.csv  each method against our best method: difference of the mean accuracy over tasks, its
                               paired standard error, p of the bootstrap and p corrected by Holm
acc is the mean over the tasks on which the dense model is above chance by more than four standard errors. In percent,
acc_above_chance_retained = 100 (acc - chance) / (dense acc - chance).
Methods that remove whole layers miss a ratio by up to half a layer; params_removed gives the share that was removed.
"""
import argparse
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import numpy as np
import pandas as pd
import protocol
import torch
import yaml
from protocol import CKA, KDP, RESIDUAL, Setup, Variant

from kdp_core.base import store, texts
from kdp_core.base.records import Tokens
from kdp_core.model import checkpoints
from kdp_core.model.distil import final_states, head_of, token_losses
from kdp_core.model.families import first_token
from kdp_core.prune import fold
from kdp_core.results import paired
from kdp_core.results.compare import read_outcomes
from kdp_core.score import efficiency, evaluate
from kdp_core.score.benchmarks import BENCHMARKS, Chosen

logger = logging.getLogger("retention")
LENGTH = 128
"""Tokens of a calibration sequence and of a window of held-out text."""
OURS = "kdp_"
"""Prefix of the names of this project's methods."""


class Source(NamedTuple):
    """One source of the calibration mix."""
    files: tuple[tuple[str, str], ...]
    """Pairs: a file in calib/, and the name of its text field or a template of several fields."""
    share: int
    """Sequences in every 34."""


MIX = {
    "web": Source((("c4_demo", "text"), ("c4_sample_rest", "text")), 8),
    "wiki": Source((("wikipedia_demo", "text"), ("wikitext2_valid", "page")), 8),
    "race_high": Source((("race_high_train", "article"),), 4),
    "race_middle": Source((("race_middle_train", "article"),), 4),
    "mnli": Source((("mnli_train_few", "{premise} {hypothesis}"),), 1),
    "piqa": Source((("piqa_test_unlabelled", "{goal} {sol1}"),), 3),
    "boolq": Source((("boolq_val_rest", "{passage} {question}"),), 4),
    "mmlu": Source((("mmlu_val", "{question} {choices}"),), 2),
}
"""The paper's eight sources are PIQA, CMMLU, BoolQ, C3, MNLI, RACE (high and middle) and SlimPajama, 500 sequences of
each. Here C4 and encyclopedia articles replace SlimPajama, and MMLU replaces the Chinese sets, which the models cannot
read. MNLI has little text."""
TASKS = {"piqa": 400, "arc_easy": 400, "hellaswag": 400, "lambada_openai": 400, "openbookqa": 500, "copa": 100}
"""Task -> items."""
HELDOUT = {"news": 64, "wiki": 64, "web": 64}
"""Held-out text -> windows."""

VARIANTS: dict[str, Variant] = {
    "kdp_narrow": Variant("kdp_narrow", 3, {"compose": {"epochs": 1}}),
    "kdp_narrow_additive": Variant("kdp_narrow", 3, {"block": {"attention_price": 1.0}, "compose": {"epochs": 1}}),
    "kdp_narrow_closed": Variant("kdp_narrow", 3, {"compose": {"epochs": 0}}),
    "kdp_narrow_kept": Variant("kdp_narrow", 3, {"search": {"solve": False}, "compose": {"epochs": 0, "solve": False}}),
    "kdp_residual": Variant("kdp_residual", protocol.FREE, RESIDUAL),
    "kdp": Variant("kdp", 3, KDP),
    **{name: Variant(name, 3, {"block": CKA}) for name in ("remove", "linear_prefix")},
    **{name: Variant(name, 3, {}) for name in (
        "sleb", "shortgpt", "llm_pruner", "shortened_taylor", "shortened_ppl", "slicegpt", "laco", "sliding_merge",
        "lorp", "replaceme_lstsq", "streamline", "joint_drop", "flap", "slimgpt", "ziplm")},
}
"""Structured variants. `kdp_narrow_additive` does not raise the measured losses of attentions (attention_price 1).
`kdp_narrow_closed` is not trained. `kdp_narrow_kept` does not change the weights that it keeps."""
MODELS = {"smollm2-135m": "config.yaml", "gemma3-270m": "configs/gemma.yaml"}
"""Name of a model -> the configuration file with its entry, relative to the project's root."""


class Dense(NamedTuple):
    """A dense model, and the data that are the same for all pruned versions of this model."""
    name: str
    setup: Setup
    heldout: dict[str, torch.Tensor]
    scores: dict[str, Any]


def mix(dense: Path, data: Path, sequences: int, seed: int, vocabulary: int) -> Tokens:
    """The calibration sequences: `sequences` in total, divided among the sources."""
    total = sum(source.share for source in MIX.values())
    parts = []
    for name, source in MIX.items():
        documents = [one for file, field in source.files
                     for one in texts.read_documents(data / f"calib/{file}.jsonl", format="jsonl", field=field)]
        parts.append(texts.Part(name, documents, max(1, sequences * source.share // total)))
    return texts.pack(checkpoints.load_tokenizer(dense), parts, length=LENGTH, seed=seed, vocabulary=vocabulary,
                      start=first_token(checkpoints.config_of(dense)))


def heldout_texts(dense: Path, data: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Windows of each held-out text. The windows have equal distances in the text."""
    documents = {"news": embedded.documents("lee", config),
                 "wiki": texts.read_documents(data / "eval/wikitext2_test.jsonl", format="jsonl", field="page"),
                 "web": texts.read_documents(data / "eval/c4_sample.jsonl", format="jsonl", field="text")}
    found = {}
    for name, own in documents.items():
        ids_ST = texts.windows(checkpoints.load_tokenizer(dense), own, length=LENGTH,
                               start=first_token(checkpoints.config_of(dense)))
        found[name] = ids_ST[torch.linspace(0, len(ids_ST) - 1, min(HELDOUT[name], len(ids_ST))).long()]
    return found


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids_ST: torch.Tensor) -> float:
    """Perplexity: exp of the mean cross-entropy of all predicted tokens of the windows."""
    states, head = final_states(model, ids_ST)[:, :-1].flatten(0, 1), head_of(model)
    losses = token_losses(states, states, ids_ST[:, 1:].flatten(), head, head, kl_weight=0.0)
    return float(np.exp(losses.ce_nats.item()))


def score(folder: Path, heldout: Mapping[str, torch.Tensor], data: Path, limits: Mapping[str, int],
          samples: Path) -> dict[str, Any]:
    """Score a checkpoint: accuracies, outcomes of items and perplexities."""
    began = time.perf_counter()
    model = checkpoints.load_model(folder)
    found: dict[str, Any] = {f"ppl_{name}": perplexity(model, ids_ST) for name, ids_ST in heldout.items()}
    scores = evaluate.evaluate(folder, tasks=[], chosen=Chosen(tuple(limits), data=str(data), limits=limits),
                               batch_size=16, samples_folder=samples)
    found["outcomes"] = {one.task: one.values_I.tolist() for one in read_outcomes(samples, scores) if one.kind == "acc"}
    found["score_seconds"] = time.perf_counter() - began
    return found


def measure(name: str, ratio: float, seed: int, dense: Dense, options: argparse.Namespace) -> None:
    """Fit, fold and score the model of one row."""
    row = row_path(dense.setup.folder, name, ratio, seed)
    at, variant = row.with_suffix(""), VARIANTS[name]
    about = {"model": dense.name, "method": name, "ratio": ratio, "seed": seed}
    calibrated = protocol.calibrated(dense.setup, seed, lambda: mix(
        dense.setup.dense, options.data, options.sequences, seed, dense.setup.facts.vocabulary))
    try:
        selection, search_seconds = protocol.chosen(variant, dense.setup, calibrated, ratio)
        plan, seconds, _ = protocol.fitted(variant, dense.setup, calibrated, selection)
        pruned = fold.fold(plan, dense.setup.dense, at / "checkpoint")
    except protocol.REFUSALS as refusal:
        store.write_json(row, {**about, "refused": str(refusal)})
        return
    peak = (efficiency.resident_mib("VmHWM") or float("nan")) / 1024
    speed = efficiency.measure(dense.setup.dense, at / "checkpoint", tokens=LENGTH, decode_steps=16, repeats=5)
    found = score(at / "checkpoint", dense.heldout, options.data, limits_of(options), at / "samples")
    store.write_json(row, {**about, "group": "structured", "params_removed": pruned.params_removed,
                           "fit_seconds": seconds + search_seconds, "peak_gib": peak,
                           "speedup_prefill": speed.speedup_prefill, "speedup_decode": speed.speedup_decode, **found})
    shutil.rmtree(at)


def prepare(name: str, options: argparse.Namespace) -> Dense:
    """Make the dense model, its held-out text and its scores; results that are on disk are reused."""
    folder = options.out / "retention" / name
    config = yaml.safe_load((embedded.ROOT / MODELS[name]).read_text(encoding="utf-8"))
    default = embedded.default_config()
    checkpoint, facts = embedded.dense_model(folder, {**default, "models": {name: config["models"][name]}})
    heldout = heldout_texts(checkpoint, options.data, default)
    path = folder / "dense.json"
    if not path.exists():
        store.write_json(path, {"model": name, "method": "dense", "group": "dense", "ratio": 0.0, "params_removed": 0.0,
                                "speedup_prefill": 1.0, "speedup_decode": 1.0, "fit_seconds": 0.0,
                                **score(checkpoint, heldout, options.data, limits_of(options), folder / "samples")})
    return Dense(name, Setup(folder, checkpoint, facts, default, None), heldout, store.read_json(path))


def limits_of(options: argparse.Namespace) -> dict[str, int]:
    """Number of items of each task."""
    return {task: min(items, options.items) if options.items else items for task, items in TASKS.items()}


def row_path(folder: Path, name: str, ratio: float, seed: int) -> Path:
    """The file of a row."""
    return folder / "rows" / f"{name}-r{ratio:g}-seed{seed}.json"


def counted_tasks(dense: Mapping[str, Any]) -> list[str]:
    """The tasks on which the dense model is above chance by more than four standard errors."""
    found = []
    for task, values in dense["outcomes"].items():
        mean, chance = float(np.mean(values)), BENCHMARKS[task].chance or 0.0
        if mean - chance > 4 * (mean * (1 - mean) / len(values)) ** 0.5:
            found.append(task)
    return found


def entry(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table, from the stored measures of one pruned model."""
    known = {key: value for key, value in row.items() if key not in ("outcomes", "score_seconds")}
    if "refused" in row:
        return known
    tasks = counted_tasks(dense)
    means = {task: float(np.mean(row["outcomes"][task])) for task in row["outcomes"]}
    chance = float(np.mean([BENCHMARKS[task].chance or 0.0 for task in tasks]))
    acc, full = (float(np.mean([np.mean(one["outcomes"][task]) for task in tasks])) for one in (row, dense))
    variances = [means[task] * (1 - means[task]) / len(row["outcomes"][task]) for task in tasks]
    ratios = {f"ppl_ratio_{name}": row[f"ppl_{name}"] / dense[f"ppl_{name}"] for name in HELDOUT}
    return {**known, "acc": 100 * acc, "acc_stderr": 100 * sum(variances) ** 0.5 / len(tasks),
            "acc_above_chance_retained": 100 * (acc - chance) / (full - chance), **ratios,
            **{f"acc_{task}": 100 * mean for task, mean in means.items()}, "tasks": " ".join(tasks)}


FIRST = ("model", "method", "group", "ratio", "seed", "params_removed", "acc", "acc_stderr",
         "acc_above_chance_retained", "ppl_ratio_news", "ppl_ratio_wiki", "ppl_ratio_web", "fit_seconds", "peak_gib",
         "speedup_prefill", "speedup_decode")
"""The first columns of the table."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a model that are on disk."""
    return [store.read_json(path) for path in sorted((folder / "rows").glob("*.json"))]


def write_tables(denses: Sequence[Dense], out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write both tables from all rows on disk."""
    lines, tests = [], []
    for dense in denses:
        rows = rows_of(dense.setup.folder)
        lines += [entry(row, dense.scores) for row in [dense.scores, *rows]]
        tests += compared(rows, dense)
    frame = pd.DataFrame(lines)
    frame = frame[[*[name for name in FIRST if name in frame], *sorted(set(frame) - set(FIRST))]]
    frame = frame.sort_values(["model", "ratio", "seed", "acc"], ascending=[True, True, True, False],
                              na_position="first", kind="stable")
    store.write_text(out / "retention.csv", frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    pairs = pd.DataFrame(tests, columns=["model", "ratio", "seed", "ours", "method", "difference", "stderr", "p",
                                         "p_holm"])
    store.write_text(out / "retention_tests.csv", pairs.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    return frame, pairs


def compared(rows: Sequence[Mapping[str, Any]], dense: Dense) -> list[dict[str, Any]]:
    """At each ratio and seed, compare our best method with each published method by item; Holm's method corrects p."""
    tasks, found = counted_tasks(dense.scores), []
    for ratio, seed in sorted({(row["ratio"], row["seed"]) for row in rows}):
        here = [row for row in rows if (row["ratio"], row["seed"]) == (ratio, seed) and "refused" not in row]
        ours = [row for row in here if row["method"].startswith(OURS)]
        others = [row for row in here if not row["method"].startswith(OURS)]
        if not ours or not others:
            continue
        best = max(ours, key=lambda row: sum(np.mean(row["outcomes"][task]) for task in tasks))
        values = {task: np.array([one["outcomes"][task] for one in (best, *others)]).T for task in tasks}
        pairs = [(0, number) for number in range(1, len(others) + 1)]
        table = paired.accuracies(values, dict.fromkeys(tasks, "acc"), pairs)[paired.ALL]
        p_values = [float(table.p_JJ[pair]) for pair in pairs]
        for number, (row, p, corrected) in enumerate(zip(others, p_values, paired.holm(p_values), strict=True), 1):
            found.append({"model": dense.name, "ratio": ratio, "seed": seed, "ours": best["method"],
                          "method": row["method"], "difference": 100 * float(table.difference_JJ[0, number]),
                          "stderr": 100 * float(table.stderr_JJ[0, number]), "p": p, "p_holm": corrected})
    return found


def left(dense: Dense, options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """The rows that are not measured yet, in the order of seeds, ratios and methods."""
    return [(name, ratio, seed) for seed in options.seeds for ratio in options.ratios for name in options.rows
            if not row_path(dense.setup.folder, name, ratio, seed).exists()]


def planned(denses: Sequence[Dense], options: argparse.Namespace) -> str:
    """The plan as a text for the user."""
    lines = []
    for dense in denses:
        tasks, todo = counted_tasks(dense.scores), left(dense, options)
        known = [row for row in rows_of(dense.setup.folder) if "refused" not in row]
        fit = float(np.median([row["fit_seconds"] for row in known])) if known else 300.0
        hours = len(todo) * (fit + dense.scores["score_seconds"]) / 3600
        # if the outcomes of two models differ on a third of the items, the se of a task is sqrt(1 / 3 / n)
        error = 100 * sum(1 / 3 / len(dense.scores["outcomes"][task]) for task in tasks) ** 0.5 / max(1, len(tasks))
        items = {task: len(values) for task, values in dense.scores["outcomes"].items()}
        lines.append(f"{dense.name}: {len(todo)} rows to measure, about {hours:.1f} hours; {sum(items.values())} items "
                     f"of {len(items)} tasks, of which {len(tasks)} count ({' '.join(tasks)}); expected paired "
                     f"standard error of a difference of means {error:.1f} points")
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real sets, with calib/ and eval/")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=list(MODELS),
                        help="models (smollm2-135m)")
    parser.add_argument("--rows", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="ROW",
                        help=f"rows to measure, of {', '.join(VARIANTS)} (all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.25, 0.3],
                        help="shares of all parameters to remove (0.1 0.2 0.25 0.3)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the calibration (0)")
    parser.add_argument("--sequences", type=int, default=1360, help=f"calibration sequences of {LENGTH} tokens (1360)")
    parser.add_argument("--items", type=int, default=0, help="largest number of items of a task (0: as in TASKS)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--plan", action="store_true", help="print the plan and measure no row")
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    options = parser.parse_args(given)
    if not (options.data / "calib").is_dir() or not (options.data / "eval").is_dir():
        parser.error(f"--data {options.data}: it has no folders calib/ and eval/; name the folder of the real sets")
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the plan, measure the rows that are not on disk, write both tables."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    denses = [prepare(name, options) for name in options.models]
    print(planned(denses, options))
    for dense in [] if options.plan else denses:
        for name, ratio, seed in left(dense, options):
            if options.alone:
                measure(name, ratio, seed, dense, options)
            else:
                # a process of its own, so that the peak memory of the row is measured alone
                words = [*(sys.argv[1:] if given is None else given), "--alone", "--models", dense.name, "--rows", name,
                         "--ratios", f"{ratio:g}", "--seeds", str(seed)]
                subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.DEVNULL)
            write_tables(denses, options.out)
            logger.info("%s, ratio %g, seed %d: %s", dense.name, ratio, seed, name)
    frame, pairs = write_tables(denses, options.out)
    print(frame[[name for name in FIRST if name in frame]].to_string(index=False, float_format="%.4g"))
    print(pairs.to_string(index=False, float_format="%.3g"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
