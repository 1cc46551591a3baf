"""The figures of the report: name, title, rule and caption of each, and how variants look in all of them."""
import re
from typing import Any

from planning import grid, variants
from planning.schema import schema


def looks(config: dict[str, Any], points: list[dict[str, str]]) -> dict[str, list[Any]]:
    """How the rows of these points are drawn, the same in every figure: see kdp_core.figures.style.Row.

    The place of the row's method in the table of methods, the row's number among the config's rows that stand on this
    method, and what the method does.
    """
    methods, found, seen = list(schema()["methods"]), {}, {}
    # a row named like its method comes first, whichever way round they stand
    for name in sorted(config["methods"], key=lambda name: name not in methods):
        base = variants.base_of(config, name)
        group = "fine-tuned" if variants.source_of(config, name) != name else schema()["methods"][base]["x-group"]
        # rows of a method that the config does not name as such leave the method its own look
        number = seen[base] = seen.get(base, -1 if name == base else 0) + 1
        found[name] = [methods.index(base), number, group]
    return {name: found[name] for name in dict.fromkeys(point["method"] for point in points)}


def figure_entries(config: dict[str, Any]) -> list[dict[str, str]]:
    """Every figure of the report, in order: name, title, rule that makes it, caption."""
    made = [_entry("score-ratio", "Score against ratio", "figure_score_ratio",
                   "Mean accuracy and perplexity against the share of all parameters really removed, one line a method "
                   "and K max; bars are one standard error. KDP paper, Figure 6."),
            _entry("tasks-ratio", "Every task against the ratio", "figure_tasks",
                   "The main metric of each task against the share of all parameters really removed, one line a method "
                   "and K max; bars are one standard error over the task's items. KDP paper, Figures 6 and 7."),
            _entry("layers", "Layers that go", "figure_layers",
                   "Which layers each grid point removes or replaces, a panel a ratio; half a layer is its attention "
                   "(upper) or its MLP (lower) alone. LoRP, Figure 4."),
            _entry("similarity-models", "Similarity of layers, all models", "figure_models",
                   "Cosine (mean over tokens) and linear CKA of the hidden states before each pair of layers, on one "
                   "colour scale; RLS is low where layers resemble each other all over the depth. KDP paper, Figure 1; "
                   "LoRP, Figure 1."),
            _entry("locality", "Similarity by distance", "figure_locality",
                   "Mean cosine of two layers' inputs by their distance as a share of the depth; the band holds the "
                   "middle half of the pairs of layers at that distance. LoRP, Figure 2."),
            *_ablation_entries(config)]
    for model, calib in grid.calibrated(config):
        at, of = f"{model}/{calib}", f"{model}, {calib}"
        made.append(_entry(f"{at}/similarity", f"Similarity of layers: {of}", "figure_similarity",
                           "Similarity of the hidden states before each pair of layers. KDP paper, Figure 1."))
        if "theory" in config:
            made.append(_entry(f"{at}/theory", f"Theorems 1 and 2: {of}", "figure_theory",
                               "Theorem 1's bounds beside the errors that they bound, by horizon; then held-out errors "
                               "of random and learned features beside linear maps of states, and how Theorem 2's risk "
                               "falls with the kernel's width whatever becomes of the state."))
        made += [_entry(f"{at}/errors-r{ratio:g}", f"Error of states at ratio {ratio:g}: {of}", "figure_errors",
                        "Relative squared error of the pruned models' states against the dense model's, on held-out "
                        "windows.") for ratio in config["grid"]["ratios"]]
        made += _view_entries(config, at, of)
        made += _spaces_entries(config, at, of)
        for method in variants.learned(config):
            made += [_entry(f"{at}/{method}-training", f"Training: {method}, {of}", "figure_training",
                            "Losses of both steps and the cosine of step 1 by epoch, a line a block. KDP paper, "
                            "Figure 3."),
                     _entry(f"{at}/{method}-operators", f"Operator norms: {method}, {of}", "figure_operators",
                            "Norms of the operators and of the mean-free features in training. KDP paper, Figure 5.")]
        made += [_entry(f"{at}/{method}-joint", f"Joint training: {method}, {of}", "figure_joint",
                        "Divergence of the outputs from the dense model's by epoch, a line a grid point; epoch 0 is "
                        "the closed form.") for method in variants.jointly(config)]
    return made


def _view_entries(config: dict[str, Any], at: str, of: str) -> list[dict[str, str]]:
    if "views" not in config:
        return []
    return [_entry(f"{at}/trajectories", f"Paths of the states: {of}", "views_trajectories",
                   "One token a sample through the layers, its place in a t-SNE of all layers across. Beside it, how "
                   "straight the paths are: 1 is a straight line; dashed are walks whose steps have the same lengths "
                   "and unrelated directions, and a t-SNE of theirs. KDP paper, Figure 10."),
            *(_entry(f"{at}/{name}-heatmaps", f"Kernel space: {name}, {of}", "views_heatmaps",
                     "Predicted and true features after each block at a few positions of a held-out sequence, on one "
                     "colour range, and their difference on its own. KDP paper, Figures 4 and 9.")
              for name in config["views"].get("variants", []))]


def _spaces_entries(config: dict[str, Any], at: str, of: str) -> list[dict[str, str]]:
    if "spaces" not in config:
        return []
    paper = "Representation hierarchies, Figure"
    made = [_entry(f"{at}/spaces-layers", f"Three spaces, layer by layer: {of}", "figure_spaces_layers",
                   "1 - cosine of states, logits and probabilities with those of the dense model, right after a layer "
                   "whose attention or MLP or both are left out; bands are one standard error over held-out windows. "
                   f"{paper} 4."),
            _entry(f"{at}/spaces-split", f"Along and across: {of}", "figure_spaces_split",
                   "The same change of states and logits, as its part along the dense vector and the rest, relative to "
                   f"that vector's norm. {paper} 5."),
            _entry(f"{at}/spaces-estimates", f"Estimates beside changes: {of}", "figure_spaces_estimates",
                   "Second-order estimates from the logits' change beside the change measured, a point a token, layer "
                   f"and part left out; on the dotted line both are equal. {paper} 6.")]
    for ratio in config["grid"]["ratios"]:
        made += [_entry(f"{at}/spaces-steps-r{ratio:g}", f"Decoding step by step at ratio {ratio:g}: {of}",
                        "figure_spaces_steps",
                        "Cosine with the dense model after a prompt, by decoding step: above, both models read what "
                        "the dense one says, below, each what it says itself; bands are one standard error over "
                        f"prompts. {paper} 7."),
                 _entry(f"{at}/spaces-choices-r{ratio:g}", f"Letters beside all tokens at ratio {ratio:g}: {of}",
                        "figure_spaces_choices",
                        "Multiple-choice items asked for a letter: change of the probabilities over all tokens and "
                        "over the letters alone, and where the letters stand among all tokens of the dense model; bars "
                        f"are one standard error over items. {paper} 8.")]
    return made


def _ablation_entries(config: dict[str, Any]) -> list[dict[str, str]]:
    return [_entry(f"ablation-{name}", f"Ablation: {own['title']}", "ablation",
                   f"{own['caption']} Bars are one standard error; dotted, with its own: the dense model.")
            for name, own in config.get("ablations", {}).items()]


def _entry(name: str, title: str, rule: str, caption: str) -> dict[str, str]:
    return {"name": name, "title": title, "rule": rule, "caption": caption}


def entry_of(entries: list[dict[str, str]], name: str) -> dict[str, str]:
    """The entry of a figure; of one that the report does not show, its name and no caption."""
    return next((entry for entry in entries if entry["name"] == name), _entry(name, name, "", ""))


def as_rst(text: str) -> str:
    """Plain words as reStructuredText: no character of theirs means anything."""
    return re.sub(r"([\\*_`|])", r"\\\1", text)
