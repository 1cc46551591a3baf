"""Writes the tables of benchmarks/retention.py into the pages: `python benchmarks/pages/retention.py`.

The numbers come from docs/data/retention.csv and retention_tests.csv, which retention.py wrote. A table is between two
marker lines, such as `<!-- retention -->` and `<!-- end of retention -->`.
"""
from pathlib import Path

import pandas as pd
from marked import written

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/data"
TABLES = {"retention": ("smollm2-135m", 0.25), "retention at 0.20": ("smollm2-135m", 0.2),
          "retention at 0.30": ("smollm2-135m", 0.3), "retention of Gemma 3": ("gemma3-270m", 0.25)}
"""Name in the marker lines -> model and ratio of the table."""
PLACES = {"README.md": ("retention",), "docs/kdp.md": tuple(TABLES)}
"""Page -> names of its tables."""
HEAD = ("| method | removed (%) | accuracy (%) | kept above chance (%) | news | encyclopedia | web | prefill "
        "| decode | fit (min) | against the best of ours |")
SEED = 0
"""The calibration seed of the table."""


def table(model: str, ratio: float) -> str:
    """The Markdown table of one model and ratio.

    The dense model comes first; the pruned models follow, sorted by accuracy. Fine-tuned models are at the end.
    """
    frame = pd.read_csv(DATA / "retention.csv")
    tests = pd.read_csv(DATA / "retention_tests.csv")
    frame = frame[(frame["model"] == model) & frame["ratio"].isin([0.0, ratio]) & frame["acc"].notna()]
    frame = frame[frame["seed"].isin([SEED]) | frame["seed"].isna()]
    tests = tests[(tests["model"] == model) & (tests["ratio"] == ratio) & (tests["seed"] == SEED)].set_index("method")
    lines = [HEAD, "|---|" + "---|" * (HEAD.count("|") - 2)]
    frame = frame.assign(tuned=frame["group"] == "finetuned")
    for _, row in frame.sort_values(["ratio", "tuned", "acc"], ascending=[True, True, False]).iterrows():
        lines.append("| " + " | ".join([f"`{row['method']}`" if row["ratio"] else row["method"], *cells(row),
                                        against(row["method"], tests)]) + " |")
    return "\n".join(lines) + "\n"


def cells(row: pd.Series) -> list[str]:
    """The cells of a row between the name of the method and the comparison with our best method."""
    ratios = [row[f"ppl_ratio_{name}"] for name in ("news", "wiki", "web")]
    texts = [f"{ratio:.2f} ×" if ratio < 1000 else f"{ratio:,.0f} ×" for ratio in ratios]
    return [f"{100 * row['params_removed']:.1f}", f"{row['acc']:.1f} ± {row['acc_stderr']:.1f}",
            f"{row['acc_above_chance_retained']:.0f}", *texts, f"{row['speedup_prefill']:.2f} ×",
            f"{row['speedup_decode']:.2f} ×", f"{row['fit_seconds'] / 60:.0f}" if row["ratio"] else ""]


def against(method: str, tests: pd.DataFrame) -> str:
    """The cell that compares a method with our best method.

    The cell shows the mean accuracy of the method minus the mean accuracy of our best method, in points. The standard
    error and the corrected p-value of this difference follow. The difference is paired by item.
    """
    if method not in tests.index:
        return ""
    test = tests.loc[method]
    return f"{-test['difference']:+.1f} ± {test['stderr']:.1f} (p {test['p_holm']:.2g})"


def tables(place: str) -> dict[str, str]:
    """The tables of a page: name in the marker lines -> the table."""
    return {name: table(*TABLES[name]) for name in PLACES[place]}


if __name__ == "__main__":
    for place in PLACES:
        (ROOT / place).write_text(written((ROOT / place).read_text(encoding="utf-8"), tables(place)), encoding="utf-8")
