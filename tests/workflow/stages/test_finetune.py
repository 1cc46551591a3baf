"""Fine-tuned variants share fits and plan with the variant that they start from; only fine-tuning and later runs."""
import shutil

import pandas as pd
import pytest

from kdp_core.base import store
from kdp_core.model import checkpoints
from tests.workflow.project import Project

AT = "results/pico/few/{}/r0.1-k3"


@pytest.fixture(scope="module")
def tuned(built, tmp_path_factory):
    """The built project with a variant that is fine-tuned from one that the grid does not name."""
    project = Project(tmp_path_factory.mktemp("finetune") / "project")
    shutil.copytree(built.folder, project.folder, symlinks=True)
    project.config["methods"]["linear_ft"] = {"base": "linear", "finetune": {"rank": 2, "lr": 0.01}}
    project.config["grid"]["methods"] = ["linear_ft"]
    project.run("results/tables/summary.md")
    return project


def test_plan_and_fits_are_the_sources(tuned):
    plans = [store.read(tuned.folder / AT.format(variant) / "plan.json") for variant in ("linear", "linear_ft")]
    assert plans[0] == plans[1] and plans[0].blocks
    assert not list((tuned.folder / "results/pico/few").glob("linear_ft*/blocks"))
    assert set(pd.read_csv(tuned.folder / "results/tables/fits.csv").method) == {"linear"}


def test_a_checkpoint_of_its_own_is_measured_and_counted(tuned):
    at = tuned.folder / AT.format("linear_ft")
    facts, source = (store.read(tuned.folder / AT.format(name) / "pruned.json") for name in ("linear_ft", "linear"))
    record = store.read(at / "finetuned.json")
    assert record.options["rank"] == 2 and record.options["lr"] == 0.01 and len(record.curve) == 3
    assert facts.params_after == source.params_after + record.params_added
    assert checkpoints.load_model(at / "checkpoint").num_parameters() == facts.params_after


def test_tables_tell_fine_tuned_variants_by_a_dagger_and_count_their_time(tuned):
    summary = pd.read_csv(tuned.folder / "results/summary.csv")
    assert dict(zip(summary.method, summary.finetuned, strict=True)) == {"dense": False, "linear_ft": True}
    at = tuned.folder / AT.format("linear_ft")
    seconds = store.read(at / "finetuned.json").seconds + sum(
        store.read(path).stats["seconds"] for path in (tuned.folder / "results/pico/few/linear/blocks").rglob("*.*"))
    assert summary.set_index("method").fit_seconds["linear_ft"] == pytest.approx(seconds)
    text = (tuned.folder / "results/tables/summary.md").read_text(encoding="utf-8")
    assert r"linear\_ft†" in text and "dense†" not in text


def test_other_options_of_fine_tuning_rerun_no_fit_and_no_fold(tuned):
    assert tuned.planned("results/tables/summary.md") == {}
    tuned.config["methods"]["linear_ft"]["finetune"]["lr"] = 0.02
    planned = tuned.planned("results/tables/summary.md")
    assert planned["finetune"] == 1 and planned["evaluate"] == 1
    assert not {"blocks", "step", "fold", "hidden", "tokens"} & set(planned)
