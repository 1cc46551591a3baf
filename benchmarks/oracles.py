"""Repeats published selections of layers and compares the results: `python benchmarks/oracles.py --help`.

Run this command on a machine that has one of the models, for example

    python benchmarks/oracles.py LLaMA-2-7B --model hf:meta-llama/Llama-2-7b-hf@main --text bookcorpus.txt \
        --device cuda --dtype float16

For every published choice of layers for this model (kdp_core.study.oracles), our implementation of the method selects
layers again. The calibration text has one document in each line. The table shows the share of the published layers that
our selection also removes, and whether the order of the layers is the same. Without --text, the command uses the
embedded news; no paper selected its layers on this text.
"""
import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import embedded
import pandas as pd

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.states import hidden, similarity
from kdp_core.study import oracles
from kdp_core.study.oracles import ORACLES

logger = logging.getLogger("oracles")


def documents(options: argparse.Namespace) -> list[str]:
    """The documents of --text, or the documents of the embedded text without this option."""
    if options.text:
        return texts.read_documents(options.text, format="lines", encoding="utf-8")
    config = embedded.default_config()
    return embedded.documents(next(iter(config["texts"])), config)


def check(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Repeat each published choice of layers of the model. The returned table has a row for each published choice."""
    path = embedded.fetch({"source": options.model, "sha256": None}, embedded.default_config())
    facts = checkpoints.convert(path, folder / "dense", dtype=options.dtype, source=options.model)
    tokens = texts.pack(checkpoints.load_tokenizer(folder / "dense"),
                        [texts.Part("text", documents(options), options.sequences)],
                        length=options.length, seed=options.seed, vocabulary=facts.vocabulary)
    where = {"device": options.device, "dtype": options.dtype}
    hidden.extract(checkpoints.load_model(folder / "dense", **where), tokens, folder / "hidden.zarr")
    states = hidden.read(folder / "hidden.zarr")
    alike = similarity.similarity(states, treatment="raw")
    rows = []
    for oracle in ORACLES:
        if oracle.model == options.name:
            chosen = oracles.choose(oracle, folder / "dense", states, tokens, alike, facts, **where)
            found = oracles.agreement(oracle, chosen)
            rows.append({"method": oracle.method, "source": oracle.source, "published": oracle.layers,
                         "ours": found.chosen, "shared": found.shared, "same_order": found.same_order})
            logger.info("%s, %s: %.2f shared", oracle.method, oracle.source, found.shared)
    return pd.DataFrame(rows)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(dict.fromkeys(oracle.model for oracle in ORACLES)),
                        help="the model of the published selections")
    parser.add_argument("--model", required=True, help="its source: a folder, or hf:organisation/name@revision")
    parser.add_argument("--text", type=Path, help="calibration text, one document a line, UTF-8 (the embedded news)")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences (128)")
    parser.add_argument("--length", type=int, default=128,
                        help="tokens of a sequence; ShortGPT and LLM-Drop use 2048 (128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration (0)")
    parser.add_argument("--device", default="cpu", help="device of the model (cpu)")
    parser.add_argument("--dtype", default="float32", help="precision of the model (float32)")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks/oracles.csv",
                        help="the table (results/benchmarks/oracles.csv)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Compare the selections, write the table and print it."""
    options = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        frame = check(options, Path(folder))
    store.write_text(options.out, frame.to_csv(index=False, lineterminator="\n"))
    print(frame.to_string(index=False))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
