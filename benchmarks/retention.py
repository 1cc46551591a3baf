"""Compares pruned models on real tasks at the same share of removed parameters: `python benchmarks/retention.py`.

Every structured method is calibrated on the same mix of eight sources: web pages, encyclopedia, school and question
texts, but no news. Every method removes the same share of ALL parameters. Every model is scored on the same items:
multiple-choice tasks and last words of LAMBADA. Perplexity is measured on news, encyclopedia and web text. The speed of
each model is compared with the dense model's. The data are real sets in a local folder (--data); its subfolder calib/
has the calibration files, and eval/ has the items.

The command prints its plan first (--plan prints only the plan): the number of items, the expected standard error, and
the hours that the remaining rows need on this machine. A row is written to <out>/retention/ as soon as it is measured,
and no row is measured twice. So the run can be stopped, continued, and split by --models, --rows, --ratios and --seeds.
The outcome of every item is stored, so that models are compared item by item. With --earlier, the rows of an earlier
run, on this machine or another, are not measured again and enter the tables. The command writes
    <out>/retention.csv         a row for each model, method, ratio and calibration seed
    <out>/retention_tests.csv   each method against our best method: difference of the mean accuracy over tasks, its
                                paired standard error, p of the bootstrap and p corrected by Holm
    <out>/retention_variants.csv  our variants against each other and against the best other method: the same for each
                                task and for their mean (all); the p of a task is that of McNemar's test
    <out>/retention_rows.jsonl  all rows with the outcomes of their items, for --earlier
acc is the mean over the tasks on which the dense model is above chance by more than four standard errors. In percent,
acc_above_chance_retained = 100 (acc - chance) / (dense acc - chance). peak_gib is the larger peak of two processes: one
searches, the other fits and folds. A third process extracts and compares the states.
A row such as kdp_narrow@4000 has its own number of calibration sequences. Methods that remove whole layers miss a ratio
by up to half a layer; params_removed gives the share that was removed.
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
from rows import retention as tables
from rows import text
from rows.retention import FIRST

from kdp_core import methods
from kdp_core.base import store
from kdp_core.model import checkpoints
from kdp_core.model.distil import final_states, head_of, token_losses
from kdp_core.prune import finetune, fold
from kdp_core.results.compare import read_outcomes
from kdp_core.score import efficiency, evaluate
from kdp_core.score.benchmarks import Chosen

logger = logging.getLogger("retention")
STEPS = ("states", "search", "row")
"""The processes of a row, in their order: states and their similarity, the search, and everything else. The results of
the first two are on disk."""
TASKS = {"piqa": 500, "arc_easy": 500, "hellaswag": 500, "lambada_openai": 500, "openbookqa": 500, "copa": 100}
"""Task -> items."""
ONCE = {"epochs": 1, "kl_weight": 0.8}
FULL = {**ONCE, "positions": text.LENGTH}
"""Options of the training: one epoch, with a fifth of cross-entropy in the loss; the same with all positions."""
CLOSED = {"search": {"rare_rank": 0.33, "rare_trained": False}, "block": {"rare_price": 1.0}}
"""Options with rows of rare tokens in closed form, whose losses count once."""


def head(**training: float) -> Variant:
    """`kdp_narrow_head`, with other options of its training."""
    return Variant("kdp_narrow", 3, {"search": {"rare_rank": 0.33}, "compose": {**FULL, "heldout": 0.02, **training}})


VARIANTS: dict[str, Variant] = {
    "kdp_narrow": Variant("kdp_narrow", 3, {"compose": ONCE}),
    "kdp_narrow_additive": Variant("kdp_narrow", 3, {"block": {"attention_price": 1.0}, "compose": ONCE}),
    "kdp_narrow_rare": Variant("kdp_narrow", 3, {**CLOSED, "compose": ONCE}),
    "kdp_narrow_full": Variant("kdp_narrow", 3, {**CLOSED, "compose": FULL}),
    "kdp_narrow_head": head(),
    "kdp_narrow_kl": head(kl_weight=1.0, lr=1.5e-4),
    "kdp_narrow_ce50": head(kl_weight=0.5),
    "kdp_narrow_ce80": head(kl_weight=0.2),
    "kdp_narrow_all": Variant("kdp_narrow", 3, {"compose": {**ONCE, "trained": "all", "lr": 1e-4}}),
    "kdp_narrow_closed": Variant("kdp_narrow", 3, {"compose": {"epochs": 0}}),
    "kdp_narrow_kept": Variant("kdp_narrow", 3, {"search": {"solve": False}, "compose": {"epochs": 0, "solve": False}}),
    "kdp_residual": Variant("kdp_residual", protocol.FREE, RESIDUAL),
    "kdp_residual_cka": Variant("kdp_residual", protocol.FREE, {**RESIDUAL, "search": {"order": "cka"}}),
    "kdp": Variant("kdp", 3, KDP),
    **{name: Variant(name, 3, {"block": CKA}) for name in ("remove", "linear_prefix")},
    **{name: Variant(name, 3, {}) for name in (
        "sleb", "shortgpt", "llm_pruner", "shortened_taylor", "shortened_ppl", "slicegpt", "laco", "sliding_merge",
        "lorp", "replaceme_lstsq", "streamline", "joint_drop", "flap", "slimgpt")},
    "ziplm": Variant("ziplm", 3, {"compose": {"draws": 100}}),
}
"""Structured variants. `kdp_narrow_additive` does not raise the losses of attentions. `kdp_narrow_rare` also gives low
rank to the rows of rare tokens. `kdp_narrow_full` is the same, but its training compares the outputs at all positions.
In `kdp_narrow_head` these rows are also trained, and their losses count twice (the defaults). `kdp_narrow_kl` is the
same without cross-entropy, at half of the learning rate. In `kdp_narrow_ce50` and `kdp_narrow_ce80`, 50 and 80 % of the
training's loss are cross-entropy, in the other trained rows 20 %. `kdp_narrow_all` trains all matrices of its parts
(fine-tuned), `kdp_narrow_closed` none. `kdp_narrow_kept` keeps all weights. `kdp_residual_cka` needs no search. ZipLM's
paper has 1,000 draws."""
FT, LORA = protocol.FT["linear"], {"targets": "linear", "epochs": 1}
"""Suffix of the name of a fine-tuned variant, and the options of the fine-tuning: LoRA in all linear layers, on all
calibration sequences, for every variant alike."""
TUNED = ("kdp_narrow_all", *(name + FT for name in (
    "kdp_narrow", "kdp_residual", "shortgpt", "llm_pruner", "slicegpt", "streamline")))
"""Fine-tuned variants. They are measured only if --rows names them, and compared only with each other."""
MODELS = {"smollm2-135m": "config.yaml", "gemma3-270m": "configs/gemma.yaml"}
"""Name of a model -> the configuration file with its entry, relative to the project's root."""


class Dense(NamedTuple):
    """A dense model, and the data that are the same for all pruned versions of this model."""
    name: str
    setup: Setup
    heldout: dict[str, torch.Tensor]
    scores: dict[str, Any]


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
    """Fit, fold and score the model of one row, or do only an earlier step (`--alone states`, `--alone search`)."""
    row = row_path(dense.setup.folder, name, ratio, seed)
    at, variant = row.with_suffix(""), VARIANTS[tables.plain(name).removesuffix(FT)]
    checkpoint, sequences = at / "checkpoint", tables.sequences_of(name, options.sequences)
    about = {"model": dense.name, "method": name, "ratio": ratio, "seed": seed, "sequences": sequences}
    calibrated = protocol.calibrated(dense.setup, seed, lambda: text.calibration(
        dense.setup.dense, options.data, sequences, seed, dense.setup.facts.vocabulary),
        "" if sequences == options.sequences else f"-{sequences}")
    if options.alone == "states":
        return
    try:
        search = (protocol.searched(variant, dense.setup, calibrated).stats
                  if methods.method_of(variant.method).search else {})
        if options.alone == "search":
            return
        selection, search_seconds = protocol.chosen(variant, dense.setup, calibrated, ratio)
        plan, seconds, _ = protocol.fitted(variant, dense.setup, calibrated, selection)
        pruned = fold.fold(plan, dense.setup.dense, checkpoint)
    except protocol.REFUSALS as refusal:
        store.write_json(row, {**about, "refused": str(refusal)})
        return
    if name.endswith(FT):
        pruned, record = finetune.finetune(dense.setup.dense, checkpoint, at / "tuned", calibrated.tokens, pruned,
                                           **LORA)
        checkpoint, seconds = at / "tuned", seconds + record.seconds
    # JSON has null for a peak that the system did not tell; NaN stays the maximum
    peak = float(np.max([protocol.peak_gib(), *([search.get("peak_gib") or float("nan")] if search else [])]))
    speed = efficiency.measure(dense.setup.dense, checkpoint, tokens=text.LENGTH, decode_steps=16, repeats=5)
    found = score(checkpoint, dense.heldout, options.data, limits_of(options), at / "samples")
    group = "finetuned" if tables.plain(name) in TUNED else "structured"
    store.write_json(row, {**about, "group": group, "params_removed": pruned.params_removed,
                           "fit_seconds": seconds + search_seconds, "peak_gib": peak,
                           "speedup_prefill": speed.speedup_prefill, "speedup_decode": speed.speedup_decode, **found})
    shutil.rmtree(at)


def prepare(name: str, options: argparse.Namespace) -> Dense:
    """Make the dense model, its held-out text and its scores; results that are on disk are reused."""
    folder = options.out / "retention" / name
    config = yaml.safe_load((embedded.ROOT / MODELS[name]).read_text(encoding="utf-8"))
    default = embedded.default_config()
    checkpoint, facts = embedded.dense_model(folder, {**default, "models": {name: config["models"][name]}})
    heldout = text.heldout(checkpoint, options.data, default)
    path = folder / "dense.json"
    earlier = [row for row in options.earlier if row["model"] == name and not row["ratio"]]
    if not path.exists() and earlier:
        store.write_json(path, earlier[0])
    elif not path.exists():
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


def earlier_rows(path: Path | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of earlier runs. Only rows on the same items and on as much calibration text can be compared."""
    rows, limits = tables.read_rows(path) if path else [], limits_of(options)
    lost = {row["model"] for row in rows} - {row["model"] for row in rows if not row["ratio"]} - set(options.models)
    if lost:
        raise SystemExit(f"{path}: it has no row of the dense model {min(lost)}, so its pruned models cannot be "
                         "compared; name a file that an earlier run wrote, retention_rows.jsonl")
    for row in rows:
        pairs = [(f"{task} items", len(values), limits.get(task, 0))
                 for task, values in row.get("outcomes", {}).items()]
        wanted = tables.sequences_of(row["method"], options.sequences)
        pairs += [("calibration sequences", row.get("sequences", wanted), wanted)]
        for what, own, here in pairs:
            if own != here:
                raise SystemExit(f"{path}: {row['model']}, {row['method']} was measured on {own} {what}, and this run "
                                 f"has {here}; set --items and --sequences to the same numbers, or name another file")
    return rows


def rows_of(dense: Dense, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of a model, by method: those on disk, and those of earlier runs."""
    own = [store.read_json(path) for path in sorted((dense.setup.folder / "rows").glob("*.json"))]
    known = {tables.key_of(row) for row in own}
    return sorted(own + [row for row in options.earlier if row["model"] == dense.name and row["ratio"]
                         and tables.key_of(row) not in known], key=tables.key_of)


def write_tables(denses: Sequence[Dense], options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the tables and the file of all rows. Models that only an earlier run measured are part of them."""
    measured = tables.by_model(options.earlier) | {
        dense.name: (dense.scores, rows_of(dense, options)) for dense in denses}
    tables.write_rows(options.out / "retention_rows.jsonl", [
        row for scores, rows in measured.values() for row in [scores, *rows]])
    return tables.write_tables(measured, options.out)


def left(dense: Dense, options: argparse.Namespace) -> list[tuple[str, float, int]]:
    """The rows that are not measured yet, in the order of seeds, ratios and methods."""
    known = {tables.key_of(row) for row in rows_of(dense, options)}
    return [(name, ratio, seed) for seed in options.seeds for ratio in options.ratios for name in options.rows
            if (name, ratio, seed) not in known]


def planned(denses: Sequence[Dense], options: argparse.Namespace) -> str:
    """The plan as a text for the user."""
    lines = []
    for dense in denses:
        tasks, todo = tables.counted_tasks(dense.scores), left(dense, options)
        known = [row for row in rows_of(dense, options) if "refused" not in row]
        fit = float(np.median([row["fit_seconds"] for row in known])) if known else 300.0
        hours = len(todo) * (fit + dense.scores["score_seconds"]) / 3600
        # if the outcomes of two models differ on a third of the items, the se of a task is sqrt(1 / 3 / n)
        error = 100 * sum(1 / 3 / len(dense.scores["outcomes"][task]) for task in tasks) ** 0.5 / max(1, len(tasks))
        items = {task: len(values) for task, values in dense.scores["outcomes"].items()}
        lines.append(f"{dense.name}: {len(todo)} rows to measure, about {hours:.1f} hours; {sum(items.values())} items "
                     f"of {len(items)} tasks, of which {len(tasks)} count ({' '.join(tasks)}); expected paired "
                     f"standard error of a difference of means {error:.1f} points")
    return "\n".join(lines)


def row_name(name: str) -> str:
    """The name of a row on the command line."""
    if tables.plain(name) not in (*VARIANTS, *TUNED):
        raise argparse.ArgumentTypeError(f"there is no row {name}; take one of {', '.join([*VARIANTS, *TUNED])}, or "
                                         "one with its own number of sequences, such as kdp_narrow@4000")
    return name


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real sets, with calib/ and eval/")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], choices=list(MODELS),
                        help="models (smollm2-135m)")
    structured = [name for name in VARIANTS if name not in TUNED]
    parser.add_argument("--rows", nargs="+", default=structured, type=row_name, metavar="ROW",
                        help=f"rows to measure, of {', '.join([*structured, *TUNED])} (all that are not fine-tuned), "
                             "also with their own number of sequences, such as kdp_narrow@4000")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.25, 0.3],
                        help="shares of all parameters to remove (0.1 0.2 0.25 0.3)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the calibration (0)")
    parser.add_argument("--sequences", type=int, default=1360,
                        help=f"calibration sequences of {text.LENGTH} tokens (1360)")
    parser.add_argument("--items", type=int, default=0, help="largest number of items of a task (0: as in TASKS)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--plan", action="store_true", help="print the plan and measure no row")
    parser.add_argument("--earlier", type=Path, metavar="FILE", help="retention_rows.jsonl of an earlier run: its rows "
                        "enter the tables, and none of them is measured again (none)")
    parser.add_argument("--alone", nargs="?", const=STEPS[-1], choices=STEPS, metavar="STEP",
                        help="measure in this process: whole rows (row), or only their states or searches")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    options = parser.parse_args(given)
    if not all((options.data / own).is_dir() for own in ("calib", "eval")):
        parser.error(f"--data {options.data}: it has no folders calib/ and eval/; name the folder of the real sets")
    options.earlier = earlier_rows(options.earlier, options)
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the plan, measure the rows that are not on disk, write the tables."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    denses = [prepare(name, options) for name in options.models]
    print(planned(denses, options))
    for dense in [] if options.plan else denses:
        for name, ratio, seed in left(dense, options):
            if options.alone:
                measure(name, ratio, seed, dense, options)
                continue
            words = [*(sys.argv[1:] if given is None else given), "--models", dense.name, "--rows", name, "--ratios",
                     f"{ratio:g}", "--seeds", str(seed)]
            # each step has a process of its own, as in the pipeline, so that its peak is measured alone
            for step in STEPS:
                subprocess.run([sys.executable, __file__, *words, "--alone", step], check=True,
                               stdout=subprocess.DEVNULL)
            write_tables(denses, options)
            logger.info("%s, ratio %g, seed %d: %s", dense.name, ratio, seed, name)
    frame, pairs = write_tables(denses, options)
    print(frame[[name for name in FIRST if name in frame]].to_string(index=False, float_format="%.4g"))
    print(pairs.to_string(index=False, float_format="%.3g"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
