"""Config check, wildcards and input functions shared by all stages."""

import json
import os
import re
import sys

from snakemake.exceptions import WorkflowError

sys.path.insert(0, f"{workflow.basedir}/rules")

import plumbing

try:
    plumbing.check(config)
except plumbing.ConfigError as error:
    raise WorkflowError(str(error)) from None

FAMILIES = plumbing.seed_families(config)
config.update(plumbing.with_seeds_apart(config))
POINTS = plumbing.points(config)
GRID = plumbing.grid_points(config)
FINETUNED = [
    name for name in config["methods"] if plumbing.source_of(config, name) != name
]
STEPS = {name: plumbing.fits(config, name) for name in plumbing.rows(config)}
SPLIT = config["evaluate"].get("split", False)
DPI = config.get("figures", {}).get("dpi", 200)
FIGURES = plumbing.figure_entries(config)


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
    task="|".join(map(re.escape, plumbing.evaluated(config))),


def model_of(wildcards):
    """The config's entry of a model."""
    return config["models"][wildcards.model]


def dtype_of(wildcards):
    """Precision of a model's forward passes."""
    return model_of(wildcards).get("dtype", "float32")


def device_of(wildcards):
    """Where a model runs."""
    return plumbing.device(config, wildcards.model)


def one_task(wildcards):
    """The config's `evaluate` with one task in the place of all."""
    return plumbing.one_task(config["evaluate"], wildcards.task)


def of_tasks(folder):
    """A model's records of single tasks, where each task is a job of its own."""
    names = plumbing.evaluated(config) if SPLIT else []
    return [f"{folder}/{name}.json" for name in names]


def options_of(section, names):
    """Those of a section's options that a rule knows."""
    return {name: value for name, value in section.items() if name in names}


def environment(name="cpu"):
    """The environment file of a rule."""
    return f"../envs/{name}.yaml"


def kept_or_not(states):
    """The states as they are, or deleted once the last job that reads them is through."""
    return (
        directory(states)
        if config.get("hidden", {}).get("keep", True)
        else temp(directory(states))
    )


def shards_of(wildcards):
    """The shards that a calibration set's states are joined from."""
    folder = "results/{model}/{calib}/hidden-shards".format(**wildcards)
    return [
        f"{folder}/{start}-{stop}"
        for start, stop in plumbing.shards(config, wildcards.calib)
    ]


def memory_mb(base, weights=0, states=0):
    """Megabytes: `base`, some copies of the model's weights, some states of all tokens; half as much more an attempt."""

    def asked(wildcards, attempt):
        size = base
        if weights:
            size += weights * plumbing.weights_mb(config, wildcards.model)
        if states:
            count = states(wildcards) if callable(states) else states
            size += count * plumbing.state_mb(config, wildcards.model, wildcards.calib)
        return int(size * 1.5 ** (attempt - 1))

    return asked


def minutes(base, per_billion=0):
    """Minutes: `base` and some for each billion of the model's parameters; twice as many an attempt."""

    def asked(wildcards, attempt):
        time = base
        if per_billion:
            params = plumbing.size_of(config, wildcards.model)["params"]
            time += per_billion * params / 1e9
        return int(time * 2 ** (attempt - 1))

    return asked


def block_states(wildcards):
    """States that a fit of a block holds: those at its layers' ends, as read, stacked and split."""
    return 3 * (int(wildcards.stop) - int(wildcards.start) + 1)


def norm_states(wildcards):
    """Norms of all states, as read, put together and compared, in units of one state."""
    size = plumbing.size_of(config, wildcards.model)
    return 4 * (size["layers"] + 1) / max(size["width"], 1)


def theory_states(wildcards):
    """States that the measurement of the theorems holds."""
    start, stop = config["theory"]["run"]
    return 3 * (stop - start + 1)


def gathered_states(wildcards):
    """States that the similarity holds: one as read and converted, and the chosen tokens of all, twice."""
    return plumbing.gathered_states(config, wildcards.model, wildcards.calib)


def gpus(wildcards):
    """GPUs that a job on its model's device takes, all of them that the model is spread over."""
    device = device_of(wildcards).split(":")[0]
    return {"balanced": model_of(wildcards).get("gpus", 1), "auto": 1, "cuda": 1}.get(
        device, 0
    )


def one_gpu(wildcards):
    """The GPU of a job that reads states and loads no model."""
    return min(1, gpus(wildcards))


def one_node(wildcards):
    """Several GPUs are on one node; None where a job takes one or none."""
    return 1 if gpus(wildcards) > 1 else None


def on_gpu(name, otherwise=None):
    """A default resource of the profile that only jobs with a GPU get; None is no resource."""
    return lambda wildcards: site(name) if gpus(wildcards) else otherwise


def site(name):
    """A default resource of the profile, as it stands there; None where it has none."""
    given = workflow.resource_settings.default_resources or {}
    return given[name].raw if name in given else None


# what jobs on the device of their model ask for; where they run is the profile's to say
GPU = {"gpu": gpus, "nodes": one_node}
if site("gpu_type"):
    GPU["gpu_model"] = on_gpu("gpu_type")
if site("gpu_partition"):
    GPU["slurm_partition"] = on_gpu("gpu_partition", site("slurm_partition"))
ONE_GPU = GPU | {"gpu": one_gpu}


def records_of(point):
    """What fold reads of a grid point: its composed record, or those of every step of every block, block by block."""
    keys = ("model", "calib", "method", "ratio", "k_max")
    point = {key: point[key] for key in keys}
    point["method"] = plumbing.source_of(config, point["method"])
    if plumbing.has(config, point["method"], "compose"):
        return [f"{plumbing.point_dir(point)}/composed.safetensors"]
    plan = checkpoints.blocks.get(**point).output[0]
    with open(plan) as file:
        blocks = json.load(file)["fields"]["blocks"]
    folder = "results/{model}/{calib}/{method}/blocks".format(**point)
    return [
        f"{folder}/{start}-{stop}/{step}.safetensors"
        for start, stop in blocks
        for step in plumbing.steps(config, point["method"])
    ]


def of_points(name):
    """A file of every grid point."""
    return [f"{plumbing.point_dir(point)}/{name}" for point in POINTS]


def of_source(name):
    """A file of the row that a fine-tuned one starts from."""
    return lambda wildcards: (
        "results/{model}/{calib}/{source}/r{ratio}-k{k_max}/{name}".format(
            source=plumbing.source_of(config, wildcards.method), name=name, **wildcards
        )
    )


def all_records(wildcards=None):
    """The records of every fit of every grid point, each once, in the order of the grid."""
    return list(dict.fromkeys(path for point in POINTS for path in records_of(point)))


def rows_with(part):
    """The rows whose method has a `search` or a `compose`, as a constraint; a name that nothing has where none does."""
    found = [name for name in config["methods"] if plumbing.has(config, name, part)]
    return "|".join(found) or r"(?!)"


def basis_of(wildcards):
    """What a row selects its blocks by: a search, its own or one that it shares, or the similarity."""
    if plumbing.has(config, wildcards.method, "search"):
        return "results/{model}/{calib}/{row}/search-k{k_max}.json".format(
            row=plumbing.search_row(config, wildcards.method), **wildcards
        )
    return "results/{model}/{calib}/similarity.safetensors".format(**wildcards)


def selection_row(wildcards):
    """The method that selects, and its options."""
    options = plumbing.options(config, wildcards.method).get("block", {})
    options = {key: value for key, value in options.items() if key != "sized_as"}
    return {"method": plumbing.base_of(config, wildcards.method), "options": options}


def steps_before(wildcards):
    """Records of the method's earlier steps on the same block."""
    names = plumbing.steps(config, wildcards.method)
    folder = "results/{model}/{calib}/{method}/blocks/{start}-{stop}".format(
        **wildcards
    )
    return [
        f"{folder}/{name}.safetensors" for name in names[: names.index(wildcards.step)]
    ]


def points_like(wildcards, points=POINTS):
    """The points that share these wildcards."""
    return [
        point
        for point in points
        if all(point.get(key, value) == value for key, value in wildcards.items())
    ]


def trained(wildcards, step):
    """One step's records of every block that a row has trained on a calibration set, by first layer."""
    found = {path for point in points_like(wildcards) for path in records_of(point)}
    paths = [path for path in found if path.endswith(f"{step}.safetensors")]
    return sorted(
        paths,
        key=lambda path: [int(layer) for layer in path.split(os.sep)[-2].split("-")],
    )


def viewed(wildcards):
    """Step 1's records of a row: of the blocks that `views` names, else of all that the grid trains."""
    blocks = config.get("views", {}).get("blocks")
    if blocks is None:
        return trained(wildcards, "kernel")
    folder = "results/{model}/{calib}/{method}/blocks".format(**wildcards)
    return [f"{folder}/{block}/kernel.safetensors" for block in blocks]


def dense_measured():
    """Scores and costs of the dense models."""
    return [
        f"results/{model}/{name}.json"
        for model in config["grid"]["models"]
        for name in ("scores", "efficiency")
    ]


def searches():
    """What the points whose layers are searched were searched by."""
    return list(
        dict.fromkeys(
            "results/{model}/{calib}/{search}/search-k{k_max}.json".format(**point)
            for point in POINTS
            if "search" in point
        )
    )


def everything_measured(wildcards):
    """All that tables and the overview figures read."""
    names = ("plan.json", "pruned.json", "scores.json", "efficiency.json")
    return (
        [path for name in names for path in of_points(name)]
        + [
            f"{plumbing.point_dir(point)}/finetuned.json"
            for point in POINTS
            if "source" in point
        ]
        + searches()
        + all_records()
        + dense_measured()
    )


def theories(wildcards=None):
    """The records of both theorems, of every model and calibration set."""
    if "theory" not in config:
        raise WorkflowError(
            "config: no `theory`; add it, or --configfile configs/theory.yaml"
        )
    return [
        f"results/{model}/{calib}/theory.json"
        for model in config["grid"]["models"]
        for calib in config["grid"]["calibrations"]
    ]


def theory_wanted():
    """The tables of both theorems, where the config asks for them."""
    return ["results/tables/theory.csv"] if "theory" in config else []


def rows_and_k_max(points):
    """Row and K max of points, by which figures know them."""
    return [[point["method"], int(point["k_max"])] for point in points]


def tables_wanted():
    """The paper's tables, and that of calibration seeds where there are several."""
    seeds = ["results/tables/seeds.csv"] if FAMILIES else []
    return ["results/tables/paper/index.md", *seeds]


def drawn(name):
    """The three files of a figure, in snakemake's report under the figure's title."""

    def labels(suffix):
        return lambda wildcards: {"figure": title(wildcards), "file": suffix}

    def title(wildcards):
        found = plumbing.entry_of(FIGURES, name.format(**wildcards))["title"]
        # snakemake would take braces for wildcards
        return found.replace("{", "").replace("}", "")

    return {
        suffix: report(
            f"results/figures/{name}.{suffix}",
            caption="captions/figure.rst",
            category="Figures",
            subcategory="{model}, {calib}" if "{model}" in name else "All models",
            labels=labels(suffix),
        )
        for suffix in ("png", "pdf", "csv")
    }


def caption_of(png):
    """The caption of a figure by its file, for captions/figure.rst: the words of the report's page."""
    name = png.removeprefix("results/figures/").removesuffix(".png")
    return plumbing.as_rst(plumbing.entry_of(FIGURES, name)["caption"])


TABLE_FORMS = ("csv", "md", "tex")


def paper_table(name):
    """The files of one of the paper's tables."""
    return [
        listed(f"results/tables/paper/{name}.{suffix}", f"the paper's {name}", "paper")
        for suffix in TABLE_FORMS
    ]


def listed(path, name, caption="summary"):
    """A table in snakemake's report, by its name and kind of file."""
    return report(
        path,
        caption=f"captions/{caption}.rst",
        category="Tables",
        labels={"table": name, "file": path.rsplit(".", 1)[-1]},
    )
