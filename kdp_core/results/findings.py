"""The summary in plain words: for each model and target, the best variant, its lead, and how certain the lead is.

Two rules decide whether a difference is more than noise. The first rule needs a paired test of the two models on the
same items. The difference is clear if p, after Holm's correction, is below SIGNIFICANT. If p is not below SIGNIFICANT,
the models count as a tie. Without a test, the second rule uses the distance in combined standard errors, sqrt(se1^2 +
se2^2). A distance of at most TIE is a tie, a distance of at least CLEAR is clear, and a distance between the two is
suggestive. The second rule assumes independent models. But all models answer the same items, so the second rule calls
too many differences a tie. This module puts the numbers of the summary into sentences and computes nothing else.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from kdp_core.results.columns import BASELINE, COLUMNS, DENSE, number
from kdp_core.results.marks import zeros
from kdp_core.results.paired import ALL, SIGNIFICANT

TIE, CLEAR = 1.0, 2.0
"""Limits of the distance in combined standard errors: at most TIE is a tie, and at least CLEAR is clear."""
SAME_SIZE = 0.02
"""Two models have about the same size if the shares that they removed differ by at most this much."""
LISTED = 5
"""Largest number of names that a sentence lists. A longer list ends with the number of the remaining names."""
WORDS = {"acc": "accuracy", "ppl": "perplexity"}
Level = Literal["clear", "suggestive", "tie", "unknown", ""]


class Claim(NamedTuple):
    """One statement."""
    topic: str
    level: Level
    """How certain the lead of the first model is; empty if the statement compares no models."""
    text: str
    first: str = ""
    """The name of the first model in the text of the statement."""


class Finding(NamedTuple):
    """All statements about one dense model, or about its pruned models of one target ratio."""
    model: str
    target: str
    """The target ratio as text, such as `10 %`; empty for the dense model."""
    claims: list[Claim]


class Verdict(NamedTuple):
    """How clearly two models differ in one metric."""
    level: Level
    apart: float
    """Difference of the two models in combined standard errors; infinite if the standard errors are not known."""
    test: tuple[float, int] | None = None
    """p and number of items of the paired test; None if the models have no test."""


Paired = Mapping[tuple[str, frozenset[tuple[Any, ...]]], tuple[float, int]]
"""(metric, keys of both models) -> (p with Holm's correction, number of items) of their paired test."""


def headline(summary: pd.DataFrame, *, comparisons: pd.DataFrame | None = None) -> list[Finding]:
    """The summary in plain sentences: one finding for each dense model, and one for each of its target ratios.

    comparisons: the paired tests that compare.compare returns. The function reads only the tests over all tasks:
        against the best model, and against the baseline.
    Models whose weights are only set to zero are compared only with each other. If the best model is fine-tuned, a
    further statement compares the models without fine-tuning.
    """
    said, best, floor = [], _paired(comparisons, "best"), _paired(comparisons, "baseline")
    for model in sorted(summary["model"].unique()):
        own = summary[summary["model"] == model]
        dense, pruned = own[own["method"] == DENSE], own[own["method"] != DENSE]
        if not dense.empty:
            said.append(Finding(model, "", [Claim("Dense", "", _dense_words(dense.iloc[0]))]))
        for ratio, group in pruned.groupby("ratio", sort=True):
            said.append(Finding(model, f"{100 * float(ratio):g} %", _claims(group, best, floor)))
    return said


def sentence(summary: pd.DataFrame) -> str:
    """The outcome of a run in one sentence, which is about the best model; empty if there is no such model."""
    best = next(iter(_leaders(summary)), None)
    return "" if best is None else (
        f"{best['method']} removed {_share(best['params_removed'])} of the parameters of {best['model']}, and the "
        f"smaller model has {_left_words(best)} of the dense model.")


def next_best(summary: pd.DataFrame, *, comparisons: pd.DataFrame | None = None) -> str:
    """The next best model of about the same size, and how sure the difference is; empty if there is no such model."""
    if len(leaders := _leaders(summary)) < 2:
        return ""
    best, other = leaders
    return (f"At about the size of the best model, {other['method']} is the next best method. It removed "
            f"{_share(other['params_removed'])} of the parameters, and its model has {_left_words(other)}. "
            f"{_sure_words(best, other, _paired(comparisons, 'best'))}")


def _leaders(summary: pd.DataFrame) -> list[pd.Series]:
    """The best really smaller model of the largest target, and the next best of about its size, if they exist."""
    pruned = summary[(summary["model"] == summary["model"].iloc[0]) & (summary["method"] != DENSE) & ~zeros(summary)]
    pruned = pruned[pruned["ratio"] == pruned["ratio"].max()]
    ranked = _ranked(pruned, "ppl_ratio" if pruned["ppl_ratio"].notna().any() else "rp")
    if ranked.empty:
        return []
    best = ranked.iloc[0]
    near = ranked[(ranked["params_removed"] - best["params_removed"]).abs() <= SAME_SIZE]
    return [best, *(row for _, row in near[near["method"] != best["method"]][:1].iterrows())]


def _sure_words(best: pd.Series, other: pd.Series, paired: Paired) -> str:
    """The sentence that says which differences between two models are clear."""
    both = {words: metric for metric, words in WORDS.items() if known(best[metric]) and known(other[metric])}
    clear = [words for words, metric in both.items() if verdict(best, other, metric, paired).level == "clear"]
    open_ = [words for words in both if words not in clear]
    if clear and open_:
        return f"The difference in {clear[0]} is clear, but the difference in {open_[0]} is not."
    if len(both) == 2:
        return f"{'Both differences are' if clear else 'Neither difference is'} clear."
    return f"The difference is {'' if clear else 'not '}clear."


def _left_words(row: pd.Series) -> str:
    """Perplexity and accuracy of a pruned model, relative to those of the dense model."""
    ratio = row["ppl_ratio"]
    said = [f"{ratio:,.{0 if ratio >= 10 else 2}f} times the perplexity"] if known(ratio) else []
    return " and ".join([*said, *([f"{_share(row['rp'] / 100)} of the accuracy"] if known(row["rp"]) else [])])


def _share(share: float) -> str:
    """A share in percent, with a no-break space before the percent sign."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def number_of(row: pd.Series, name: str) -> str:
    """A number of the summary with its standard error and unit."""
    column = COLUMNS[name]
    error = row[column.stderr]
    unit = f" {column.unit}" if column.unit else ""
    pm = f" ± {number(column, error)}" if known(error) else ""
    return f"{number(column, row[name])}{pm}{unit}"


def known(value: Any) -> bool:
    """Whether a cell of a data frame contains a value."""
    return value is not None and not pd.isna(value)


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listing(names: Sequence[str]) -> str:
    """Names joined to a list for a sentence. A long list ends with the number of the remaining names."""
    if len(names) > LISTED + 1:
        names = [*names[:LISTED], f"{len(names) - LISTED} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def interval(low: float, high: float, digits: int = 0) -> str:
    """`7.6 to 15.8`, or a single number if both ends are printed alike."""
    ends = [f"{end:.{digits}f}" for end in (low, high)]
    return " to ".join(dict.fromkeys(ends))


def counted(number: int | str, word: str) -> str:
    """`1 model`, `2 models`, `3 to 6 models`."""
    return f"{number} {word}" if str(number) == "1" else f"{number} {word}s"


# What is said ---------------------------------------------------------------------------------------------------------

def _dense_words(row: pd.Series) -> str:
    scored = [f"{number_of(row, name)} {word}" for name, word in (("acc", "mean accuracy"), ("ppl", "perplexity"))
              if known(row[name])]
    size = [f"{number(COLUMNS['params_millions'], row['params_millions'])} M parameters"] \
        if known(row["params_millions"]) else []
    said = f"The dense model has {listing([*scored, *size])}." if scored or size else ""
    return said if scored else f"{said} The dense model was not scored.".strip()


def _claims(group: pd.DataFrame, best: Paired, floor: Paired) -> list[Claim]:
    names, sparse = _variant_names(group), zeros(group)
    said, first = [Claim("Removed", "", _removed_words(group, sparse))], []
    for part, note in ((group[~sparse], ""), (group[sparse], ", zeros only")):
        for metric in (name for name in WORDS if part[name].notna().any()):
            ranked = _ranked(part, metric)
            said.append(_metric_claim(ranked, names, metric, best, note))
            first.append(ranked.index[0])
            untuned = ranked[~ranked["finetuned"].astype(bool)]
            if ranked.iloc[0]["finetuned"] and not untuned.empty:
                said.append(_metric_claim(untuned, names, metric, best, f"{note}, not fine-tuned"))
    said += _baseline_claims(group[~sparse], names, floor)
    costs = [Claim(f"Cost of {names[label]}", "", _cost_words(group.loc[label])) for label in dict.fromkeys(first)]
    return said + costs + _fits_claims(group, names)


def _removed_words(group: pd.DataFrame, sparse: pd.Series) -> str:
    """The number of models, and the shares of parameters that were removed from these models or set to zero."""
    fewer, held = group[~sparse], group[sparse]
    said = []
    if not fewer.empty:
        share = interval(100 * fewer["params_removed"].min(), 100 * fewer["params_removed"].max(), 1)
        layers = counted(interval(fewer["layers_removed"].min(), fewer["layers_removed"].max()), "layer")
        said.append(f"{share} % of the parameters and {layers} were removed in {counted(len(fewer), 'model')}.")
    if not held.empty:
        share = interval(100 * held["params_zeroed"].min(), 100 * held["params_zeroed"].max(), 1)
        said.append(f"{share} % of the parameters were set to zero and kept in {counted(len(held), 'model')}.")
    return " ".join(said)


def _ranked(group: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The scored models, the best model first."""
    return group[group[metric].notna()].sort_values(metric, ascending=COLUMNS[metric].better < 0, kind="stable")


def _metric_claim(ranked: pd.DataFrame, names: pd.Series, metric: str, paired: Paired, note: str) -> Claim:
    """The first model, its lead, and the models that may be equally good."""
    column, word = COLUMNS[metric], WORDS[metric]
    topic, first = f"{word.capitalize()}{note}", ranked.iloc[0]
    name, value = names[first.name], f"{number_of(first, metric)}{_beside_dense(first, metric)}"
    if len(ranked) == 1:
        return Claim(topic, "", f"Only {name} was scored for {word}: {value}.", name)
    verdicts = {label: verdict(first, ranked.loc[label], metric, paired) for label in ranked.index[1:]}
    tied = [label for label, found in verdicts.items() if found.level == "tie"]
    if tied:
        words = (f"{name} has the best value ({value}), but does not differ clearly from "
                 f"{listing([names[label] for label in tied])} ({_tie_words([verdicts[label] for label in tied])}).")
        return Claim(topic, "tie", words, name)
    second = ranked.iloc[1]
    gap = number(column, abs(first[metric] - second[metric])) + (" points" if column.unit == "%" else "")
    lead = "kept the most accuracy" if metric == "acc" else "had the lowest perplexity"
    found = verdicts[second.name]
    words = (f"{name} {lead} ({value}), {gap} {'ahead of' if metric == 'acc' else 'below'} {names[second.name]} "
             f"({number_of(second, metric)}): {_apart_words(found)}.")
    return Claim(topic, found.level, words, name)


def _apart_words(found: Verdict) -> str:
    if found.test:
        p, items = found.test
        return f"this is a clear difference (paired test on the same {items:,} items, {_p_words(p)})"
    if found.level == "unknown":
        return "the standard errors are not known"
    sure = "this is a clear difference" if found.level == "clear" else "this is suggestive, but not clear"
    return f"{sure} ({found.apart:.1f} combined standard errors)"


def _tie_words(found: Sequence[Verdict]) -> str:
    """Why the models are a tie: the rule that was used and its figures."""
    p_values = [one.test[0] for one in found if one.test]
    if not p_values:
        return "at most one combined standard error apart"
    words = f"paired tests on the same items, p at least {min(p_values):.2g}"
    return words if len(p_values) == len(found) else \
        f"{words}; pairs without a test are at most one combined standard error apart"


def _p_words(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def _beside_dense(row: pd.Series, metric: str) -> str:
    if metric == "acc":
        return f", {row['rp']:.1f} % of dense" if known(row["rp"]) else ""
    return f", {row['ppl_ratio']:.2f} times dense" if known(row["ppl_ratio"]) else ""


def _baseline_claims(group: pd.DataFrame, names: pd.Series, paired: Paired) -> list[Claim]:
    """Claims that compare the accuracy of each variant with plain removal of layers, at the same calibration set and
    k_max."""
    found: dict[str, list[str]] = {"Clearly more accurate": [], "Perhaps more accurate": [],
                                   "No clear difference in accuracy": [], "Less accurate": []}
    for _, part in group[group["acc"].notna()].groupby(["calib", "k_max"], sort=True):
        plain = part[part["method"] == BASELINE]
        for label, row in part[part["method"] != BASELINE].iterrows() if len(plain) else ():
            level = verdict(row, plain.iloc[0], "acc", paired).level
            word = ("No clear difference in accuracy" if level == "tie" else
                    "Less accurate" if row["acc"] < plain.iloc[0]["acc"] else
                    "Clearly more accurate" if level == "clear" else "Perhaps more accurate")
            found[word].append(names[label])
    said = " ".join(f"{word}: {listing(methods)}." for word, methods in found.items() if methods)
    return [Claim(f"Compared with “{BASELINE}”", "", said)] if said else []


def _cost_words(row: pd.Series) -> str:
    """Search, fit, size and speed of one model."""
    said = [f"The search took {duration(row['search_seconds'])}."] if known(row["search_seconds"]) else []
    said.append(f"The fit took {duration(row['fit_seconds'])}." if known(row["fit_seconds"]) else "Nothing was fitted.")
    if known(row["params_millions"]):
        said.append(f"The model has {number(COLUMNS['params_millions'], row['params_millions'])} M parameters.")
    speed = [f"{phase} is {row[f'speedup_{phase}']:.2f} times as fast as dense" for phase in ("prefill", "decode")
             if known(row[f"speedup_{phase}"])]
    return " ".join([*said, *([f"{' and '.join(speed).capitalize()}."] if speed else [])])


def _fits_claims(group: pd.DataFrame, names: pd.Series) -> list[Claim]:
    """The quickest and the slowest fit, if there are several."""
    timed = group[group["fit_seconds"].notna()].sort_values("fit_seconds", kind="stable")
    if len(timed) < 2:
        return []
    low, high = timed.iloc[0], timed.iloc[-1]
    return [Claim("All fits", "", f"The fits took from {duration(low['fit_seconds'])} for {names[low.name]} to "
                                  f"{duration(high['fit_seconds'])} for {names[high.name]}.")]


def _variant_names(group: pd.DataFrame) -> pd.Series:
    """Name of each variant, with a dagger if it was fine-tuned, and with calib and k_max if these vary in the group."""
    calibs, k_maxes = group["calib"].nunique() > 1, group["k_max"].nunique() > 1
    extras = [[*([str(row["calib"])] if calibs else []), *([f"k\N{NO-BREAK SPACE}{row['k_max']}"] if k_maxes else [])]
              for _, row in group.iterrows()]
    methods = [row["method"] + ("†" if row["finetuned"] else "") for _, row in group.iterrows()]
    return pd.Series([f"{method} ({', '.join(extra)})" if extra else method
                      for method, extra in zip(methods, extras, strict=True)], index=group.index)


# How sure it is -------------------------------------------------------------------------------------------------------

def verdict(one: pd.Series, other: pd.Series, metric: str, paired: Paired) -> Verdict:
    """How two rows of a summary differ in `acc` or `ppl`: by their paired test, or else by their standard errors."""
    apart, test = _apart(one, other, metric), paired.get((metric, frozenset((_key(one), _key(other)))))
    if test:
        return Verdict("clear" if test[0] < SIGNIFICANT else "tie", apart, test)
    level = "tie" if apart <= TIE else "unknown" if math.isinf(apart) else "clear" if apart >= CLEAR else "suggestive"
    return Verdict(level, apart)


def _apart(one: pd.Series, other: pd.Series, metric: str) -> float:
    """Difference in combined standard errors; infinite if the values differ and their standard errors are not known."""
    gap = abs(one[metric] - other[metric])
    errors = [one[COLUMNS[metric].stderr], other[COLUMNS[metric].stderr]]
    combined = math.hypot(*errors) if all(known(error) for error in errors) else 0.0
    return gap / combined if combined else (math.inf if gap else 0.0)


def _paired(comparisons: pd.DataFrame | None, against: str) -> Paired:
    """The paired tests of all models against the best model, or against the baseline."""
    if comparisons is None or comparisons.empty:
        return {}
    tested = (comparisons["task"] == ALL) & (comparisons["against"] == against)
    rows = comparisons[tested & comparisons[["p_holm", "items"]].notna().all(axis=1)]
    return {(row["metric"], frozenset((_key(row), _key(row, "other", "other_calib", "other_k_max")))):
            (float(row["p_holm"]), int(row["items"])) for _, row in rows.iterrows()}


def _key(row: pd.Series, method: str = "method", calib: str = "calib", k_max: str = "k_max") -> tuple[Any, ...]:
    return (row["model"], row[calib], row[method], float(row["ratio"]), int(row[k_max]))
