"""What the rules of figures share: the files that a figure reads and writes, and its settings.

kdp_core/figures defines the figures, each with its scope and the names of its records. Here the names become files.
"""

FIGURES = figures.figure_entries(config)
SHOWN = grid.chosen_points(config, "figures")
LOOKS = figures.looks(config, GRID)
MODELS = grid.calibrated(config)
VIEWS = config.get("views", {})
CALIBRATED = "results/{model}/{calib}"


def of_calibrated(name):
    """A file of one model and calibration set."""
    return lambda wildcards: f"{CALIBRATED}/{name}".format(**wildcards)


def of_shown(name, points):
    """A file of every point that has the figure's wildcards."""
    return lambda wildcards: [
        f"{grid.folder(point)}/{name}" for point in grid.points_like(points, wildcards)
    ]


def kernel_views(wildcards):
    """The views of a variant, for the blocks that `views` names, or else for all blocks that the grid trains."""
    blocks = VIEWS.get("blocks")
    if blocks is None:
        folders = map(os.path.dirname, trained(wildcards, "kernel"))
    else:
        runs = [dict(zip(("start", "stop"), block.split("-"))) for block in blocks]
        folders = [BLOCK.format(**wildcards, **run) for run in runs]
    return [f"{folder}/kernel-view.safetensors" for folder in folders]


READS = {
    "summary": lambda wildcards: "results/summary.csv",
    "scores": lambda wildcards: "results/scores.csv",
    "points": everything_measured,
    "similarity": of_calibrated("similarity.safetensors"),
    "similarities": lambda wildcards: [
        f"{CALIBRATED}/similarity.safetensors".format(model=model, calib=calib)
        for model, calib in MODELS
    ],
    "kernels": lambda wildcards: trained(wildcards, "kernel"),
    "inverses": lambda wildcards: trained(wildcards, "inverse"),
    "composed": of_shown("composed.safetensors", GRID),
    "diagnoses": of_shown("diagnosis.json", SHOWN),
    "theory": of_calibrated("theory.json"),
    "kernel_views": kernel_views,
    "trajectories": of_calibrated("trajectories.safetensors"),
    "probes": of_calibrated("probes.json"),
    "spaces": of_shown("spaces.json", grid.chosen_points(config, "spaces")),
    "survivals": of_shown("choices.json", grid.chosen_points(config, "choices")),
    "agreement": lambda wildcards: f"{CALIBRATED}/agreement-r{{ratio}}.json".format(
        **wildcards
    ),
    "expectations": of_shown(
        "expectation.json", grid.chosen_points(config, "generation")
    ),
}


def read_by_figure(wildcards):
    """The files that a figure reads, by the names of kdp_core.figures."""
    return {
        name: READS[name](wildcards)
        for name in figures.entry(wildcards.figure)["reads"]
    }


def shown_in(wildcards):
    """The points that a figure may show, if it reads tables or records of all points."""
    if not {"summary", "points"} & set(figures.entry(wildcards.figure)["reads"]):
        return None
    if "ablation" in wildcards.keys():
        return grid.ablation_points(config, wildcards.ablation)
    # points that only an ablation adds would crowd the overview
    return SHOWN


def fits_of(wildcards):
    """The names of each variant's fits, if a figure reads the records of all points."""
    return STEPS if "points" in figures.entry(wildcards.figure)["reads"] else None


def settings_of(wildcards):
    """What the configuration says about a figure.

    These are only the figure's own settings, so that no other setting reruns the figure.
    """
    own, ablation = config.get("figures", {}), wildcards.get("ablation")
    known = {
        "colormap": own.get("colormap", "viridis"),
        "tasks": own.get("tasks"),
        "looks": (
            figures.looks(config, grid.ablation_points(config, ablation))
            if ablation
            else LOOKS
        ),
        "ablation": grid.ablation(config, ablation) if ablation else None,
    }
    return known_options(known, figures.entry(wildcards.figure)["settings"])


def drawn(scope):
    """The three files of a scope's figures, which Snakemake's report shows under the figure's title."""
    name = figures.path(scope)

    def labels(suffix):
        return lambda wildcards: {"figure": title(wildcards), "file": suffix}

    def title(wildcards):
        found = figures.entry_of(FIGURES, name.format(**wildcards))["title"]
        # snakemake would read braces as wildcards
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
    """The caption of a figure by its file, for captions/figure.rst; it has the same words as the report's page."""
    name = png.removeprefix("results/figures/").removesuffix(".png")
    return figures.as_rst(figures.entry_of(FIGURES, name)["caption"])


def figure_log(scope):
    """The log file of a scope's figures."""
    return f"results/logs/figures/{figures.flat_path(scope)}.log"


def figure_benchmark(scope):
    """The benchmark file of a scope's figures."""
    return f"results/benchmarks/figures/{figures.flat_path(scope)}.tsv"
