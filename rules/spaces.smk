"""States, logits and probabilities beside the dense model's, where the config has `spaces`."""

SPACES = config.get("spaces", {})
LOOKED_INTO = grid.chosen_points(config, "spaces")


rule spaces_probe:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        "results/{model}/{calib}/probes.json",
    log:
        "results/logs/spaces/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/spaces/{model}-{calib}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=3),
        runtime=minutes(30, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=SPACES.get("probe", {}),
        code=code.of_script("spaces"),
    message:
        "Leaving out the layers of {wildcards.model} one by one"
    script:
        "../workflow_scripts/spaces.py"


use rule spaces_probe as spaces with:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint=f"{POINT}/checkpoint",
        pruned=f"{POINT}/pruned.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
        tasks="results/tasks",
    output:
        f"{POINT}/spaces.json",
    log:
        f"results/logs/spaces/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/spaces/{POINT_NAME}.tsv"
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=SPACES.get("compare", {}),
        code=code.of_script("spaces"),
    message:
        "Three spaces of {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"


use rule figure_training as figure_spaces_layers with:
    input:
        "results/{model}/{calib}/probes.json",
    output:
        **drawn("{model}/{calib}/spaces-layers"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-layers.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-layers.tsv"
    params:
        kind="by_layer",
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing how layers left out change states, logits and probabilities of {wildcards.model}"


use rule figure_training as figure_spaces_split with:
    input:
        "results/{model}/{calib}/probes.json",
    output:
        **drawn("{model}/{calib}/spaces-split"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-split.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-split.tsv"
    params:
        kind="split_by_layer",
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing changes along and across states and logits of {wildcards.model}"


use rule figure_training as figure_spaces_estimates with:
    input:
        "results/{model}/{calib}/probes.json",
    output:
        **drawn("{model}/{calib}/spaces-estimates"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-estimates.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-estimates.tsv"
    params:
        kind="estimates",
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing estimates of changes beside the changes of {wildcards.model}"


use rule figure_training as figure_spaces_steps with:
    input:
        lambda wildcards: [
            f"{grid.folder(point)}/spaces.json"
            for point in grid.points_like(LOOKED_INTO, wildcards)
        ],
    output:
        **drawn("{model}/{calib}/spaces-steps-r{ratio}"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-steps-r{ratio}.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-steps-r{ratio}.tsv"
    params:
        kind="by_step",
        labels=lambda wildcards: grid.variants_and_k_max(grid.points_like(LOOKED_INTO, wildcards)),
        rows=LOOKS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing decoding step by step at ratio {wildcards.ratio}"


use rule figure_training as figure_spaces_choices with:
    input:
        lambda wildcards: [
            f"{grid.folder(point)}/spaces.json"
            for point in grid.points_like(LOOKED_INTO, wildcards)
        ],
    output:
        **drawn("{model}/{calib}/spaces-choices-r{ratio}"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-choices-r{ratio}.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-choices-r{ratio}.tsv"
    params:
        kind="choices",
        labels=lambda wildcards: grid.variants_and_k_max(grid.points_like(LOOKED_INTO, wildcards)),
        rows=LOOKS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing letters beside all tokens at ratio {wildcards.ratio}"
