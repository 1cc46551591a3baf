"""Theorems 1 and 2 through the workflow, where the config has `theory`; what cannot be measured is refused at once."""
import copy

import pandas as pd
import pytest
from planning import figures, variants
from planning.config import check
from planning.messages import ConfigError

from kdp_core.base import store
from tests.workflow.project import CONFIG, Project

THEORY = {"method": "kdp", "run": [3, 6], "kernel": {"epochs": 1, "heldout": 0.2}, "gaps": [1, 3],
          "feature_counts": [16], "operator_ridges": [0.01]}


def with_theory(**theory):
    return copy.deepcopy(CONFIG) | {"theory": theory}


def test_record_tables_and_figure(copied):
    copied.config["theory"] = THEORY
    copied.run("--cores", "1", "results/tables/theory.csv", "results/figures/pico/few/theory.png")
    record = store.read(copied.folder / "results/pico/few/theory.json")
    # the variant's features, theory's own epochs and share of judged sequences
    assert record.block == (3, 6) and record.features == 32 and record.stats["kernel_epochs"] == 1
    assert record.sequences == 32 and len(record.horizons) == 6 and len(record.ridges) == 1
    assert all(row["train_rms"] <= row["bound_erm"] * 1.00001 for row in record.horizons)
    frame = pd.read_csv(copied.folder / "results/tables/theory.csv")
    assert set(frame["model"]) == {"pico"} and len(frame[frame["what"] == "risk"]) == len(record.risks)
    assert "B_A" in (copied.folder / "results/tables/theory.md").read_text(encoding="utf-8")


def test_tables_and_a_figure_of_the_report_where_the_config_has_theory(tmp_path):
    text = Project(tmp_path).run("--dry-run", "results/tables/theory.csv", check=False)
    assert "no `theory`" in text and "configs/theory.yaml" in text
    names = [[entry["name"] for entry in figures.figure_entries(config)]
             for config in (CONFIG, with_theory(**THEORY))]
    assert "pico/few/theory" not in names[0] and "pico/few/theory" in names[1]


def test_step_1_takes_the_options_of_the_variant_and_its_own_over_them():
    config = with_theory(**THEORY)
    check(config)
    assert variants.theory_kernel(config) == {"features": 32, "epochs": 1, "batch_sequences": 20, "heldout": 0.2}
    assert set(variants.theory_options(config)) == {"gaps", "feature_counts", "operator_ridges"}
    assert variants.theory_kernel(CONFIG) == variants.theory_options(CONFIG) == {}


@pytest.mark.parametrize("change, message", [
    ({"method": "kpd"}, "theory.method names 'kpd'.*did you mean 'kdp'"),
    ({"method": "linear"}, "'linear' has no step `kernel`"),
    ({"run": [6, 6]}, r"theory.run is \[6, 6\], an empty run"),
    ({"run": [6]}, "theory.run"),
    ({"kernel": {"epoch": 1}}, "unknown key 'epoch' at theory.kernel; did you mean 'epochs'"),
    ({"seed": 1}, "unknown key 'seed' at theory"),
])
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check(with_theory(**THEORY | change))
