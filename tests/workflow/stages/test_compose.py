"""Variants whose grid points are fitted as a whole: search and compose in the workflow, and what a change reruns."""
import copy
import shutil

import pandas as pd
import pytest

from kdp_core.base import store
from tests.workflow.project import Project

VARIANTS = {"kdp_residual": {"search": {"entries": 8, "judge_sequences": 4},
                         "compose": {"entries": 8, "batch_sequences": 12, "positions": 8}},
        "linear_prefix": {}, "replaceme_lstsq": {}, "laco": {"compose": {"sequences": 8, "jump": "shorten"}},
        "joint_drop": {}, "llm_pruner": {}, "slicegpt": {"compose": {"multiple": 1}}, "wanda": {}}
CHOOSES = ("laco", "joint_drop", "llm_pruner", "slicegpt", "wanda")
"""Variants whose fit decides what is removed."""
FEW = "results/pico/few"
POINT = "results/pico/few/{}/r0.1-k3"
SUMMARY = "results/tables/summary.md"


@pytest.fixture(scope="module")
def composed(built, tmp_path_factory):
    """The built project with these variants in the place of its own; tests must not change it."""
    project = Project(tmp_path_factory.mktemp("composed") / "project")
    shutil.copytree(built.folder, project.folder, symlinks=True)
    project.config["methods"] |= copy.deepcopy(VARIANTS)
    project.config["grid"]["methods"] = list(VARIANTS)
    project.run(SUMMARY, f"results/figures/{FEW[8:]}/kdp_residual-joint.png")
    return project


@pytest.fixture
def changed(composed):
    """The same files under a config of one's own, for dry runs."""
    project = Project(composed.folder)
    project.config = copy.deepcopy(composed.config)
    return project


def test_every_variant_becomes_a_checkpoint_of_the_size_that_was_planned(composed):
    for variant in VARIANTS:
        at = composed.folder / POINT.format(variant)
        facts, plan, record = (store.read(at / name) for name in ("pruned.json", "plan.json", "composed.safetensors"))
        if variant in CHOOSES:
            assert plan.blocks == [] and facts.params_removed == pytest.approx(plan.ratio_planned, abs=0.03)
            continue
        assert facts.params_removed == pytest.approx(plan.ratio_planned)
        assert facts.layers_removed == sum(stop - start for start, stop in plan.blocks)
        assert [fit["block"] for fit in record.fits] == plan.blocks
        # only ReplaceMe changes the model's own weights
        assert bool(record.plan.modules) == (variant != "replaceme_lstsq") and bool(record.plan.tensors) != bool(
            record.plan.modules)
    assert not list((composed.folder / FEW).glob("*_residual/blocks"))


def test_variants_that_choose_in_their_fit_are_measured_like_the_others(composed):
    composed.run(*(f"{POINT.format(variant)}/diagnosis.json" for variant in CHOOSES))
    summary = pd.read_csv(composed.folder / "results/summary.csv", keep_default_na=False).set_index("method")
    assert set(CHOOSES) <= set(summary.index) and float(summary.loc["wanda", "params_zeroed"]) > 0.05
    assert summary.index[-1] == "wanda" and "wanda (zeros)" in (composed.folder / SUMMARY).read_text(encoding="utf-8")
    facts = {variant: store.read(composed.folder / POINT.format(variant) / "pruned.json") for variant in CHOOSES}
    assert facts["joint_drop"].parts and facts["laco"].layers_removed == store.read(
        composed.folder / POINT.format("laco") / "plan.json").layers
    for variant in CHOOSES:
        diagnosis = store.read(composed.folder / POINT.format(variant) / "diagnosis.json")
        assert diagnosis.dropped == [layer for start, stop in facts[variant].blocks for layer in range(start, stop)]
        assert diagnosis.kl_nats > 0


def test_blocks_are_the_first_of_the_search(composed):
    search = store.read(composed.folder / FEW / "kdp_residual/search-k3.json")
    plan = store.read(composed.folder / POINT.format("kdp_residual") / "plan.json")
    assert plan.blocks == sorted((layer, layer + 1) for layer in search.order[:len(plan.blocks)])
    assert not list((composed.folder / FEW).glob("linear_prefix/search*"))


def test_tables_name_every_fit_and_its_time(composed):
    summary = pd.read_csv(composed.folder / "results/summary.csv").set_index("method")
    assert list(summary.index) == ["dense", *VARIANTS] and summary.ppl.notna().all()
    fits = pd.read_csv(composed.folder / "results/tables/fits.csv")
    for variant in VARIANTS:
        record = store.read(composed.folder / POINT.format(variant) / "composed.safetensors")
        own = fits[fits.method == variant].set_index("block")
        assert list(own.index) == [*(f"{start}-{stop}" for start, stop in (fit["block"] for fit in record.fits)), "all"]
        assert own.heldout_error.dropna().tolist() == pytest.approx([fit["heldout_error"] for fit in record.fits])
        assert own.seconds["all"] == summary.fit_seconds[variant] == pytest.approx(record.stats["seconds"])
    # only this variant runs the model to choose what is removed
    search = store.read(composed.folder / FEW / "kdp_residual/search-k3.json")
    assert summary.search_seconds.dropna().to_dict() == {"kdp_residual": pytest.approx(search.stats["seconds"])}
    best = min((row["heldout_loss"], row["heldout_kl"]) for row in store.read(
        composed.folder / POINT.format("kdp_residual") / "composed.safetensors").curve)
    assert fits[fits.method == "kdp_residual"].heldout_kl.dropna().tolist() == pytest.approx([best[1]])


def test_the_figure_of_joint_training_draws_the_curve_on_record(composed):
    drawn = pd.read_csv(composed.folder / "results/figures/pico/few/kdp_residual-joint.csv")
    curve = store.read(composed.folder / POINT.format("kdp_residual") / "composed.safetensors").curve
    assert drawn.epoch.tolist() == [0, 1] and set(drawn.point) == {"ratio 0.1, K max 3"}
    assert drawn.heldout_kl.tolist() == pytest.approx([row["heldout_kl"] for row in curve])
    assert not (composed.folder / "results/figures/pico/few/linear_prefix-joint.png").exists()


def test_an_unchanged_project_has_nothing_to_do(composed):
    assert composed.planned(SUMMARY) == {}


def test_the_learning_rate_reruns_compose_and_later_only(changed):
    changed.config["methods"]["kdp_residual"]["compose"]["lr"] = 0.001
    planned = changed.planned(SUMMARY)
    assert planned["compose"] == planned["fold"] == planned["evaluate"] == 1
    assert not {"search", "blocks", "hidden", "similarity", "dense"} & set(planned)


def test_the_entries_of_a_stand_in_choose_blocks_anew_from_the_same_search(changed):
    changed.config["methods"]["kdp_residual"]["compose"]["entries"] = 6
    planned = changed.planned(SUMMARY)
    assert planned["blocks"] == planned["compose"] == 1 and "search" not in planned


def test_options_of_the_search_rerun_it_and_all_that_follows(changed):
    changed.config["methods"]["kdp_residual"]["search"]["judge_sequences"] = 5
    planned = changed.planned(SUMMARY)
    assert planned["search"] == planned["blocks"] == planned["compose"] == 1
    assert not {"hidden", "similarity"} & set(planned)


def test_an_order_by_similarity_reads_the_record_and_runs_after_it(changed):
    changed.config["methods"]["alike"] = {"base": "kdp_residual", "search": {"order": "cka"}}
    target = FEW + "/alike/search-k3.json"
    changed.run(target)
    alike, search = (store.read(changed.folder / at) for at in (FEW + "/similarity.safetensors", target))
    assert search.single == {str(layer): pytest.approx(1 - alike.cka_linear_LL[layer - 1, layer + 1].item(), abs=1e-12)
                             for layer in range(1, 9)}
    changed.config["similarity"]["seed"] = 1
    assert changed.planned(target) == {"similarity": 1, "search": 1}
    # the order by divergence reads no similarity
    assert changed.planned(FEW + "/kdp_residual/search-k3.json") == {}


def test_a_variant_on_a_variant_shares_its_search_unless_it_searches_otherwise(changed):
    changed.config["methods"] |= {"quick": {"base": "kdp_residual", "compose": {"epochs": 0}},
                                  "wide": {"base": "quick", "search": {"judge_sequences": 5}}}
    assert changed.planned(POINT.format("quick") + "/composed.safetensors") == {"blocks": 1, "compose": 1}
    assert changed.planned(POINT.format("wide") + "/plan.json") == {"search": 1, "blocks": 1}


def test_an_option_that_the_library_refuses_is_one_clear_line(changed):
    # a variant of its own, because the output of a failed job is deleted
    changed.config["methods"]["greedy"] = {"base": "kdp_residual", "search": {"judge_sequences": 40}}
    text = changed.run(FEW + "/greedy/search-k3.json", check=False)
    assert "SearchError" in text and "lower judge_sequences or add calibration" in text and "Traceback" not in text
