"""Lists the figures of a run: the title, rule and caption of each figure, and the look of each variant in all figures.

The part `x-figures` of the schema contains the entries of kdp_core/figures, and the scopes. The scope of a figure says
for which points, models or variants the figure is drawn.
"""
import itertools
import re
from typing import Any

from planning import grid, variants
from planning.schema import schema

SECTIONS = ("theory", "views", "spaces", "generation", "agreement", "choices")
"""Sections of the configuration that add figures to the report."""


def looks(config: dict[str, Any], points: list[dict[str, str]]) -> dict[str, list[Any]]:
    """The look of each variant of these points. A variant has the same look in all figures.

    A look has four values, the fields of kdp_core.figures.style.Look. `place` is the position of the variant's method
    among the methods of the configuration, which are sorted as in METHODS. `number` distinguishes the variants of one
    method. `group` is the group of the method, or `fine-tuned`. `own` says whether the method was developed in this
    project.
    """
    named = {variants.base_of(config, name) for name in config["methods"]}
    methods, found, seen = [name for name in schema()["methods"] if name in named], {}, {}
    # a variant that is named like its method comes first, at any position in the configuration
    for name in sorted(config["methods"], key=lambda name: name not in methods):
        base = variants.base_of(config, name)
        group = "fine-tuned" if variants.source_of(config, name) != name else schema()["methods"][base]["x-group"]
        # number 0 is reserved for the variant that is named like the method
        number = seen[base] = seen.get(base, -1 if name == base else 0) + 1
        found[name] = [methods.index(base), number, group, schema()["methods"][base]["x-own"]]
    return {name: found[name] for name in dict.fromkeys(point["method"] for point in points)}


def entry(name: str) -> dict[str, Any]:
    """An entry of kdp_core/figures by its name."""
    return next(one for one in schema()["x-figures"]["figures"] if one["name"] == name)


def names(scope: str) -> list[str]:
    """The names of the figures of a scope."""
    return [one["name"] for one in schema()["x-figures"]["figures"] if one["scope"] == scope]


def path(scope: str) -> str:
    """The path of a scope's figures below results/figures, with wildcards and without the suffix."""
    return schema()["x-figures"]["scopes"][scope]["path"]


def flat_path(scope: str) -> str:
    """The path of a scope's figures as one name without folders, used in the names of logs and benchmark files."""
    return path(scope).replace("/", "-")


def figure_entries(config: dict[str, Any]) -> list[dict[str, str]]:
    """Every figure of the report, in order. The entry of a figure contains the name of its files, its title, its
    caption, and the rule that draws the figure.

    Figures of the whole run come first; figures of each model and calibration set follow. Figures from one module of
    kdp_core/figures are listed together if they have the same scope.
    """
    together = [list(group) for _, group in itertools.groupby(
        (one for one in schema()["x-figures"]["figures"] if _wanted(config, one)),
        key=lambda one: (one["module"], one["scope"], one["needs"]))]
    made = [_filled(one, words) for group in together if "{model}" not in path(group[0]["scope"])
            for words in _subjects(config, group[0]) for one in group]
    points = grid.grid_points(config)
    for model, calib in grid.calibrated(config):
        made += [_filled(one, words | {"model": model, "calib": calib})
                 for group in together if "{model}" in path(group[0]["scope"])
                 for words in _subjects(config, group[0]) for one in group
                 if one["needs"] == "viewed" or _has_points(points, words | {"model": model, "calib": calib})]
    return made


def _has_points(points: list[dict[str, str]], words: dict[str, str]) -> bool:
    """Whether any point has the values of these wildcards.

    A figure may have no points, because a run leaves out points that cannot be made.
    """
    return bool(grid.points_like(points, {key: words[key] for key in grid.KEYS if key in words}))


def _wanted(config: dict[str, Any], one: dict[str, Any]) -> bool:
    """Whether the configuration has the section without which a figure is not drawn."""
    return one["needs"] not in SECTIONS or one["needs"] in config


def _subjects(config: dict[str, Any], one: dict[str, Any]) -> list[dict[str, str]]:
    """The values of the wildcards of a figure, one dict for each drawing; model and calibration set are left out."""
    if one["scope"] == "ablation":
        return [{"ablation": name, "ablation_title": own["title"], "ablation_caption": own["caption"]}
                for name, own in config.get("ablations", {}).items()]
    if one["scope"] == "ratio":
        return [{"ratio": f"{ratio:g}"} for ratio in config["grid"]["ratios"]]
    if one["scope"] == "variant":
        return [{"method": name} for name in _variants(config, one["needs"])]
    return [{}]


def _variants(config: dict[str, Any], needs: str) -> list[str]:
    """The variants of a figure whose scope is `variant`; the figure is drawn for each of these variants."""
    if needs == "viewed":
        return config.get("views", {}).get("variants", [])
    return variants.learned(config) if needs == "trained" else variants.jointly(config)


def _filled(one: dict[str, Any], words: dict[str, str]) -> dict[str, str]:
    scope = schema()["x-figures"]["scopes"][one["scope"]]
    words = words | {"figure": one["name"], "title": one["title"], "caption": one["caption"]}
    return {"name": scope["path"].format(**words), "title": scope["title"].format(**words),
            "rule": f"figure_{one['scope']}", "caption": scope["caption"].format(**words)}


def entry_of(entries: list[dict[str, str]], name: str) -> dict[str, str]:
    """The entry of the figure whose files have this name.

    For a figure that is not in the report, the entry has only the name.
    """
    found = (one for one in entries if one["name"] == name)
    return next(found, {"name": name, "title": name, "rule": "", "caption": ""})


def as_rst(text: str) -> str:
    """The text, in which special characters of reStructuredText are escaped."""
    return re.sub(r"([\\*_`|])", r"\\\1", text)
