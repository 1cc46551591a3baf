"""Writes the tables and figures of docs/objectives.md: `python benchmarks/pages/objectives.py RECORD [RECORD ...]`.

A RECORD is the file results/{model}/{calibration}/agreement-r{ratio}.json of a run of configs/objectives.yaml. The
command makes these files from the records, one record for each model:
    docs/data/objectives.csv               a row for each search: layers, value, cost, held-out perplexity and accuracy
    docs/data/objectives_pairs.csv         Jaccard and Spearman of every two searches that differ in one thing
    docs/data/objectives_claims.csv        the claims with their intervals
    docs/images/objectives-*-{model}.png   the figures of the report
The tables of the page, between `<!-- NAME -->` and `<!-- end of NAME -->`, are made from the three CSV files.
"""
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from marked import written

from kdp_core.base import store
from kdp_core.base.measurements import Agreement
from kdp_core.figures import agreement as figures
from kdp_core.figures.style import save

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/data"
PAGE = ROOT / "docs/objectives.md"
IMAGES = ROOT / "docs/images"
NAMES = ("objectives", "objectives_pairs", "objectives_claims")


def frames(records: Mapping[str, Agreement]) -> dict[str, pd.DataFrame]:
    """Name of a CSV file of the page -> its data. `records` maps the name of a model to its record."""
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in NAMES}
    for model, record in records.items():
        rows = pd.DataFrame(record.rows).drop(columns=["single", "best_so_far"])
        rows["removed"] = [" ".join(map(str, removed)) for removed in rows["removed"]]
        rows = rows.assign(**{name: record.stats[name] for name in ("windows", "dense_nats", "dense_accuracy")})
        for name, frame in zip(NAMES, (rows, pd.DataFrame(record.pairs), pd.DataFrame(record.claims)), strict=True):
            frame.insert(0, "model", model)
            parts[name].append(frame)
    return {name: pd.concat(found, ignore_index=True) for name, found in parts.items()}


def table_searches(rows: pd.DataFrame) -> str:
    """A table with a row for each objective and search algorithm. Each cell summarises the draws of one model."""
    models = list(rows["model"].unique())
    lines = [" | ".join(["| objective", "search", *(f"{model}: {what}" for model in models for what in (
        "perplexity / dense", "accuracy (%)", "layer passes"))]) + " |",
             "|---|---" + "|---|---|---" * len(models) + "|"]
    for (objective, strategy), own in rows.groupby(["objective", "strategy"], sort=False):
        cells = [f"`{objective}`", f"`{strategy}`"]
        for model in models:
            here = own[own["model"] == model]
            cells += [spread(here["heldout_ppl_ratio"], ".2f"), spread(100 * here["heldout_accuracy"], ".0f"),
                      f"{here['passes'].mean():.0f}"] if len(here) else [""] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: pd.Series, form: str) -> str:
    """The median of the values, with the smallest and the largest value in brackets. Values from 100 have no decimals.
    """
    median, low, high = (f"{value:{form if value < 100 else ',.0f'}}" for value in (
        values.median(), values.min(), values.max()))
    return f"{median} ({low}–{high})"


def table_pairs(pairs: pd.DataFrame) -> str:
    """A table of pairs of searches. Pairs with the same description share one row, which summarises these pairs."""
    models = list(pairs["model"].unique())
    lines = [" | ".join(["| compared", *(f"{model}: {what}" for model in models for what in (
        "pairs", "Jaccard", "Spearman"))]) + " |", "|---" + "|---|---|---" * len(models) + "|"]
    words = [f"two draws, `{row.objective}` by `{row.strategy}`" if row.varies == "draw"
             else f"`{row.one}` and `{row.other}`, same draw" for row in pairs.itertuples()]
    for compared, own in pairs.groupby(words, sort=False):
        cells = [compared]
        for model in models:
            here = own[own["model"] == model]
            rank = here["spearman"].mean()
            cells += [str(len(here)), spread(here["jaccard"], ".2f"), "" if pd.isna(rank) else f"{rank:.2f}"] if len(
                here) else [""] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_claims(claims: pd.DataFrame) -> str:
    """A table of the claims. The last column of the table says what the interval shows about the claim."""
    lines = ["| claim, above zero if it holds | model | draws | mean | 95 % interval | told |",
             "|---|---|---|---|---|---|"]
    for row in claims.sort_values("claim", key=lambda own: own.map(list(claims["claim"].unique()).index),
                                  kind="stable").itertuples():
        mean = "" if pd.isna(row.mean) else f"{row.mean:.2f}"
        interval = "" if pd.isna(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        lines.append(f"| {row.claim} | {row.model} | {row.draws} | {mean} | {interval} | {row.told} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """All tables of the page, made from the CSV files in docs/data."""
    rows, pairs, claims = (pd.read_csv(DATA / f"{name}.csv") for name in NAMES)
    return {"searches": table_searches(rows), "pairs": table_pairs(pairs), "claims": table_claims(claims)}


def main(paths: Sequence[str]) -> None:
    """Write data, page and figures."""
    records = {Path(path).resolve().parents[1].name: store.read(path) for path in paths}
    for name, frame in frames(records).items():
        store.write_text(DATA / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    for (model, record), (name, draw) in itertools.product(records.items(), (
            ("layers", figures.chosen_layers), ("agreement", figures.agreement_of_searches))):
        for made in save(draw(record), IMAGES / f"objectives-{name}-{model}"):
            if made.suffix != ".png":
                made.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
