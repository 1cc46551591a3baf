"""Every checkpoint of a run has its model card and says how it was made, in itself and beside it."""
import json

import pandas as pd
import pytest
import yaml

from kdp_core.results.card import PLUS_MINUS
from tests.workflow.project import Project

POINT = "results/pico/few/kdp/r0.1-k3"


@pytest.fixture(scope="module")
def card(built):
    return (built.folder / POINT / "card.md").read_text(encoding="utf-8")


def test_card_and_provenance_are_in_the_checkpoint_too(built, card):
    for method in ("remove", "linear", "kdp"):
        point = built.folder / f"results/pico/few/{method}/r0.1-k3"
        for outside, inside in (("card.md", "README.md"), ("provenance.json", "kdp.json")):
            assert (point / outside).read_bytes() == (point / "checkpoint" / inside).read_bytes()


def test_the_card_has_the_scores_of_the_table_with_their_errors(built, card):
    scores = pd.read_csv(built.folder / "results/scores.csv", keep_default_na=False, na_values=[""])
    rows = scores[(scores.method == "kdp") & (scores.task != "efficiency")]
    assert len(rows) > 3
    for row in rows.itertuples():
        line, = (line for line in card.splitlines() if line.startswith(f"| {row.task} | {row.metric} ("))
        value = f"{row.value:.4g}" + ("" if pd.isna(row.stderr) else f"{PLUS_MINUS}{row.stderr:.2g}")
        assert line.split("|")[4].strip() == value


def test_provenance_has_config_seeds_versions_inputs_and_code(built):
    made = json.loads((built.folder / POINT / "provenance.json").read_text())
    assert made["config"]["methods"]["kdp"]["kernel"]["features"] == 32
    assert made["seeds"] == {"calibration few": 0, "evaluation": 0, "kdp, kernel": 0, "kdp, inverse": 0}
    assert {"python", "torch", "transformers"} <= set(made["versions"])
    assert len([name for name in made["inputs"] if name.endswith(".safetensors")]) >= 2
    assert len(made["tokens_sha256"]) == 64 and made["pruned"]["method"] == "kdp" and "git" in made


def test_the_configuration_of_a_card_makes_the_checkpoint_again(built, card, tmp_path):
    given = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    # the sources lie beside the project
    for kind, names in (("models", ["pico"]), ("texts", ["made"])):
        for name in names:
            given[kind][name]["source"] = str(built.folder / given[kind][name]["source"])
    project = Project(tmp_path)
    project.config |= given
    project.config["texts"]["heldout"] = {"source": str(built.folder / "heldout.txt"), "format": "lines"}
    project.run(f"{POINT}/checkpoint")
    weights = f"{POINT}/checkpoint/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (built.folder / weights).read_bytes()


def test_no_card_names_a_place_of_this_machine(built):
    places = (str(built.folder.parent).encode(), b"/home/", b"/root/", b"/tmp/")
    for path in [*built.folder.rglob("card.md"), *built.folder.rglob("provenance.json")]:
        assert not any(place in path.read_bytes() for place in places), path
