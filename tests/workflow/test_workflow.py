"""The whole workflow on a pico model: every output of the contract, and what changes add, keep or make again."""
import html
import json
import re

import pandas as pd
import pytest
from planning.figures import figure_entries

from kdp_core.base import store
from kdp_core.states import hidden

POINT = "results/pico/few/kdp/r0.1-k3"


def test_the_contract_of_paths_and_records(built):
    results = built.folder / "results"
    for path in ("pico/dense/model.safetensors", "pico/facts.json", "pico/few/tokens.safetensors", "pico/scores.json",
                 "pico/few/similarity.safetensors", f"{POINT[8:]}/plan.json", f"{POINT[8:]}/checkpoint/config.json",
                 f"{POINT[8:]}/scores.json", f"{POINT[8:]}/efficiency.json", f"{POINT[8:]}/diagnosis.json",
                 "scores.csv", "summary.csv", "tables/summary.tex", "figures/score-ratio.pdf", "report.html",
                 "checked.txt"):
        assert (results / path).stat().st_size > 0, path
    states = hidden.read(results / "pico/few/hidden.zarr")
    assert states.layers == list(range(11)) and (states.sequences, states.tokens, states.width) == (40, 24, 48)
    for block in store.read(results / f"{POINT[8:]}/plan.json").blocks:
        folder = results / f"pico/few/kdp/blocks/{block[0]}-{block[1]}"
        assert all(store.read(folder / f"{step}.safetensors").block == block for step in ("kernel", "inverse"))


def test_summary_holds_every_model_and_agrees_with_the_records(built):
    summary = pd.read_csv(built.folder / "results/summary.csv")
    assert list(summary.method) == ["dense", "remove", "linear", "kdp"]
    facts = store.read(built.folder / POINT / "pruned.json")
    row = summary[summary.method == "kdp"].iloc[0]
    assert row.params_removed == pytest.approx(facts.params_removed)
    scores = {(s.task, s.metric): s.value for s in store.read(built.folder / POINT / "scores.json").scores}
    assert row.ppl == pytest.approx(scores["heldout_ppl", "ppl"])
    assert summary[summary.method == "dense"].iloc[0].rp == pytest.approx(100)
    # w/o kernel: the same blocks as kdp's, nothing in their place
    assert summary[summary.method == "remove"].iloc[0].blocks == row.blocks


def test_report_names_every_method_and_loads_nothing(built):
    page = (built.folder / "results/report.html").read_text(encoding="utf-8")
    assert all(method in page for method in ("remove", "linear", "kdp"))
    assert "src=\"http" not in page and "href=\"http" not in page
    # jobs are forked, so that Snakemake's benchmark files do not know their memory; a job that imports torch needs more
    cells = re.search(r'class="name">evaluate</th>(.*?)</tr>', page)[1]
    assert int(re.findall(r">([\d,]+)</td>", cells)[-1].replace(",", "")) > 200


def embedded(page, part):
    """What snakemake's own report holds under the id of one of its scripts."""
    start = page.index(" = ", page.index(f'<script id="{part}">')) + 3
    return json.JSONDecoder().raw_decode(page, start)[0]


def test_snakemakes_own_report_has_captions_categories_and_labels(copied):
    copied.config["ablations"] = {"rows": {"title": "Rows in {braces}", "caption": "Side *by* side_.", "x": ["variant"],
                                           "variants": ["linear", "remove"]}}
    copied.run()
    copied.run("--report", "own.html")
    page = (copied.folder / "own.html").read_text(encoding="utf-8")
    results, categories, words = (embedded(page, part) for part in ("results", "categories", "workflow-desc"))
    assert set(categories) == {"Report", "Tables", "Figures"}
    assert list(categories["Figures"]) == ["All models", "pico, few"]
    figures = {path.removeprefix("results/figures/"): found for path, found in results.items() if "/figures/" in path}
    shown = {entry["name"]: entry for entry in figure_entries(copied.config)}
    assert set(figures) == {f"{name}.{suffix}" for name in shown for suffix in ("png", "pdf", "csv")}
    for name, entry in shown.items():
        found = figures[f"{name}.png"]
        assert found["labels"] == {"figure": entry["title"].replace("{", "").replace("}", ""), "file": "png"}
        # one source of words, and none of them taken for markup
        said = html.unescape(re.sub("<[^>]*>", "", found["caption"]))
        assert " ".join(said.split()).startswith(entry["caption"]) and entry["rule"] in said
    assert all(found["caption"] and found["labels"] for found in results.values())
    assert results["results/tables/ablation-rows.tex"]["labels"] == {"table": "ablation rows", "file": "tex"}
    assert results["results/report.html"]["labels"] == {"page": "all results"}
    assert "The variants are remove, linear, kdp on" in words and "system-message" not in words


def test_the_width_of_the_inverse_reruns_step_2_and_what_follows(copied):
    def times(pattern):
        return {path: path.stat().st_mtime_ns for path in sorted((copied.folder / "results/pico/few").glob(pattern))}

    kept = ("../*.json", "hidden.zarr/zarr.json", "similarity.safetensors", "kdp/blocks/*/kernel.safetensors",
            "linear/**/*.safetensors")
    # plan.json is made again, since the width counts in the ratio; what is trained changes with it and no more
    changed = ("kdp/blocks/*/inverse.safetensors", "kdp/r0.1-k3/*.json", "kdp/r0.1-k3/checkpoint/model.safetensors")
    before = {pattern: times(pattern) for pattern in (*kept, *changed)}
    copied.config["methods"]["kdp"]["inverse"]["width"] = 20
    copied.run(POINT + "/scores.json", POINT + "/efficiency.json", POINT + "/diagnosis.json",
               POINT + "/card.md")
    assert all(before[pattern] and times(pattern) == before[pattern] for pattern in kept)
    assert all(before[pattern][path] != time for pattern in changed for path, time in times(pattern).items())
    assert store.read(next(iter(times(changed[0])))).w1_HF.shape[0] == 20


def test_an_ablation_of_finished_points_only_tabulates_and_draws(copied):
    copied.config["ablations"] = {"rows": {"title": "Rows", "caption": "Side by side.", "x": ["variant"],
                                           "variants": ["kdp", "linear", "remove"],
                                           "metrics": ["ppl", "heldout_lastword"]}}
    assert copied.planned() == {"all": 1, "ablation": 1, "figure_ablation": 1, "report": 1, "check": 1}
    copied.run("results/tables/ablation-rows.md", "results/figures/ablation-rows.pdf")
    results = copied.folder / "results"
    summary = pd.read_csv(results / "summary.csv").set_index("method")
    table = pd.read_csv(results / "tables/ablation-rows.csv").set_index("method")
    assert list(table.index) == ["dense", "kdp", "linear", "remove"]
    assert table.ppl.to_dict() == pytest.approx(summary.ppl.to_dict())
    assert (results / "figures/ablation-rows.pdf").stat().st_size > 0


def test_an_ablation_adds_its_own_points_and_no_others(copied):
    copied.config["methods"]["kdp_expanded"] = {"base": "kdp", "block": {"expand_from": 3}}
    copied.config["ablations"] = {"k_max": {"title": "K max", "caption": "Chosen anew or grown.", "x": ["k_max"],
                                            "variants": ["kdp", "kdp_expanded"], "k_max": [3, 4]}}
    planned = copied.planned()
    # kdp at 3 is there; what only an ablation asks for is not diagnosed
    assert planned["blocks"] == planned["fold"] == planned["evaluate"] == 3 and planned["ablation"] == 1
    assert not {"diagnose", "figure_ratio", "hidden", "figure_calibrated"} & set(planned)


def test_another_ratio_shares_the_blocks_already_trained(copied):
    copied.config["grid"]["ratios"] = [0.1, 0.3]
    copied.config["grid"]["methods"] = ["linear"]
    copied.run("results/pico/few/linear/r0.3-k3/pruned.json")
    low, high = (store.read(copied.folder / f"results/pico/few/linear/r{ratio}-k3/plan.json").blocks
                 for ratio in ("0.1", "0.3"))
    assert set(low) < set(high)
    assert copied.planned("results/pico/few/linear/r0.1-k3/pruned.json") == {}


def test_a_variant_that_stands_on_another_is_a_variant_of_its_own(copied):
    copied.config["methods"]["kdp_small"] = {"base": "kdp", "inverse": {"width": 8}}
    copied.config["grid"]["methods"].append("kdp_small")
    planned = copied.planned("results/pico/few/kdp_small/r0.1-k3/plan.json")
    assert planned == {"blocks": 1}


def test_samples_of_every_task_are_kept(built):
    lines = (built.folder / POINT / "samples/heldout_lastword.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all(json.loads(line) for line in lines)
