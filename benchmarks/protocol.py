"""What the comparisons of methods share: the embedded model, calibration by seed, a row's search and fit, its scores.

Not a command: quality.py and methods.py import it, so that both measure on the same tokens, text and tasks.
"""
import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml

from kdp_core import methods
from kdp_core.base import store, texts
from kdp_core.base.measurements import Scores
from kdp_core.base.records import ModelFacts, PrunedFacts, Search, Selection, Similarity, Tokens
from kdp_core.model import assets, checkpoints
from kdp_core.results.summary import main_scores, retained
from kdp_core.score import evaluate, tasks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.metrics import PRIMARY
from kdp_core.states import hidden, similarity

logger = logging.getLogger("protocol")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FT = "+ft"
FIRST = ("method", "ratio", "seed", "ppl", "ppl_stderr", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
         "layers_removed", "fit_seconds", "search_seconds")
"""Columns that stand first in a table."""
OWN_TASKS = ["heldout_ppl", "heldout_lastword", "heldout_continuation"]
REAL = ("piqa", "arc_easy", "lambada_openai", "hellaswag")
"""Benchmarks; their columns begin with real_."""


class Row(NamedTuple):
    """A method of the table with the options of this comparison."""
    method: str
    k_max: int
    options: dict[str, dict[str, Any]]


CKA = {"apart": "removed"}
"""Blocks may touch: otherwise kdp cannot reach 0.30 on the embedded model."""
RESIDUAL = {"search": {"entries": 96}, "compose": {"entries": 96}}
KDP = {"block": CKA, "kernel": {"features": 1024, "epochs": 2, "batch_sequences": 16},
       "inverse": {"width": 1024, "epochs": 5}}
FREE = 30
"""K_max of kdp_residual: any number of consecutive layers may go."""


class Calibrated(NamedTuple):
    """All that a calibration seed gives."""
    folder: Path
    tokens: Tokens
    hidden: hidden.HiddenStates
    similarity: Similarity


class Ground(NamedTuple):
    """What every row stands on."""
    folder: Path
    dense: Path
    facts: ModelFacts
    config: dict[str, Any]
    judge: "Judge"


def arguments(description: str) -> argparse.ArgumentParser:
    """The part of the command line that the comparisons share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sequences", type=int, default=320, help="calibration sequences of 128 tokens (320)")
    parser.add_argument("--tune-on", type=int, default=160, help="of them, for fine-tuning (160)")
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--items", type=int, default=64, help="of each of the two held-out accuracy tasks (64)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of real benchmark sets")
    parser.add_argument("--data-ratios", nargs="*", type=float, default=[0.25])
    parser.add_argument("--data-limit", type=int, default=50, help="items of each real task (50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks")
    return parser


def log_to_stderr() -> None:
    """What the library logs, without the harness's own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def prepare(folder: Path, options: argparse.Namespace) -> Ground:
    """Model, tasks and the dense model's scores, each made once."""
    torch.set_num_threads(options.threads)
    config = default_config()
    dense, facts = dense_model(folder, config)
    own = folder / "tasks"
    if not own.exists():
        tasks.write_tasks(documents("lee", config), own, lastword_items=options.items,
                          continuation_items=options.items)
    real = options.data if (options.data / "eval").is_dir() else None
    if not real and options.data_ratios:
        logger.warning("no real benchmark sets in %s: only the held-out tasks are scored", options.data)
    judge = Judge(own, real, options.data_limit)
    if not (folder / "dense.json").exists():
        store.write_json(folder / "dense.json", {
            "method": "dense", "ratio": 0.0, "seed": None, "params_removed": 0.0, "params": facts.params_total,
            "layers_removed": 0, "fit_seconds": 0.0, "search_seconds": 0.0, **judge.score(dense, bool(real))})
    return Ground(folder, dense, facts, config, judge)


def default_config() -> dict[str, Any]:
    """That of the embedded model and texts."""
    return yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def dense_model(folder: Path, config: dict[str, Any]) -> tuple[Path, ModelFacts]:
    """The embedded model, converted once."""
    checkpoint, facts = folder / "dense", folder / "facts.json"
    if not facts.exists():
        entry = next(iter(config["models"].values()))
        path = assets.fetch(entry["source"], sha256=entry["sha256"], cache=ROOT / config["cache"])
        store.write(facts, checkpoints.convert(path, checkpoint, dtype="float32", source=entry["source"]))
    return checkpoint, store.read(facts)


def documents(name: str, config: dict[str, Any]) -> list[str]:
    """One of the embedded texts."""
    entry = config["texts"][name]
    path = assets.fetch(entry["source"], sha256=entry["sha256"], cache=ROOT / config["cache"])
    return texts.read_documents(path, format=entry["format"], encoding=entry["encoding"])


def calibrate(ground: Ground, seed: int, sequences: int) -> Calibrated:
    """Tokens, states and similarity of one seed, made once."""
    dense, config = ground.dense, ground.config
    calibration = next(iter(config["calibrations"].values()))
    (name,) = calibration["mix"]
    at = ground.folder / f"seed{seed}"
    tokens, states, alike = at / "tokens.safetensors", at / "hidden.zarr", at / "similarity.safetensors"
    if not alike.exists():
        packed = texts.pack(checkpoints.load_tokenizer(dense), [texts.Part(name, documents(name, config), sequences)],
                            length=calibration["length"], seed=seed, vocabulary=ground.facts.vocabulary)
        store.write(tokens, packed)
        hidden.extract(checkpoints.load_model(dense), packed, states)
        store.write(alike, similarity.similarity(hidden.read(states)))
    return Calibrated(at, store.read(tokens), hidden.read(states), store.read(alike))


def searched(row: Row, ground: Ground, made: Calibrated) -> Search:
    """The order of layers, made once a seed and set of options."""
    options = row.options.get("search", {})
    name = "-".join([row.method, f"k{row.k_max}", *(f"{key}_{value}" for key, value in sorted(options.items()))])
    path = made.folder / f"search-{name}.json"
    if not path.exists():
        store.write(path, methods.method_of(row.method).search(ground.dense, made.hidden, made.tokens, ground.facts,
                                                               k_max=row.k_max, **options))
    return store.read(path)


def chosen(row: Row, ground: Ground, made: Calibrated, ratio: float) -> tuple[Selection, float]:
    """The blocks of a row, and the seconds of its search."""
    method, base, seconds = methods.method_of(row.method), made.similarity, 0.0
    size = method.module_params(ground.facts, row.options)
    if method.search:
        base = searched(row, ground, made)
        seconds = base.stats["seconds"]
    return method.select(base, ground.facts, ratio=ratio, k_max=row.k_max, module_params=size,
                         **row.options.get("block", {})), seconds


def fitted(row: Row, ground: Ground, made: Calibrated, selection: Selection) -> tuple[Any, float, float | None]:
    """The plan of a row, the seconds of its fit, and the held-out divergence of joint training where there is one."""
    method = methods.method_of(row.method)
    if method.compose:
        composed = method.compose(ground.dense, made.hidden, made.tokens, selection, **row.options.get("compose", {}))
        return (methods.whole(row.method, selection, composed), composed.stats["seconds"],
                composed.stats.get("heldout_kl"))
    records: dict[Any, list[Any]] = {}
    for block in selection.blocks:
        records[block] = []
        for step in method.steps:
            path = made.folder / row.method / f"{block[0]}-{block[1]}-{step}.safetensors"
            if not path.exists():
                known = {"model_layers": ground.facts.layers} if step == "kernel" else {}
                store.write(path, methods.fit_step(row.method, step, made.hidden, block, records[block], **known,
                                                   **row.options.get(step, {})))
            records[block].append(store.read(path))
    seconds = sum(record.stats["seconds"] for of_block in records.values() for record in of_block)
    return methods.plan(row.method, selection, records), seconds, None


class Judge(NamedTuple):
    """What a checkpoint is scored on."""
    folder: Path
    data: Path | None
    """Of the real benchmark sets; None without them."""
    limit: int

    def score(self, checkpoint: Path, real: bool) -> dict[str, Any]:
        """Perplexity and accuracies, flat."""
        chosen = Chosen(REAL, data=str(self.data), limit=self.limit) if real and self.data else None
        found = evaluate.evaluate(checkpoint, tasks=OWN_TASKS, chosen=chosen, task_folders=[self.folder], batch_size=8)
        own = found._replace(scores=[score for score in found.scores if score.task in OWN_TASKS])
        others = [score._replace(task=f"real_{score.task}") for score in found.scores if score.task not in OWN_TASKS]
        return flat(own, "") | (flat(found._replace(scores=others), "real_") if others else {})


def flat(scores: Scores, prefix: str) -> dict[str, Any]:
    """Mean accuracy in percent with its standard error, each accuracy, and the perplexity where there is one."""
    accuracies = list(main_scores(scores.scores, PRIMARY["acc"]).values())
    accuracies = [score for score in accuracies if score.metric.startswith("acc")]
    found: dict[str, Any] = {
        f"{prefix}acc": 100 * sum(score.value for score in accuracies) / len(accuracies),
        # tasks are independent samples: errors of a mean add in squares
        f"{prefix}acc_stderr": 100 * sum((score.stderr or 0.0) ** 2 for score in accuracies) ** 0.5 / len(accuracies)}
    found |= {score.task: 100 * score.value for score in accuracies}
    found |= {name: value for score in scores.scores if score.task == "heldout_ppl" and score.metric == "ppl"
              for name, value in (("ppl", score.value), ("ppl_stderr", score.stderr))}
    return found


def counted(pruned: PrunedFacts) -> dict[str, Any]:
    """What a row removed."""
    return {"params_removed": pruned.params_removed, "params": pruned.params_after,
            "layers_removed": pruned.layers_removed}


def sample(tokens: Tokens, sequences: int) -> Tokens:
    """The first sequences, which are in random order."""
    return tokens._replace(ids_ST=tokens.ids_ST[:sequences], sources=tokens.sources[:sequences])


def table(folder: Path, path: Path, names: Sequence[str]) -> pd.DataFrame:
    """All rows on disk beside the dense model, written as CSV; `names` gives the order of the methods."""
    dense = store.read_json(folder / "dense.json")
    rows = [store.read_json(row) for row in sorted((folder / "rows").glob("*.json"))]
    frame = pd.DataFrame([dense, *rows])
    frame["ppl_ratio"] = frame["ppl"] / dense["ppl"]
    for kind in ("", "real_"):
        if f"{kind}acc" in dense:
            frame[f"{kind}rp"] = [retained(acc, dense[f"{kind}acc"]) for acc in frame[f"{kind}acc"]]
    order = {name: place for place, name in enumerate(["dense", *[n + t for n in names for t in ("", FT)]])}
    frame = frame.sort_values(["ratio", "method", "seed"], key=lambda column: column.map(order)
                              if column.name == "method" else column, na_position="first")
    frame = frame[[*FIRST, *sorted(set(frame) - set(FIRST))]]
    store.write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    return frame
