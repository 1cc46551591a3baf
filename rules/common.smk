"""The check of the config, wildcards, input functions and resources that need Snakemake.

Code that does not need Snakemake is in workflow_scripts/planning.
"""

import os
import re
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

# Snakemake passes this path to the scripts, which therefore find job.py and gather.py
sys.path.insert(0, f"{workflow.basedir}/workflow_scripts")

from planning import (
    code,
    evaluation,
    failures,
    figures,
    grid,
    refusals,
    resources,
    variants,
)
from planning.config import check
from planning.grid import BLOCK, POINT, POINT_NAME, SEARCH
from planning.messages import ConfigError

try:
    config.update(check(config))
    FAMILIES = grid.seed_families(config)
    config.update(grid.with_seeds_apart(config))
    config.update(refusals.without_refused(config))
except ConfigError as error:
    failures.say_last(str(error))
    raise WorkflowError(str(error)) from None

if workflow.is_main_process:
    for point, reason in refusals.named(config).items():
        print(f"left out: {point}: {reason}", file=sys.stderr)
POINTS = grid.points(config)
GRID = grid.grid_points(config)
STEPS = {name: variants.fits(config, name) for name in grid.run_variants(config)}
SPLIT = config["evaluate"].get("split", False)


wildcard_constraints:
    model="|".join(config["models"]),
    calib="|".join(config["calibrations"]),
    method="|".join(config["methods"]),
    text="|".join(config["texts"]),
    ratio=r"0\.\d+",
    k_max=r"\d+",
    start=r"\d+",
    stop=r"\d+",
    step=r"[a-z_]+",
    task="|".join(map(re.escape, evaluation.evaluated(config))),


def one_of(names):
    """A constraint by which a wildcard matches only these names. Without names it matches nothing."""
    return "|".join(map(re.escape, names)) or r"(?!)"


def embedded(section):
    """Names of a section of the embedded default that the configuration has with the same entries."""
    own = yaml.safe_load(
        Path(workflow.basedir, "config.yaml").read_text(encoding="utf-8")
    )[section]
    return [name for name, entry in own.items() if config[section].get(name) == entry]


def model_of(wildcards):
    """The config's entry for a model."""
    return config["models"][wildcards.model]


def dtype_of(wildcards):
    """The precision of a model's forward passes."""
    return model_of(wildcards).get("dtype", "float32")


def device_of(wildcards):
    """The device of a model."""
    return resources.device(config, wildcards.model)


def method_of(wildcards):
    """The method of a variant."""
    return variants.base_of(config, wildcards.method)


def options_of(part):
    """A variant's options for one part, such as `search`, or for the step that the wildcard names."""
    return lambda wildcards: variants.options(config, wildcards.method).get(
        wildcards.step if part == "step" else part, {}
    )


def code_of(part):
    """The hash of the library code of one part of a variant's method, or of the step that the wildcard names."""
    return lambda wildcards: code.of_method(
        f"methods/{part}",
        method_of(wildcards),
        wildcards.step if part == "step" else part,
    )


def one_task(wildcards):
    """The config's section `evaluate` with a single task."""
    return evaluation.one_task(config["evaluate"], wildcards.task)


def of_tasks(folder):
    """A model's records of single tasks, if each task is a job of its own."""
    names = evaluation.evaluated(config) if SPLIT else []
    return [f"{folder}/{name}.json" for name in names]


def known_options(section, names):
    """The options of a section that a rule knows."""
    return {name: value for name, value in section.items() if name in names}


def environment(name="cpu"):
    """The environment file of a rule."""
    return f"../envs/{name}.yaml"


def kept_or_not(states):
    """The states. With `hidden.keep: false` they are deleted after the last job that reads them."""
    return (
        directory(states)
        if config.get("hidden", {}).get("keep", True)
        else temp(directory(states))
    )


def shards_of(wildcards):
    """The shards from which the states of a calibration set are joined."""
    folder = "results/{model}/{calib}/hidden-shards".format(**wildcards)
    return [
        f"{folder}/{start}-{stop}"
        for start, stop in resources.shards(config, wildcards.calib)
    ]


def memory_mb(base, weights=0, states=0):
    """The memory of a job in megabytes: `base`, copies of the model's weights, and states of all tokens.

    `states` is a number, or a function of the wildcards. Each further attempt asks for 1.5 times as much memory as the
    attempt before.
    """

    def asked(wildcards, attempt):
        size = base
        if weights:
            size += weights * resources.weights_mb(config, wildcards.model)
        if states:
            count = states(wildcards) if callable(states) else states
            size += count * resources.state_mb(config, wildcards.model, wildcards.calib)
        return int(size * 1.5 ** (attempt - 1))

    return asked


def minutes(base, per_billion=0):
    """The minutes of a job: `base`, and `per_billion` for each billion parameters.

    Each further attempt asks for twice as many minutes as the attempt before.
    """

    def asked(wildcards, attempt):
        time = base
        if per_billion:
            params = resources.size_of(config, wildcards.model)["params"]
            time += per_billion * params / 1e9
        return int(time * 2 ** (attempt - 1))

    return asked


def gpus(wildcards):
    """The number of GPUs of a job that runs on the device of its model."""
    return resources.gpus(config, wildcards.model)


def one_gpu(wildcards):
    """The number of GPUs, at most one, of a job that reads states and loads no model."""
    return min(1, gpus(wildcards))


def one_node(wildcards):
    """1 node if a job takes several GPUs; None if it takes one GPU or none."""
    return 1 if gpus(wildcards) > 1 else None


def on_gpu(name, otherwise=None):
    """A default resource of the profile for jobs with a GPU, and `otherwise` for other jobs. None sets no resource."""
    return lambda wildcards: site(name) if gpus(wildcards) else otherwise


def site(name):
    """A default resource as the profile has it; None if the profile has no resource of this name."""
    given = workflow.resource_settings.default_resources or {}
    return given[name].raw if name in given else None


# resources of jobs that run on the device of their model; the profile says where they run
GPU = {"gpu": gpus, "nodes": one_node}
if site("gpu_type"):
    GPU["gpu_model"] = on_gpu("gpu_type")
if site("gpu_partition"):
    GPU["slurm_partition"] = on_gpu("gpu_partition", site("slurm_partition"))
ONE_GPU = GPU | {"gpu": one_gpu}


def records_of(point):
    """The records that `fold` reads for a grid point: its composed record, or those of every step of every block."""
    source = variants.source_of(config, point["method"])
    point = {key: point[key] for key in grid.KEYS} | {"method": source}
    if not variants.has(config, source, "compose"):
        # Snakemake raises an exception here until the blocks are selected
        checkpoints.blocks.get(**point)
    return grid.fitted_files(point, variants.fits(config, source))


def of_points(name):
    """The file of this name of every grid point."""
    return [f"{grid.folder(point)}/{name}" for point in POINTS]


def of_source(name):
    """The file of this name of the variant that a fine-tuned variant starts from."""

    def file(wildcards):
        source = variants.source_of(config, wildcards.method)
        return f"{grid.folder(dict(wildcards) | {'method': source})}/{name}"

    return file


def all_records(wildcards=None):
    """The records of all fits of all grid points. Each record is listed once, in the order of the grid."""
    return list(dict.fromkeys(path for point in POINTS for path in records_of(point)))


def basis_of(wildcards):
    """The file by which a variant's blocks are selected: its own search, a shared search, or the similarity."""
    search = variants.search_of(config, wildcards.method)
    if search:
        return SEARCH.format(**dict(wildcards) | {"method": search})
    return "results/{model}/{calib}/similarity.safetensors".format(**wildcards)


def similarity_read(wildcards):
    """The similarity, if the search of a variant reads it."""
    file = "results/{model}/{calib}/similarity.safetensors".format(**wildcards)
    return file if variants.reads_similarity(config, wildcards.method) else []


def steps_before(wildcards):
    """The records of the method's earlier steps on the same block."""
    names = variants.steps(config, wildcards.method)
    return [
        f"{BLOCK.format(**wildcards)}/{name}.safetensors"
        for name in names[: names.index(wildcards.step)]
    ]


def trained(wildcards, step):
    """The records of one step on every block that a variant has trained on a calibration set, by first layer."""
    points = grid.points_like(POINTS, wildcards)
    found = {path for point in points for path in records_of(point)}
    return grid.by_layer(
        path for path in found if os.path.basename(path) == f"{step}.safetensors"
    )


def dense_measured():
    """The scores and costs of the dense models."""
    return [
        f"results/{model}/{name}.json"
        for model in config["grid"]["models"]
        for name in ("scores", "efficiency")
    ]


def everything_measured(wildcards):
    """All files that the tables and the overview figures read."""
    names = ("plan.json", "pruned.json", "scores.json", "efficiency.json")
    tuned = [point for point in POINTS if "source" in point]
    searches = dict.fromkeys(filter(None, map(grid.search_file, POINTS)))
    return (
        [path for name in names for path in of_points(name)]
        + [f"{grid.folder(point)}/finetuned.json" for point in tuned]
        + list(searches)
        + all_records()
        + dense_measured()
    )


def theories(wildcards=None):
    """The records of both theorems for every model and calibration set."""
    if "theory" not in config:
        raise WorkflowError(
            "the config has no `theory`; add it, or use --configfile configs/theory.yaml"
        )
    return [
        f"results/{model}/{calib}/theory.json"
        for model, calib in grid.calibrated(config)
    ]


def theory_wanted():
    """The tables of both theorems, if the config asks for them."""
    return ["results/tables/theory.csv"] if "theory" in config else []


def tables_wanted():
    """The tables of the paper and of the ablations, and the table of calibration seeds if there are several."""
    seeds = ["results/tables/seeds.csv"] if FAMILIES else []
    ablations = [
        f"results/tables/ablation-{name}.csv" for name in config.get("ablations", {})
    ]
    return ["results/tables/paper/index.md", *ablations, *seeds]


TABLE_FORMS = ("csv", "md", "tex")


def paper_table(name):
    """The files of one of the paper's tables."""
    return [
        listed(f"results/tables/paper/{name}.{suffix}", f"the paper's {name}", "paper")
        for suffix in TABLE_FORMS
    ]


def listed(path, name, caption="summary"):
    """A table in Snakemake's report, labelled with its name and the kind of its file."""
    return report(
        path,
        caption=f"captions/{caption}.rst",
        category="Tables",
        labels={"table": name, "file": path.rsplit(".", 1)[-1]},
    )
