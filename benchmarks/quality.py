"""Which method keeps most of the model at the same share of parameters removed: `python benchmarks/quality.py`.

On the embedded model, for several ratios and calibration seeds: every row of ROWS fitted on the same calibration
tokens (news), folded, and scored on the same held-out news (perplexity, last words, continuations); beside each its
fine-tuned variant, marked `+ft`. Where a folder of real benchmark sets is at hand (--data), some of their tasks are
scored too, on the ratios of --data-ratios.

A row is written as soon as it is measured, to <out>/quality/, and never measured again: the run can be stopped, split
between processes by --seeds, --ratios or --methods, and gone on with. The table of all that is there is written each
time to <out>/quality.csv:
    ppl, ppl_stderr, ppl_ratio  held-out perplexity; beside the dense model's
    acc, acc_stderr, rp         mean accuracy of the held-out tasks, in percent; beside the dense model's
    params_removed              share of all parameters, what was put back counted
    fit_seconds, search_seconds fitting (fine-tuning counted), and ordering layers, of which one serves all ratios
"""
import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml

from kdp_core import assets, evaluate, finetune, fold, hidden, methods, models, similarity, store, tables, tasks, texts
from kdp_core.records import ModelFacts, PrunedFacts, Scores, Search, Selection, Similarity, Tokens

logger = logging.getLogger("quality")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FT = "+ft"
OWN_TASKS = ["heldout_ppl", "heldout_lastword", "heldout_continuation"]
REAL = {"piqa": ("piqa/piqa.yaml", "piqa_val", "validation"),
        "arc_easy": ("arc/arc_easy.yaml", "arc_easy_test", "test"),
        "lambada_openai": ("lambada/lambada_openai.yaml", "lambada_openai_test", "test"),
        "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag_val_text", "validation")}
"""Task -> lm-eval's own file, data file in <data>/eval, split."""


class Row(NamedTuple):
    """A method of the table with the options of this comparison."""
    method: str
    k_max: int
    options: dict[str, dict[str, Any]]


CKA = {"apart": "removed"}  # blocks may touch: otherwise kdp cannot reach 0.30 on this model
RESIDUAL = {"search": {"entries": 96}, "compose": {"entries": 96}}
KDP = {"block": CKA, "kernel": {"features": 1024, "epochs": 2, "batch_sequences": 16},
       "inverse": {"width": 1024, "epochs": 5}}


def changed(**compose: Any) -> dict[str, dict[str, Any]]:
    """kdp_residual with some options of its fit changed; the layers stay those of kdp_residual."""
    return {**RESIDUAL, "compose": {**RESIDUAL["compose"], **compose}}


FREE = 30
"""K_max of kdp_residual: any number of consecutive layers may go."""
ROWS = {
    "remove": Row("remove", 3, {"block": CKA}),
    "linear": Row("linear", 3, {"block": CKA}),
    "linear_prefix": Row("linear_prefix", 3, {"block": CKA}),
    "replaceme_lstsq": Row("replaceme_lstsq", 3, {}),
    "replaceme_masked": Row("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "replaceme_after_sink": Row("replaceme_lstsq", 3, {"compose": {"massive": "mask"}}),
    "kdp": Row("kdp", 3, KDP),
    "kdp_residual": Row("kdp_residual", FREE, RESIDUAL),
    # what each part of kdp_residual is worth
    "closed_form": Row("kdp_residual", FREE, changed(epochs=0)),
    "dense_states": Row("kdp_residual", FREE, changed(epochs=0, prefix=False)),
    "linear_only": Row("kdp_residual", FREE, changed(epochs=0, dictionary="none")),
    "linear_trained": Row("kdp_residual", FREE, changed(dictionary="none")),
    "random_features": Row("kdp_residual", FREE, changed(epochs=0, dictionary="rff", entries=149)),
    "random_trained": Row("kdp_residual", FREE, changed(dictionary="rff", entries=149)),
    "unweighted": Row("kdp_residual", FREE, changed(epochs=0, token_weight="none")),
    "outputs_alone": Row("kdp_residual", FREE, changed(kl_weight=1.0)),
    "cka_layers": Row("kdp_residual", FREE, RESIDUAL),
}
"""`replaceme_after_sink`: its run moved to start at layer 12, since layer 11 writes this model's massive activations.
`random_*`: as many parameters as 96 neurons. `cka_layers`: single layers by CKA of their two states."""
MAIN = ("remove", "linear", "linear_prefix", "replaceme_lstsq", "kdp", "kdp_residual")


class Calibrated(NamedTuple):
    """All that a calibration seed gives."""
    folder: Path
    tokens: Tokens
    hidden: hidden.HiddenStates
    similarity: Similarity


def dense_model(folder: Path, config: dict[str, Any]) -> tuple[Path, ModelFacts]:
    """The embedded model, converted once."""
    checkpoint, facts = folder / "dense", folder / "facts.json"
    if not facts.exists():
        entry = next(iter(config["models"].values()))
        path = assets.fetch(entry["source"], sha256=entry["sha256"], cache=ROOT / config["cache"])
        store.write(facts, models.convert(path, checkpoint, dtype="float32", source=entry["source"]))
    return checkpoint, store.read(facts)


def documents(name: str, config: dict[str, Any]) -> list[str]:
    """One of the embedded texts."""
    entry = config["texts"][name]
    path = assets.fetch(entry["source"], sha256=entry["sha256"], cache=ROOT / config["cache"])
    return texts.read_documents(path, format=entry["format"], encoding=entry["encoding"])


def calibrate(folder: Path, dense: Path, facts: ModelFacts, config: dict[str, Any], seed: int,
              sequences: int) -> Calibrated:
    """Tokens, states and similarity of one seed, made once."""
    calibration = next(iter(config["calibrations"].values()))
    (name,) = calibration["mix"]
    at = folder / f"seed{seed}"
    tokens, states, alike = at / "tokens.safetensors", at / "hidden.zarr", at / "similarity.safetensors"
    if not alike.exists():
        packed = texts.pack(models.load_tokenizer(dense), [texts.Part(name, documents(name, config), sequences)],
                            length=calibration["length"], seed=seed, vocabulary=facts.vocabulary)
        store.write(tokens, packed)
        hidden.extract(models.load_model(dense), packed, states)
        store.write(alike, similarity.similarity(hidden.read(states)))
    return Calibrated(at, store.read(tokens), hidden.read(states), store.read(alike))


def searched(row: Row, dense: Path, made: Calibrated, facts: ModelFacts) -> Search:
    """The order of layers, made once a seed and set of options."""
    options = row.options.get("search", {})
    path = made.folder / f"search-k{row.k_max}-{options.get('entries', 96)}.json"
    if not path.exists():
        store.write(path, methods.method_of(row.method).search(dense, made.hidden, made.tokens, facts,
                                                                   k_max=row.k_max, **options))
    return store.read(path)


def chosen(name: str, row: Row, dense: Path, made: Calibrated, facts: ModelFacts,
           ratio: float) -> tuple[Selection, float]:
    """The blocks of a row, and the seconds of the search."""
    method, base, seconds = methods.method_of(row.method), made.similarity, 0.0
    size = method.module_params(facts, row.options)
    if name == "replaceme_after_sink":
        (start, stop), = chosen("replaceme_lstsq", row, dense, made, facts, ratio)[0].blocks
        return Selection([(12, 12 + stop - start)], [], "given", ratio, ratio, ratio, row.k_max, [],
                         stop - start), 0.0
    if name == "cka_layers":
        # K_max = 2 removes single layers; touching contexts, as the search allows
        return methods.method_of("linear").select(base, facts, ratio=ratio, k_max=2, module_params=size, **CKA), 0.0
    if method.search:
        base = searched(row, dense, made, facts)
        seconds = base.stats["seconds"]
    return method.select(base, facts, ratio=ratio, k_max=row.k_max, module_params=size,
                         **row.options.get("block", {})), seconds


def fitted(row: Row, dense: Path, made: Calibrated, facts: ModelFacts,
           selection: Selection) -> tuple[Any, float, float | None]:
    """The plan of a row, the seconds of its fit, and the held-out divergence of joint training where there is one."""
    method = methods.method_of(row.method)
    if method.compose:
        composed = method.compose(dense, made.hidden, made.tokens, selection, **row.options.get("compose", {}))
        return (methods.whole(row.method, selection, composed), composed.stats["seconds"],
                composed.stats.get("heldout_kl"))
    records: dict[Any, list[Any]] = {}
    for block in selection.blocks:
        records[block] = []
        for step in method.steps:
            path = made.folder / row.method / f"{block[0]}-{block[1]}-{step}.safetensors"
            if not path.exists():
                known = {"model_layers": facts.layers} if step == "kernel" else {}
                store.write(path, methods.fit_step(row.method, step, made.hidden, block, records[block], **known,
                                                   **row.options.get(step, {})))
            records[block].append(store.read(path))
    seconds = sum(record.stats["seconds"] for of_block in records.values() for record in of_block)
    return methods.plan(row.method, selection, records), seconds, None


def local_tasks(data: Path, folder: Path) -> list[str]:
    """lm-eval's own tasks on local files; their names."""
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    for name, (include, file, split) in REAL.items():
        entry = {"include": str(stock / include), "task": f"real_{name}", "dataset_path": "json", "dataset_name": None,
                 "dataset_kwargs": {"data_files": {split: str(data / "eval" / f"{file}.jsonl")}},
                 "training_split": None, "validation_split": split if split == "validation" else None,
                 "test_split": split if split == "test" else None}
        if name == "hellaswag":
            # these rows are as the task's own preprocessing leaves them
            entry |= {"process_docs": None, "doc_to_target": "gold"}
        store.write_text(folder / f"real_{name}.yaml", yaml.safe_dump(entry))
    return [f"real_{name}" for name in REAL]


class Judge(NamedTuple):
    """What a checkpoint is scored on."""
    folder: Path
    real: list[str]
    limit: int

    def score(self, checkpoint: Path, real: bool) -> dict[str, Any]:
        """Perplexity and accuracies, flat."""
        scores = evaluate.evaluate(checkpoint, tasks=OWN_TASKS, task_folders=[self.folder], batch_size=8)
        found = flat(scores, "")
        if real and self.real:
            found |= flat(evaluate.evaluate(checkpoint, tasks=self.real, task_folders=[self.folder], batch_size=8,
                                            limit=self.limit), "real_")
        return found


def flat(scores: Scores, prefix: str) -> dict[str, Any]:
    """Mean accuracy in percent with its standard error, each accuracy, and the perplexity where there is one."""
    accuracies = evaluate.primary(scores)
    accuracies = [score for score in accuracies if score.metric.startswith("acc")]
    found: dict[str, Any] = {
        f"{prefix}acc": 100 * sum(score.value for score in accuracies) / len(accuracies),
        # tasks are independent samples: errors of a mean add in squares
        f"{prefix}acc_stderr": 100 * sum((score.stderr or 0.0) ** 2 for score in accuracies) ** 0.5 / len(accuracies)}
    found |= {score.task: 100 * score.value for score in accuracies}
    found |= {name: value for score in scores.scores if score.task == "heldout_ppl" and score.metric == "ppl"
              for name, value in (("ppl", score.value), ("ppl_stderr", score.stderr))}
    return found


def measure(name: str, ratio: float, seed: int, dense: Path, facts: ModelFacts, made: Calibrated, judge: Judge,
            options: argparse.Namespace) -> None:
    """Fit, fold and score one row and its fine-tuned variant; what is on disk already is not measured again."""
    row, at = ROWS[name], options.out / "quality" / "rows" / f"seed{seed}-{name}-r{ratio:g}"
    real = ratio in options.data_ratios
    wanted = [at.with_name(at.name + ".json")]
    tune = name in options.tuned and seed in options.tuned_seeds
    if tune:
        wanted.append(at.with_name(at.name + FT + ".json"))
    if all(path.exists() for path in wanted):
        return
    selection, search_seconds = chosen(name, row, dense, made, facts, ratio)
    plan, seconds, kl = fitted(row, dense, made, facts, selection)
    pruned = fold.fold(plan, dense, at / "checkpoint")
    about = {"ratio": ratio, "seed": seed, "search_seconds": search_seconds,
             "blocks": " ".join(f"{start}-{stop}" for start, stop in selection.blocks)}
    if not wanted[0].exists():
        store.write_json(wanted[0], {"method": name, **about, **counted(pruned), "fit_seconds": seconds,
                                     "heldout_kl": kl, **judge.score(at / "checkpoint", real)})
    if tune:
        after, record = finetune.finetune(dense, at / "checkpoint", at / "tuned", sample(made.tokens, options.tune_on),
                                          pruned, epochs=options.tune_epochs)
        store.write_json(wanted[1], {"method": name + FT, **about, **counted(after),
                                     "fit_seconds": seconds + record.seconds, "heldout_kl": None,
                                     **judge.score(at / "tuned", real)})
    shutil.rmtree(at)


def counted(pruned: PrunedFacts) -> dict[str, Any]:
    """What a row removed."""
    return {"params_removed": pruned.params_removed, "params": pruned.params_after,
            "layers_removed": pruned.layers_removed}


def sample(tokens: Tokens, sequences: int) -> Tokens:
    """The first sequences, which are in random order."""
    return tokens._replace(ids_ST=tokens.ids_ST[:sequences], sources=tokens.sources[:sequences])


def table(out: Path) -> pd.DataFrame:
    """All rows on disk beside the dense model, written as quality.csv."""
    dense = store.read_json(out / "quality" / "dense.json")
    rows = [store.read_json(path) for path in sorted((out / "quality" / "rows").glob("*.json"))]
    frame = pd.DataFrame([dense, *rows])
    frame["ppl_ratio"] = frame["ppl"] / dense["ppl"]
    for kind in ("", "real_"):
        if f"{kind}acc" in dense:
            frame[f"{kind}rp"] = [tables.retained(acc, dense[f"{kind}acc"]) for acc in frame[f"{kind}acc"]]
    first = ["method", "ratio", "seed", "ppl", "ppl_stderr", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
             "layers_removed", "fit_seconds", "search_seconds"]
    order = {name: place for place, name in enumerate(["dense", *[n + t for n in ROWS for t in ("", FT)]])}
    frame = frame.sort_values(["ratio", "method", "seed"], key=lambda column: column.map(order)
                              if column.name == "method" else column, na_position="first")
    frame = frame[[*first, *sorted(set(frame) - set(first))]]
    store.write_text(out / "quality.csv", frame.to_csv(index=False, lineterminator="\n"))
    return frame


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(MAIN), choices=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (those of the table of methods)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.25, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--tuned", nargs="*", default=list(MAIN), help="rows that get a fine-tuned variant too")
    parser.add_argument("--tuned-seeds", nargs="*", type=int, default=[0, 1, 2], help="and for which seeds")
    parser.add_argument("--sequences", type=int, default=320, help="calibration sequences of 128 tokens (320)")
    parser.add_argument("--tune-on", type=int, default=160, help="of them, for fine-tuning (160)")
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--items", type=int, default=64, help="of each of the two held-out accuracy tasks (64)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of real benchmark sets")
    parser.add_argument("--data-ratios", nargs="*", type=float, default=[0.25])
    parser.add_argument("--data-limit", type=int, default=50, help="items of each real task (50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not there yet, write the table, print it."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    folder = options.out / "quality"
    dense, facts = dense_model(folder, config)
    own = folder / "tasks"
    if not own.exists():
        tasks.write_tasks(documents("lee", config), own, lastword_items=options.items,
                          continuation_items=options.items)
    real = local_tasks(options.data, own) if (options.data / "eval").is_dir() else []
    if not real and options.data_ratios:
        logger.warning("no real benchmark sets in %s: only the held-out tasks are scored", options.data)
    judge = Judge(own, real, options.data_limit)
    if not (folder / "dense.json").exists():
        store.write_json(folder / "dense.json", {
            "method": "dense", "ratio": 0.0, "seed": None, "params_removed": 0.0, "params": facts.params_total,
            "layers_removed": 0, "fit_seconds": 0.0, "search_seconds": 0.0, **judge.score(dense, bool(real))})
    for ratio in options.ratios:
        for seed in options.seeds:
            made = calibrate(folder, dense, facts, config, seed, options.sequences)
            for name in options.methods:
                measure(name, ratio, seed, dense, facts, made, judge, options)
                frame = table(options.out)
                logger.info("seed %d, ratio %g: %s", seed, ratio, name)
    frame = table(options.out)
    print(frame[["method", "ratio", "seed", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed",
                 "fit_seconds"]].to_string(index=False, float_format="%.4g"))
    return frame


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    main()
