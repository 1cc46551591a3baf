"""Common functions of the benchmarks that compare methods: they calibrate, search, fit and score a variant.

This module is not a command. quality.py and methods.py import it, so both measure on the same tokens, text and tasks.
"""
import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import pandas as pd
import torch

from kdp_core import methods
from kdp_core.base import store
from kdp_core.base.measurements import Scores
from kdp_core.base.records import ModelFacts, Plan, PrunedFacts, Search, Selection, Similarity, Tokens
from kdp_core.methods._judge import RankError
from kdp_core.methods._select import BlockError
from kdp_core.methods.kdp_residual.search import SearchError
from kdp_core.model import checkpoints
from kdp_core.prune import finetune
from kdp_core.prune.fold import FoldError
from kdp_core.results.summary import main_scores, retained
from kdp_core.score import efficiency, evaluate, tasks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.metrics import PRIMARY
from kdp_core.states import hidden, similarity
from kdp_core.states.block import FitError

logger = logging.getLogger("protocol")
FT = {"head": "+ft", "linear": "+lora"}
"""What fine-tuning changes (its option `targets`) -> suffix of the name of a fine-tuned variant."""
FIRST = ("method", "ratio", "seed", "ppl", "ppl_stderr", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
         "layers_removed", "fit_seconds", "search_seconds")
"""Names of the columns that come first in a table."""
OWN_TASKS = ["heldout_ppl", "heldout_lastword", "heldout_continuation"]
REAL = ("piqa", "arc_easy", "lambada_openai", "hellaswag")
"""The benchmarks with published data; the names of their columns begin with real_."""


class Variant(NamedTuple):
    """A method with the options of this comparison."""
    method: str
    k_max: int
    options: dict[str, dict[str, Any]]


CKA = {"apart": "removed"}
"""This option of the selection allows adjacent blocks. Without adjacent blocks, kdp cannot reach a ratio of 0.30 on the
embedded model."""
RESIDUAL = {"search": {"entries": 96}, "compose": {"entries": 96}}
KDP = {"block": CKA, "kernel": {"features": 1024, "epochs": 2, "batch_sequences": 16},
       "inverse": {"width": 1024, "epochs": 5}}
FREE = 30
"""K_max of kdp_residual. This K_max is at least the number of layers, so that any number of consecutive layers may be
removed."""


REFUSALS = (BlockError, FitError, FoldError, RankError, SearchError)
"""The errors by which a method refuses: it cannot prune the model, or it cannot reach the ratio. Any other error ends
the run."""


class Calibrated(NamedTuple):
    """The calibration tokens of one seed, and the states and the similarity that are computed from them."""
    folder: Path
    tokens: Tokens
    hidden: hidden.HiddenStates
    similarity: Similarity


class Setup(NamedTuple):
    """The data that all variants of a comparison share."""
    folder: Path
    dense: Path
    facts: ModelFacts
    config: dict[str, Any]
    judge: "Judge"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options of the command line that all comparisons of methods have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sequences", type=int, default=320, help="calibration sequences of 128 tokens (320)")
    parser.add_argument("--tune-on", type=int, default=160, help="calibration sequences to fine-tune on (160)")
    parser.add_argument("--tune-epochs", type=int, default=2, help="epochs of fine-tuning (2)")
    parser.add_argument("--tune-targets", choices=list(FT), default="head",
                        help="what fine-tuning changes: the output head, or all linear layers (head)")
    parser.add_argument("--items", type=int, default=64, help="items of each of the two held-out accuracy tasks (64)")
    parser.add_argument("--data", type=Path, help="folder of real benchmark sets, which are scored too (none)")
    parser.add_argument("--data-ratios", nargs="*", type=float, default=[0.25],
                        help="ratios at which the real sets are scored (0.25)")
    parser.add_argument("--data-limit", type=int, default=50, help="items of each real task (50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    return parser


def prepare(folder: Path, options: argparse.Namespace) -> Setup:
    """Make the dense model, the tasks and the dense model's scores, unless they are already on disk."""
    embedded.set_threads(options.threads)
    config = embedded.default_config()
    dense, facts = embedded.dense_model(folder, config)
    own = folder / "tasks"
    if not own.exists():
        tasks.write_tasks(embedded.documents("lee", config), own, lastword_items=options.items,
                          continuation_items=options.items)
    real = options.data if options.data and (options.data / "eval").is_dir() else None
    if not real and options.data_ratios:
        logger.warning("--data %s: there are no real benchmark sets, so only the held-out tasks are scored",
                       options.data)
    judge = Judge(own, real, options.data_limit)
    if not (folder / "dense.json").exists():
        store.write_json(folder / "dense.json", {
            "method": "dense", "ratio": 0.0, "seed": None, "params_removed": 0.0, "params": facts.params_total,
            "layers_removed": 0, "fit_seconds": 0.0, "search_seconds": 0.0, **judge.score(dense, bool(real))})
    return Setup(folder, dense, facts, config, judge)


def calibrate(setup: Setup, seed: int, sequences: int) -> Calibrated:
    """Make the tokens, states and similarity of one seed from the default calibration set."""
    return calibrated(setup, seed, lambda: embedded.calibration_tokens(
        setup.dense, setup.config, sequences=sequences, seed=seed, vocabulary=setup.facts.vocabulary))


def calibrated(setup: Setup, seed: int, pack: Callable[[], Tokens], end: str = "") -> Calibrated:
    """Make tokens, states and similarity for one calibration seed, unless they are on disk. `pack` makes the tokens,
    and `end` is the end of the folder's name."""
    at = setup.folder / f"seed{seed}{end}"
    tokens, states, alike = at / "tokens.safetensors", at / "hidden.zarr", at / "similarity.safetensors"
    if not alike.exists():
        store.write(tokens, pack())
        hidden.extract(checkpoints.load_model(setup.dense), store.read(tokens), states)
        store.write(alike, similarity.similarity(hidden.read(states)))
    return Calibrated(at, store.read(tokens), hidden.read(states), store.read(alike))


def searched(variant: Variant, setup: Setup, calibrated: Calibrated) -> Search:
    """The search of a variant, which orders the layers by the effect of their removal.

    The search is stored and reused for the same seed and options. Its stats also have the peak memory of the process
    after the search, `peak_gib`.
    """
    options = variant.options.get("search", {})
    name = "-".join([variant.method, f"k{variant.k_max}",
                     *(f"{key}_{value}" for key, value in sorted(options.items()))])
    path = calibrated.folder / f"search-{name}.json"
    if not path.exists():
        search = methods.method_of(variant.method).search
        found = search(setup.dense, calibrated.hidden, calibrated.tokens, setup.facts, k_max=variant.k_max, **options)
        store.write(path, found._replace(stats=found.stats | {"peak_gib": peak_gib()}))
    return store.read(path)


def peak_gib() -> float:
    """Peak resident memory of this process, in GiB; NaN where the system does not tell it."""
    return (efficiency.resident_mib("VmHWM") or float("nan")) / 1024


def chosen(variant: Variant, setup: Setup, calibrated: Calibrated, ratio: float) -> tuple[Selection, float]:
    """Select the blocks of a variant. Return the selection and the seconds of the search."""
    method, base, seconds = methods.method_of(variant.method), calibrated.similarity, 0.0
    size = method.module_params(setup.facts, variant.options)
    if method.search:
        base = searched(variant, setup, calibrated)
        seconds = base.stats["seconds"]
    return method.select(base, setup.facts, ratio=ratio, k_max=variant.k_max, module_params=size,
                         **variant.options.get("block", {})), seconds


def fitted(variant: Variant, setup: Setup, calibrated: Calibrated,
           selection: Selection) -> tuple[Plan, float, float | None]:
    """Fit a variant.

    Return the plan, the seconds of the fit, and the held-out divergence after joint training. Without joint training,
    the divergence is None.
    """
    name, options = variant.method, variant.options
    method = methods.method_of(name)
    if method.compose:
        composed = method.compose(setup.dense, calibrated.hidden, calibrated.tokens, selection,
                                  **options.get("compose", {}))
        return (methods.whole(name, selection, composed), composed.stats["seconds"],
                composed.stats.get("heldout_kl"))
    records: dict[Any, list[Any]] = {}
    for block in selection.blocks:
        records[block] = []
        for step in method.steps:
            path = calibrated.folder / name / f"{block[0]}-{block[1]}-{step}.safetensors"
            if not path.exists():
                known = {"model_layers": setup.facts.layers} if step == "kernel" else {}
                store.write(path, methods.fit_step(name, step, calibrated.hidden, block, records[block], **known,
                                                   **options.get(step, {})))
            records[block].append(store.read(path))
    seconds = sum(record.stats["seconds"] for of_block in records.values() for record in of_block)
    return methods.plan(name, selection, records), seconds, None


def tuned(setup: Setup, calibrated: Calibrated, pruned: PrunedFacts, at: Path,
          options: argparse.Namespace) -> tuple[PrunedFacts, float]:
    """Fine-tune at/checkpoint and write the result to at/tuned.

    Return the facts of the fine-tuned model, and the seconds of fine-tuning.
    """
    after, record = finetune.finetune(setup.dense, at / "checkpoint", at / "tuned",
                                      sample(calibrated.tokens, options.tune_on), pruned, epochs=options.tune_epochs,
                                      targets=options.tune_targets)
    return after, record.seconds


def sample(tokens: Tokens, sequences: int) -> Tokens:
    """The first sequences, which are a random sample, because sequences are stored in random order."""
    return tokens._replace(ids_ST=tokens.ids_ST[:sequences], sources=tokens.sources[:sequences])


class Judge(NamedTuple):
    """The tasks on which a checkpoint is scored."""
    folder: Path
    data: Path | None
    """Folder of the real benchmark sets; None without them."""
    limit: int

    def score(self, checkpoint: Path, real: bool) -> dict[str, Any]:
        """Score a checkpoint; return perplexity and accuracies as columns of a table.

        With `real`, the real benchmarks are scored too.
        """
        chosen = Chosen(REAL, data=str(self.data), limit=self.limit) if real and self.data else None
        found = evaluate.evaluate(checkpoint, tasks=OWN_TASKS, chosen=chosen, task_folders=[self.folder], batch_size=8)
        own = found._replace(scores=[score for score in found.scores if score.task in OWN_TASKS])
        others = [score._replace(task=f"real_{score.task}") for score in found.scores if score.task not in OWN_TASKS]
        return flat(own, "") | (flat(found._replace(scores=others), "real_") if others else {})


def flat(scores: Scores, prefix: str) -> dict[str, Any]:
    """The scores as columns: the mean accuracy with its standard error, each accuracy, and the perplexity if it was
    measured. Accuracies are in percent."""
    accuracies = list(main_scores(scores.scores, PRIMARY["acc"]).values())
    accuracies = [score for score in accuracies if score.metric.startswith("acc")]
    found: dict[str, Any] = {
        f"{prefix}acc": 100 * sum(score.value for score in accuracies) / len(accuracies),
        # the tasks have different items, so their errors are independent, and the squares of the errors are added
        f"{prefix}acc_stderr": 100 * sum((score.stderr or 0.0) ** 2 for score in accuracies) ** 0.5 / len(accuracies)}
    found |= {score.task: 100 * score.value for score in accuracies}
    found |= {name: value for score in scores.scores if score.task == "heldout_ppl" and score.metric == "ppl"
              for name, value in (("ppl", score.value), ("ppl_stderr", score.stderr))}
    return found


def counted(pruned: PrunedFacts) -> dict[str, Any]:
    """Columns for a pruned model: the parameters and layers that were removed, and the parameters that remain."""
    return {"params_removed": pruned.params_removed, "params": pruned.params_after,
            "layers_removed": pruned.layers_removed}


def row_path(at: Path, end: str = "") -> Path:
    """The file that stores a row of the table; `at` is the folder in which the variant is made."""
    return at.with_name(f"{at.name}{end}.json")




def table(folder: Path, path: Path, names: Sequence[str]) -> pd.DataFrame:
    """Write a CSV file with the row of the dense model and all rows that are on disk.

    The rows of the CSV file are sorted by ratio, and then in the order of `names`.
    """
    dense = store.read_json(folder / "dense.json")
    rows = [store.read_json(row) for row in sorted((folder / "rows").glob("*.json"))]
    frame = pd.DataFrame([dense, *rows])
    frame["ppl_ratio"] = frame["ppl"] / dense["ppl"]
    for kind in ("", "real_"):
        if f"{kind}acc" in dense:
            frame[f"{kind}rp"] = [retained(acc, dense[f"{kind}acc"]) for acc in frame[f"{kind}acc"]]
    order = {name: place for place, name in enumerate(["dense", *[n + t for n in names for t in ("", *FT.values())]])}
    frame = frame.sort_values(["ratio", "method", "seed"], key=lambda column: column.map(order)
                              if column.name == "method" else column, na_position="first")
    frame = frame[[*FIRST, *sorted(set(frame) - set(FIRST))]]
    store.write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    return frame
