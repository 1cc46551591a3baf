"""Fits the predictor and writes its tables and figures into the pages: `python benchmarks/pages/generation.py`.

The input is docs/data/generation.csv and generation_choices.csv, which generation.py wrote. The command makes
    kdp_core/study/expect.json      the predictor that comes with the library, with its provenance
    docs/choosing.md                the tables between `<!-- NAME -->` and `<!-- end of NAME -->`
    docs/images/generation.png      predictions for left-out methods beside the measured losses
    docs/images/choices.png         multiple-choice items over all tokens and over their candidates
"""
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from marked import written

from kdp_core.base import store
from kdp_core.base.measurements import Predictor
from kdp_core.figures import generation as figures
from kdp_core.figures.style import Drawn, save
from kdp_core.score.benchmarks import BENCHMARKS
from kdp_core.study import expect, single_step

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/data"
PAGE = ROOT / "docs/choosing.md"
IMAGES = ROOT / "docs/images"
COMMAND = "python benchmarks/generation.py --data DATA; python benchmarks/pages/generation.py"
STEPS = 32
"""Number of tokens in a continuation of generation.py."""


def rows() -> pd.DataFrame:
    """The measured rows of pruned models; dense models and refused rows are left out."""
    frame = pd.read_csv(DATA / "generation.csv")
    return frame[(frame["ratio"] > 0) & frame["kl"].notna()].reset_index(drop=True)


def predictor(frame: pd.DataFrame) -> Predictor:
    """The predictor that is fitted to the rows, with its provenance."""
    digest = hashlib.sha256((DATA / "generation.csv").read_bytes()).hexdigest()
    return expect.fit(frame, {"command": COMMAND, "file": "docs/data/generation.csv", "sha256": digest,
                              "scipy": importlib.metadata.version("scipy")})


def table_losses(frame: pd.DataFrame, found: Predictor) -> str:
    """A table with the validation of the predictor for each loss. The last column shows the best single statistic."""
    lines = ["| loss | rank correlation, method left out | 95 % interval | mean error (points) | 9 of 10 within "
             "(points) | best statistic alone |", "|---|---|---|---|---|---|"]
    for name, own in found.validation.items():
        alone = expect.single_statistics(frame, name, single_step.CHANGES)
        best = max(alone, key=lambda one: alone[one])
        lines.append(f"| {name} | {own['spearman']:.2f} | {own['low']:.2f} to {own['high']:.2f} "
                     f"| {100 * own['error']:.0f} | {100 * found.spread[name]:.0f} | `{best}` {alone[best]:.2f} |")
    return "\n".join(lines) + "\n"


def table_rows(frame: pd.DataFrame) -> str:
    """A table of the measured rows and their predictions, sorted by the measured loss."""
    lines = ["| method | ratio | KL (nats) | other likeliest token (%) | same tokens (%) | LAMBADA | ROUGE-1 "
             "| repeated (%) | loss (%) | predicted (%) |", "|---|---|---|---|---|---|---|---|---|---|"]
    shown = frame.assign(predicted=expect.left_out(frame, "quality")).sort_values("loss_quality")
    for row in shown.itertuples():
        lines.append(f"| `{row.method}` | {row.ratio:g} | {row.kl:.2f} | {100 * row.disagreement:.0f} "
                     f"| {100 * row.agreement:.0f} | {row.lambada:.2f} | {row.rouge1:.3f} | {100 * row.repetition:.0f} "
                     f"| {100 * row.loss_quality:.0f} | {100 * row.predicted:.0f} |")
    return "\n".join(lines) + "\n"


def table_choices(choices: pd.DataFrame) -> str:
    """A table with a row for each task: means over all measured models."""
    lines = ["| task | models | items each | KL, all tokens | KL, candidates | same likeliest token (%) | same "
             "likeliest candidate (%) | pairs in order (%) | mass of candidates, dense | median rank | accuracy, dense "
             "| accuracy, pruned | chance |", "|" + "---|" * 13]
    for task, own in choices.groupby("task", sort=False):
        mean = own.mean(numeric_only=True)
        lines.append(f"| {task} | {len(own)} | {own['items'].iloc[0]} | {mean.kl:.2f} | {mean.kl_candidates:.2f} "
                     f"| {100 * mean.agreement:.0f} | {100 * mean.agreement_candidates:.0f} | {100 * mean.order:.0f} "
                     f"| {mean.mass:.3f} | {own['rank_median'].median():.0f} | {100 * mean.acc_dense:.0f} "
                     f"| {100 * mean.acc:.0f} | {100 * (BENCHMARKS[task].chance or 0):.0f} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """All tables of the page."""
    frame, choices = rows(), pd.read_csv(DATA / "generation_choices.csv")
    return {"expected losses": table_losses(frame, expect.own_predictor()), "generation": table_rows(frame),
            "choices": table_choices(choices)}


def numbers(frame: pd.DataFrame) -> dict[str, Any]:
    """The numbers that the text of the page cites."""
    own, left = expect.own_predictor(), expect.left_out(frame, "quality")
    chain = expect.chain(frame["disagreement"].to_numpy(float), STEPS)
    misses = (left - frame["loss_quality"]).abs()
    return {"rows": len(frame), "groups": int(own.validation["quality"]["groups"]),
            "spearman": own.validation["quality"]["spearman"],
            "chain": expect.rank_correlation(chain, frame["loss_agreement"].to_numpy(float)),
            "chain_error": float((chain - frame["loss_agreement"]).abs().mean()),
            "worst": frame.loc[misses.idxmax(), ["method", "ratio"]].tolist(), "worst_error": float(misses.max())}


def draw(frame: pd.DataFrame, choices: pd.DataFrame, names: Sequence[str]) -> dict[str, Drawn]:
    """The two figures."""
    left = {name: expect.left_out(frame, name) for name in names}
    return {"generation": figures.validation(frame, left), "choices": figures.survival(choices)}


if __name__ == "__main__":
    measured = rows()
    store.write(expect.RECORD, predictor(measured))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    drawn = draw(measured, pd.read_csv(DATA / "generation_choices.csv"), ("quality", "agreement", "lambada", "rouge1"))
    for name, one in drawn.items():
        for path in save(one, IMAGES / name):
            if path.suffix != ".png":
                path.unlink()
    print(pd.Series(numbers(measured)).to_string())
