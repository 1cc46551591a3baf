"""Bad input: one clear error that names the value, before anything expensive has run."""
import copy
import json
import os

import pytest
import safetensors.torch
from planning.config import check
from planning.messages import ConfigError

from tests import pico
from tests.workflow.project import CONFIG, Project


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Model and texts that the tests of this file only read."""
    return Project(tmp_path_factory.mktemp("bad")).make()


@pytest.fixture
def project(shared, tmp_path):
    """The shared project under a folder of its own, sources as absolute paths."""
    made = Project(tmp_path)
    made.config["models"]["pico"]["source"] = str(shared.folder / "model")
    for name in ("made", "heldout"):
        made.config["texts"][name]["source"] = str(shared.folder / f"{name}.txt")
    return made


def refused(project, *arguments):
    """What snakemake printed, having failed."""
    text = project.run(*arguments, check=False)
    assert "Traceback" not in text, text[-3000:]
    return text


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(modles={}), "unknown key 'modles' at the top level; did you mean 'models'?"),
    (lambda c: c["methods"]["kdp"]["kernel"].update(epoch=3),
     "unknown key 'epoch' at methods.kdp.kernel; did you mean 'epochs'?"),
    (lambda c: c["grid"].update(ratios=[1.5]), "grid.ratios.0 is 1.5, but must be below 1"),
    (lambda c: c["grid"].update(methods=["kpd"]),
     "grid.methods names 'kpd', which is not defined; did you mean 'kdp'?"),
    (lambda c: c["grid"].update(k_max=[1]), "grid.k_max.0 is 1, but must be at least 2"),
    (lambda c: c["methods"].update(x={"base": "y"}), "methods.x.base is 'y', which is neither a variant nor a method"),
    (lambda c: c["methods"].update(x={"base": "linear_sequentia", "finetune": {}}),
     "is neither a variant nor a method"),
    (lambda c: c["methods"].update(x={"base": "linear", "finetune": {"rank": 0}}),
     "methods.x.finetune.rank is 0, but must be at least 1"),
    (lambda c: c["methods"].update(x={"base": "kdp_residual", "compose": {"dictionary": "neuron"}}),
     "methods.x.compose.dictionary is 'neuron', but must be one of ['neurons', "),
    (lambda c: c["methods"].update(x={"base": "kdp_residual", "search": {"judge_sequence": 8}}),
     "unknown key 'judge_sequence' at methods.x.search; did you mean 'judge_sequences'?"),
    (lambda c: c["methods"].update(linear_prefix={"search": {}}), "unknown key 'search' at methods.linear_prefix"),
    (lambda c: c["methods"]["kdp"].update(block={"criterion": "cosin"}),
     "methods.kdp.block.criterion is 'cosin', but must be one of ['cka_linear', 'cka_rbf', 'cosine']: "),
    (lambda c: c["methods"]["kdp"]["kernel"].update(loss="chian"),
     "methods.kdp.kernel.loss is 'chian', but must be one of ['steps', 'chain']: "),
    (lambda c: c["methods"]["kdp"]["kernel"].update(epochs=-3),
     "methods.kdp.kernel.epochs is -3, but must be at least 0: "),
    (lambda c: c["methods"]["kdp"]["kernel"].update(features=31),
     "methods.kdp.kernel.features is 31, but must be a multiple of 2: "),
    (lambda c: c["methods"]["kdp"]["inverse"].update(activation="glu2"),
     "methods.kdp.inverse.activation is 'glu2', but must be one of ['gelu', 'relu', 'silu', 'tanh']: "),
    (lambda c: c.update(figures={"rows": ["kdp"]}), "unknown key 'rows' at figures; did you mean 'variants'?"),
    (lambda c: c["models"]["pico"].update(dtype="fp8"), "models.pico.dtype is 'fp8', but must be one of"),
    (lambda c: c["evaluate"].update(benchmarks={"tasks": ["piqqa"]}),
     "evaluate.benchmarks.tasks.0 is 'piqqa', but must be one of ['cmnli', "),
    (lambda c: c["evaluate"].update(benchmarks={"tasks": ["mbpp"]}), "set evaluate.benchmarks.allow_code to true"),
    (lambda c: c["evaluate"].update(benchmarks={"tasks": ["piqa"], "limits": {"copa": 3}}),
     "evaluate.benchmarks.limits names 'copa'"),
    (lambda c: c["evaluate"].update(benchmarks={"tasks": ["piqa"], "data": "nowhere"}),
     "nowhere/eval/piqa_val.jsonl does not exist; add the file, set `data: hub`"),
    (lambda c: c["evaluate"].update(benchmarks={"tasks": ["piqa"]}, tasks=["piqa"]), "name it once"),
    (lambda c: c["calibrations"]["few"].pop("seed"), "calibrations.few lacks 'seed'"),
    (lambda c: c["similarity"].update(batch=600), "similarity.batch is 600, but only 512 tokens of calibrations.few"),
    (lambda c: c["methods"]["kdp"].update(block=3), "methods.kdp.block is 3, but must be of type object"),
    (lambda c: c["evaluate"].update(tasks=["../x"]), "evaluate.tasks.0 is '../x', but must match"),
    (lambda c: c["texts"].update({"a\n": {"source": "x"}}), "unknown key 'a\\n' at texts"),
])
def test_a_wrong_config_is_refused(change, words):
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises(ConfigError) as error:
        check(config)
    assert words in str(error.value)


def test_the_config_is_refused_before_any_job(project):
    project.config["methods"]["kdp"]["kernel"]["epoch"] = 3
    text = refused(project, "--dry-run")
    assert "unknown key 'epoch' at methods.kdp.kernel; did you mean 'epochs'?" in text
    assert not (project.folder / "results").exists()


def unusable(folder, **entries):
    """A local model whose configuration has other entries."""
    pico.save(folder, "llama", layers=1)
    described = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def test_a_local_folder_that_cannot_be_pruned_is_refused_with_the_config(project, tmp_path):
    source = unusable(tmp_path / "other", model_type="falcon")
    project.config["models"]["pico"]["source"] = source
    text = refused(project, "--dry-run")
    # it is the last thing that a user reads
    assert f"config: models.pico: {source}: family 'falcon' is not supported; choose" in text.strip().splitlines()[-1]
    assert not (project.folder / "results").exists()


def test_a_folder_is_looked_at_until_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = copy.deepcopy(CONFIG)
    config["models"]["pico"]["source"] = unusable(tmp_path / "other", quantization_config={"bits": 4})
    with pytest.raises(ConfigError, match=r"models\.pico: .*other is quantised"):
        check(config)
    (tmp_path / "results/pico").mkdir(parents=True)
    (tmp_path / "results/pico/facts.json").touch()
    check(config)


def test_missing_files_stop_a_run_before_its_first_job_if_its_jobs_run_here(project, monkeypatch):
    project.config["models"]["pico"]["source"] = "no/such/model"
    text = refused(project)
    assert text.strip().splitlines()[-1].startswith("config: models.pico.source is 'no/such/model', and no such file")
    assert "Fetching" not in text and not (project.folder / "results/texts").exists()
    # a dry run runs nothing, and the jobs of an executor may run where the model is
    assert project.planned("results/pico/facts.json") == {"dense": 1}
    monkeypatch.setenv("SLURM_CONF", os.devnull)
    text = refused(project, "--executor", "slurm", "--jobs", "1", "results/pico/facts.json")
    assert "note: config: models.pico.source is 'no/such/model'" in text
    assert "Fetching and converting model pico" in text and not text.strip().splitlines()[-1].startswith("config: ")


def test_a_wrong_hash_shows_both(project, shared):
    project.config["texts"]["made"]["sha256"] = "0" * 64
    text = refused(project, "results/texts/made.jsonl")
    from kdp_core.model.assets import sha256_of
    assert "HashMismatch" in text and "0" * 64 in text and sha256_of(shared.folder / "made.txt") in text


def test_weights_that_are_not_numbers_are_named(project, tmp_path):
    folder = pico.save(tmp_path / "nan", "llama")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    project.config["models"]["pico"]["source"] = str(folder)
    text = refused(project, "results/pico/facts.json")
    # the last thing that a user reads, below what snakemake says of the failure
    last = text.strip().splitlines()[-1]
    assert last.startswith("dense: ModelError: ") and "model.layers.1.mlp.up_proj.weight" in last
    assert last.endswith("(whole trace: results/logs/dense/pico.log)")


def test_a_ratio_out_of_reach_stops_before_training_and_says_the_largest(project):
    project.config["grid"].update(ratios=[0.9], methods=["kdp"])
    text = refused(project)
    assert "ratio 0.9 is too high" in text and "remove at most 0." in text
    assert not (project.folder / "results/pico/few/kdp/blocks").exists()


def test_a_collapsed_kernel_is_named_with_its_remedy(project):
    project.config["grid"]["methods"] = ["kdp"]
    project.config["methods"]["kdp"]["kernel"]["bandwidth_scale"] = 1e6
    text = refused(project, "results/pico/few/kdp/blocks/4-6/kernel.safetensors")
    assert "KernelCollapsed" in text and "lower kernel.bandwidth_scale" in text
