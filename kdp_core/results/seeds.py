"""The mean and the standard deviation of each variant over several calibration sets that differ only in their seed."""
import math
from collections.abc import Mapping
from typing import Literal

import pandas as pd

from kdp_core.results import tables
from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column

SPREAD = ("params_removed", "acc", "rp", "ppl", "ppl_ratio")
"""The columns of the summary for which mean and standard deviation are computed."""
SEED_COLUMNS: dict[str, Column] = {
    "seeds": Column("Seeds", "", "Calibration seeds that were run.", 0),
    "params_removed": COLUMNS["params_removed"]._replace(stderr="params_removed_spread"),
    **{name: COLUMNS[name]._replace(stderr=f"{name}_spread", better=0) for name in ("acc", "rp", "ppl")},
    "acc_stderr": Column("Item error", "%", "Standard error of one seed's accuracy, over items.", 1, 100),
    "ppl_stderr": Column("Item error (ppl)", "", "Standard error of one seed's perplexity, over items.", 2),
}
NOTE = ("Each number is the mean over calibration seeds ± the standard deviation between the seeds. An item error is "
        "the standard error of one seed over the items of the tasks, which are the same for all seeds. No row is "
        "marked, because a few seeds do not show which method is better. †: fine-tuned after pruning.")
"""The note below the table that explains its numbers."""


def over_seeds(summary: pd.DataFrame, families: Mapping[str, str]) -> pd.DataFrame:
    """One row for each variant, ratio and k_max, over calibration sets that differ only in their seed.

    `families` maps each calibration set to the name of its seed family. The column of a name in SPREAD contains the
    mean over the seeds. `<name>_spread` is the standard deviation between seeds (S - 1 in the denominator). The columns
    acc_stderr and ppl_stderr are root mean squares over the seeds. Rows of dense models do not change. Points that were
    run with one seed are left out.
    """
    pruned = summary[summary["calib"].isin(list(families)) & (summary["method"] != DENSE)]
    pruned = pruned.assign(calib=pruned["calib"].map(families))
    rows = [row | {"seeds": 1} for row in summary[summary["method"] == DENSE].to_dict("records")]
    for _, group in pruned.groupby([*KEYS], sort=False):
        if len(group) > 1:
            first = group.iloc[0]
            rows.append({key: first[key] for key in KEYS} | {"seeds": len(group), "finetuned": first["finetuned"],
                                                             "params_zeroed": group["params_zeroed"].mean()} |
                        {name: group[name].mean() for name in SPREAD} |
                        {f"{name}_spread": group[name].std(ddof=1) for name in SPREAD} |
                        {name: math.sqrt((group[name] ** 2).mean()) for name in ("acc_stderr", "ppl_stderr")})
    names = [*KEYS, "seeds", *(column for name in SPREAD for column in (name, f"{name}_spread")), "acc_stderr",
             "ppl_stderr", "finetuned", "params_zeroed"]
    return pd.DataFrame(rows, columns=names).sort_values("model", kind="stable", ignore_index=True)


def render(frame: pd.DataFrame, format: Literal["csv", "md", "tex"]) -> str:
    """The frame of `over_seeds` as text, by tables.render."""
    return tables.render(frame, format, columns=list(SEED_COLUMNS), known=SEED_COLUMNS, note=NOTE, wide=True,
                         caption="Mean over calibration seeds and spread between them.", label="tab:seeds")
