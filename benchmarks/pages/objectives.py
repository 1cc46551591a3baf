"""Writes the tables and figures of docs/objectives.md: `python benchmarks/pages/objectives.py RECORD`.

RECORD is the file agreement-r{ratio}.json of a run of configs/objectives.yaml. From RECORD the command makes these
files:
    docs/data/objectives.csv          a row for each search: layers, value, cost, held-out perplexity and accuracy
    docs/data/objectives_pairs.csv    Jaccard and Spearman of every two searches that differ in one thing
    docs/data/objectives_claims.csv   the claims with their intervals
    docs/images/objectives-*.png      the figures of the report
The tables of the page, between `<!-- NAME -->` and `<!-- end of NAME -->`, are made from the three CSV files.
"""
import sys
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


def frames(record: Agreement) -> dict[str, pd.DataFrame]:
    """Name of a CSV file of the page -> its data."""
    rows = pd.DataFrame(record.rows).drop(columns=["single", "best_so_far"])
    rows["removed"] = [" ".join(map(str, removed)) for removed in rows["removed"]]
    rows = rows.assign(**{name: record.stats[name] for name in ("windows", "dense_nats", "dense_accuracy")})
    return dict(zip(NAMES, (rows, pd.DataFrame(record.pairs), pd.DataFrame(record.claims)), strict=True))


def table_searches(rows: pd.DataFrame) -> str:
    """A table with a row for each search."""
    lines = ["| objective | search | draw | layers removed | layer passes | by full passes | perplexity / dense "
             "| accuracy (%) |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| `{row.objective}` | `{row.strategy}` | {row.draw} | {row.removed} | {row.passes} "
              f"| {row.passes_without_trails} | {row.heldout_ppl_ratio:.2f} | {100 * row.heldout_accuracy:.0f} |"
              for row in rows.itertuples()]
    return "\n".join(lines) + "\n"


def table_pairs(pairs: pd.DataFrame) -> str:
    """A table of pairs of searches. Pairs with the same description share one row, which summarises these pairs."""
    lines = ["| compared | pairs | Jaccard | from | to | Spearman of single removals |", "|---|---|---|---|---|---|"]
    words = [f"two draws, `{row.objective}` by `{row.strategy}`" if row.varies == "draw"
             else f"`{row.one}` and `{row.other}`, same draw" for row in pairs.itertuples()]
    for compared, own in pairs.groupby(words, sort=False):
        rank = own["spearman"].mean()
        lines.append(f"| {compared} | {len(own)} | {own['jaccard'].mean():.2f} | {own['jaccard'].min():.2f} "
                     f"| {own['jaccard'].max():.2f} | {'' if pd.isna(rank) else f'{rank:.2f}'} |")
    return "\n".join(lines) + "\n"


def table_claims(claims: pd.DataFrame) -> str:
    """A table of the claims. The last column of the table says what the interval shows about the claim."""
    lines = ["| claim, above zero if it holds | draws | mean | 95 % interval | told |", "|---|---|---|---|---|"]
    for row in claims.itertuples():
        mean = "" if pd.isna(row.mean) else f"{row.mean:.2f}"
        interval = "" if pd.isna(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        lines.append(f"| {row.claim} | {row.draws} | {mean} | {interval} | {row.told} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """All tables of the page, made from the CSV files in docs/data."""
    rows, pairs, claims = (pd.read_csv(DATA / f"{name}.csv") for name in NAMES)
    return {"searches": table_searches(rows), "pairs": table_pairs(pairs), "claims": table_claims(claims)}


def main(path: str) -> None:
    """Write data, page and figures."""
    record = store.read(path)
    for name, frame in frames(record).items():
        store.write_text(DATA / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    for name, draw in (("layers", figures.chosen_layers), ("agreement", figures.agreement_of_searches)):
        for made in save(draw(record), IMAGES / f"objectives-{name}"):
            if made.suffix != ".png":
                made.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
