"""The model card of a pruned checkpoint. The card is the file README.md, which the Hugging Face hub shows.

The card is written from the records of the pruning and of the scores. The card states what the checkpoint is, what was
removed, and the scores of the checkpoint and of the dense model. The card also states the licence of the base model,
how the checkpoint was made, and how to make the checkpoint again. Unknown facts are omitted, or the card says that they
are unknown.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from kdp_core.base.measurements import Efficiency, Scores
from kdp_core.base.provenance import without_place, without_places
from kdp_core.base.records import ModelFacts, PrunedFacts
from kdp_core.methods import method_of

HUB = "hf:"
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
"""A value and its error stay on one line in a narrow window."""
UNITS = {"ppl": "perplexity", "share": "share of items"}


class Made(NamedTuple):
    """How a checkpoint was made."""
    method: str
    """A key of METHODS."""
    variant: str
    """The name of the variant in the configuration; the name of the method if there is no variant."""
    ratio: float
    """Share of all parameters that the configuration asks to remove."""
    again: str
    """Commands or a configuration with which the checkpoint can be made again, as a fenced block of Markdown."""
    provenance: Mapping[str, Any]
    """The entries `versions`, `git`, `seeds` and `inputs`. `provenance.here` and `hashes` return these entries."""
    stock: bool
    """Whether a class of transformers itself can load the model, without code in the checkpoint."""


class Measured(NamedTuple):
    """The scores of the dense model and of the pruned model on the same items."""
    dense: Scores
    pruned: Scores
    costs: Efficiency | None


def card(facts: ModelFacts, pruned: PrunedFacts, made: Made, measured: Measured | None) -> str:
    """The card as Markdown. The text begins with the YAML entries that the hub reads."""
    parts = [_entries(facts, made), f"# {_name(facts)} without {pruned.params_removed:.1%} of its parameters",
             _what(facts, pruned, made), "## Use", _use(made.stock), "## Scores", _scores(measured),
             "## Licence", _licence(facts), "## How it was made", _how(facts, made), "## Make it again",
             without_place(made.again)]
    return "\n\n".join(parts) + "\n"


def _name(facts: ModelFacts) -> str:
    """The name of the base model, taken from its repository or from its file."""
    bare = without_place(facts.source)
    if bare.startswith(HUB):
        return bare.removeprefix(HUB).split("@")[0]
    return bare.rsplit("/", 1)[-1].removesuffix(".gguf")


def _entries(facts: ModelFacts, made: Made) -> str:
    """The block of YAML that the hub reads."""
    entries: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation",
                               "tags": ["pruned", "kdp", made.method]}
    if facts.source.startswith(HUB):
        entries |= {"base_model": _name(facts), "base_model_relation": "finetune"}
    if facts.licence:
        entries["license"] = facts.licence
    return f"---\n{yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)}---"


def _what(facts: ModelFacts, pruned: PrunedFacts, made: Made) -> str:
    method = method_of(made.method)
    named = f"`{made.variant}`" + (f" (the method `{made.method}`)" if made.variant != made.method else "")
    # a record may name pages of the project; these pages are not copied with a checkpoint
    rows = [("base model", f"{_name(facts)} ({facts.family})"), ("method", f"{named}: {method.group}"),
            ("published in", method.paper.split("; docs/")[0]),
            ("asked for", f"{made.ratio:.1%} of all parameters removed"),
            ("parameters", f"{pruned.params_after:,}, of which {pruned.params_added:,} were added; "
                           f"{pruned.params_before:,} in the base model"),
            ("layers", f"{pruned.layers_before - pruned.layers_removed} of {pruned.layers_before}")]
    if pruned.params_zeroed:
        rows.append(("weights set to zero", f"{pruned.params_zeroed:,}; they are stored and count as removed"))
    return f"A pruned language model ({method.group}), made by kdp.\n\n" + table(["what", "value"], rows)


def _use(stock: bool) -> str:
    trust = "" if stock else ", trust_remote_code=True"
    why = "This folder contains an ordinary model of its family, without code." if stock else (
        "The file modeling_kdp.py in this folder defines the model. This file needs only torch and transformers. Read "
        "the file before you trust it.")
    return (f"{why}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{trust})\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```')


def _scores(measured: Measured | None) -> str:
    """Every score of the pruned model next to the same score of the dense model, with standard errors that come from
    the variation between items."""
    if measured is None:
        return "This model has not been scored."
    before = {(score.task, score.metric): score for score in measured.dense.scores}
    rows = []
    for score in measured.pruned.scores:
        dense = before.get((score.task, score.metric))
        better = "higher" if score.higher_is_better else "lower"
        rows.append((score.task, f"{score.metric} ({better} is better)", "" if dense is None else _value(dense),
                     _value(score), f"{score.items:,}"))
    said = table(["task", "metric", "base model", "this model", "items"], rows)
    said += "\n\nThe number after ± is one standard error over items."
    if (costs := measured.costs) is not None:
        said += (f"\n\nOn {costs.device} with {costs.threads} thread{'s' * (costs.threads != 1)}, a prompt of "
                 f"{costs.tokens} tokens is {costs.speedup_prefill:.2f} times as fast as in the base model, and a next "
                 f"token {costs.speedup_decode:.2f} times (medians of {costs.repeats} paired turns).")
    return said + (" The scores describe only text like that of these tasks. The effect of pruning on other "
                   "languages, on long texts and on safety was not tested.")


def _value(score: Any) -> str:
    if score.value is None:
        return "not finite"
    return f"{score.value:.4g}" + ("" if score.stderr is None else f"{PLUS_MINUS}{score.stderr:.2g}")


def _licence(facts: ModelFacts) -> str:
    if facts.licence:
        return (f"According to its files, the base model has the licence `{facts.licence}`. This licence also applies "
                "to this model.")
    return ("The files of the base model name no licence. Find out the licence of the base model before you give this "
            "model to others.")


def _how(facts: ModelFacts, made: Made) -> str:
    known = without_places(dict(made.provenance))
    rows = [("base model", f"`{without_place(facts.source)}`"), ("base model, SHA-256", f"`{facts.sha256}`")]
    rows += [(f"{name}, SHA-256", f"`{digest}`") for name, digest in (known.get("inputs") or {}).items()]
    rows += [(f"seed of {name}", str(seed)) for name, seed in (known.get("seeds") or {}).items()]
    rows += [(name, version) for name, version in (known.get("versions") or {}).items()]
    if git := known.get("git"):
        rows.append(("code", f"commit `{git['commit']}`" + (", with changes" if git["changed"] else "")))
    return table(["what", "value"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
                     for line in lines)
