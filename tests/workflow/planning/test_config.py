"""The check of a configuration, and the words of its messages."""
import pytest
import yaml
from planning.config import check
from planning.messages import ConfigError

from kdp_core.methods import METHODS
from tests.workflow.planning.configs import with_ablation, with_model, with_seeds
from tests.workflow.project import CONFIG, ROOT

CONFIGS = sorted([ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path):
    base = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    from snakemake.utils import update_config

    update_config(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    check(base)


def test_the_embedded_default_has_the_quick_setting_that_the_command_line_takes():
    own = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["methods"]
    assert own["kdp_residual"] == METHODS["kdp_residual"].quick


@pytest.mark.parametrize("methods, words", [
    ({"linear": {"finetune": {}}}, "finetune starts from the checkpoint of a variant; name one of methods as `base`"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {}, "fit": {}}}, "a is fine-tuned and sets 'fit' too"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {}}, "b": {"base": "a"}}, "'a', which is fine-tuned"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {"ranks": 2}}}, "'ranks' at methods.a.finetune"),
    ({"linear": {}, "a": {"base": "linear", "finetune": {"judge": "acc"}}}, "must be one of ['loss', 'ppl']"),
])
def test_a_fine_tuned_variant_is_refused_where_it_is_more_or_less_than_that(methods, words):
    config = {**CONFIG, "methods": methods, "grid": {**CONFIG["grid"], "methods": ["linear"]}}
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert words in str(refused.value)


@pytest.mark.parametrize("own, words", [
    ({"variants": ["kdp", "kdp_9"]}, "variants names 'kdp_9', which is not defined; did you mean 'kdp_8'"),
    ({"calibrations": ["fewer"]}, "ablations.size.calibrations names 'fewer'"),
    ({"x": ["kernel.rank"]}, "x is kernel.rank, which methods.kdp does not set; write it into the variant"),
    ({"x": ["features"]}, "ablations.size.x.0 is 'features', but must match"),
    ({"metrics": []}, "ablations.size.metrics is"),
    ({"rows": ["kdp"]}, "unknown key 'rows' at ablations.size; did you mean 'variants'"),
])
def test_an_ablation_is_checked_with_the_config(own, words):
    with pytest.raises(ConfigError) as error:
        check(with_ablation(**own))
    assert words in str(error.value)


@pytest.mark.parametrize("seeds, more, words", [
    ([], {}, "calibrations.few.seeds is [], but must not be empty"),
    ([1, 1], {}, "must not contain a value twice"),
    ([-1], {}, "must be at least 0"),
    ([3], {"few-s3": CONFIG["calibrations"]["few"]}, "'few-s3', which already exists; rename the existing set"),
])
def test_seeds_that_cannot_be_run_are_refused(seeds, more, words):
    config = with_seeds(*seeds)
    with pytest.raises(ConfigError) as refused:
        check({**config, "calibrations": {**config["calibrations"], **more}})
    assert words in str(refused.value)


def test_more_shards_than_batches_are_refused_before_any_job():
    study = {"title": "A", "caption": "B", "variants": ["kdp"], "x": ["variant"], "calibrations": ["small"]}
    config = {**CONFIG, "hidden": {"shards": 5},
              "calibrations": {**CONFIG["calibrations"], "small": {"length": 24, "seed": 0, "mix": {"made": 9}}}}
    # 40 sequences are 5 batches of 8; a set that nothing runs does not count
    check(config)
    for change, words in (({"hidden": {"shards": 6}}, "hidden.shards is 6, but calibrations.few has 5 batches of "
                                                      "hidden.batch_sequences 8; take at most 5 shards"),
                          ({"ablations": {"a": study}}, "calibrations.small has 2 batches"),
                          ({"hidden": {"shards": 0}}, "hidden.shards is 0, but must be at least 1"),
                          ({"hidden": {"batch_sequences": 0}}, "batch_sequences is 0, but must be at least 1")):
        with pytest.raises(ConfigError) as refused:
            check(config | change)
        assert words in str(refused.value)


@pytest.mark.parametrize("config, words", [
    (with_model(gpus=2), "models.pico.gpus is 2, but device cpu is a single device; set device to balanced"),
    (with_model(device="cuda", max_memory={0: "1GiB"}), "is {0: '1GiB'}, but device cuda is a single device"),
    (with_model(device="balanced", max_memory={1: "1GiB"}), "max_memory names 1; name cpu, or a GPU by its number, "
                                                            "below models.pico.gpus, which is 1"),
    (with_model(device="balanced", max_memory={"disk": "1GiB"}), "max_memory names 'disk'; name cpu"),
    (with_model(device="balanced", max_memory={"cpu": "1 gig"}), "max_memory.cpu is '1 gig', but must match"),
    (with_model(device="balanced", max_memory={"cpu": 1}), "must be of type string"),
    (with_model(device="balanced", gpus=0), "models.pico.gpus is 0, but must be at least 1"),
    (with_model(device="balanced", methods=["wanda"]), "device is balanced, but `compose` of variant 'wanda' needs "
                                                       "a model on one device; leave it out, or set a device"),
    (with_model(device="balanced", methods=["sleb"]), "`search` of variant 'sleb'"),
    (with_model({"models": ["other"]}, methods=["kdp_residual"]), "models.other.device is balanced, but `compose` of"),
    (with_model(device="balanced") | {"spaces": {}}, "but `spaces` needs a model on one device"),
])
def test_devices_that_do_not_go_together_are_refused(config, words):
    with pytest.raises(ConfigError) as refused:
        check(config)
    assert words in str(refused.value)


def test_a_fine_tuned_variant_of_a_spread_model_is_refused_and_variants_that_read_states_are_not():
    config = with_model(device="balanced", methods=["shortgpt", "lorp", "linear_sequential", "deepest"])
    check(config)
    # a model that the grid does not run may be spread
    check(with_model(methods=["wanda"]))
    config["methods"]["tuned"] = {"base": "kdp", "finetune": {}}
    config["grid"]["methods"].append("tuned")
    with pytest.raises(ConfigError, match="`finetune` of variant 'tuned' needs a model on one device"):
        check(config)
