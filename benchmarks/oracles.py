"""Selections of layers beside those that papers and their code published: `python benchmarks/oracles.py --help`.

For a machine that has one of the models, such as

    python benchmarks/oracles.py LLaMA-2-7B --model hf:meta-llama/Llama-2-7b-hf@main --text bookcorpus.txt \
        --device cuda --dtype float16

Every published choice of that model (kdp_core.study.oracles) is made again by our row on text of yours, one document a line;
the table says which share of the published layers it takes too and whether the order is the same. Without --text the
embedded news is read, which is not what any paper selected on.
"""
import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import protocol

from kdp_core.base import texts
from kdp_core.model import assets, checkpoints
from kdp_core.states import hidden, similarity
from kdp_core.study import oracles
from kdp_core.study.oracles import ORACLES

logger = logging.getLogger("oracles")


def documents(options: argparse.Namespace) -> list[str]:
    """Of the text given, or the embedded one."""
    if options.text:
        return texts.read_documents(options.text, format="lines", encoding="utf-8")
    config = protocol.default_config()
    return protocol.documents(next(iter(config["texts"])), config)


def check(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Make each published choice of the model again."""
    path = assets.fetch(options.model, sha256=None, cache=protocol.ROOT / protocol.default_config()["cache"])
    facts = checkpoints.convert(path, folder / "dense", dtype=options.dtype, source=options.model)
    tokens = texts.pack(checkpoints.load_tokenizer(folder / "dense"), [texts.Part("text", documents(options),
                                                                             options.sequences)],
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
                        help="the model that was published on")
    parser.add_argument("--model", required=True, help="where it is: a folder, or hf:organisation/name@revision")
    parser.add_argument("--text", type=Path, help="calibration text, one document a line, UTF-8")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence; ShortGPT, LLM-Drop: 2048 (128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=protocol.ROOT / "results/benchmarks/oracles.csv")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Check, write the table, print it."""
    options = arguments(given)
    with tempfile.TemporaryDirectory() as folder:
        frame = check(options, Path(folder))
    protocol.store.write_text(options.out, frame.to_csv(index=False, lineterminator="\n"))
    print(frame.to_string(index=False))
    return frame


if __name__ == "__main__":
    protocol.log_to_stderr()
    main()
