"""States, logits and probabilities beside the dense model's, where the config has `spaces`."""

SPACES = config.get("spaces", {})
LOOKED_INTO = plumbing.chosen_points(config, "spaces")


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
        code=plumbing.code("spaces"),
    message:
        "Leaving out the layers of {wildcards.model} one by one"
    script:
        "../workflow_scripts/spaces.py"


use rule spaces_probe as spaces with:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/checkpoint",
        pruned="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/pruned.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
        tasks="results/tasks",
    output:
        "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/spaces.json",
    log:
        "results/logs/spaces/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/spaces/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=SPACES.get("compare", {}),
        code=plumbing.code("spaces"),
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
        code=plumbing.code("figure"),
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
        code=plumbing.code("figure"),
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
        code=plumbing.code("figure"),
    message:
        "Drawing estimates of changes beside the changes of {wildcards.model}"


use rule figure_training as figure_spaces_steps with:
    input:
        lambda wildcards: [
            f"{plumbing.point_dir(point)}/spaces.json"
            for point in points_like(wildcards, LOOKED_INTO)
        ],
    output:
        **drawn("{model}/{calib}/spaces-steps-r{ratio}"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-steps-r{ratio}.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-steps-r{ratio}.tsv"
    params:
        kind="by_step",
        labels=lambda wildcards: rows_and_k_max(points_like(wildcards, LOOKED_INTO)),
        rows=LOOKS,
        dpi=DPI,
        code=plumbing.code("figure"),
    message:
        "Drawing decoding step by step at ratio {wildcards.ratio}"


use rule figure_training as figure_spaces_choices with:
    input:
        lambda wildcards: [
            f"{plumbing.point_dir(point)}/spaces.json"
            for point in points_like(wildcards, LOOKED_INTO)
        ],
    output:
        **drawn("{model}/{calib}/spaces-choices-r{ratio}"),
    log:
        "results/logs/figures/{model}-{calib}-spaces-choices-r{ratio}.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-spaces-choices-r{ratio}.tsv"
    params:
        kind="choices",
        labels=lambda wildcards: rows_and_k_max(points_like(wildcards, LOOKED_INTO)),
        rows=LOOKS,
        dpi=DPI,
        code=plumbing.code("figure"),
    message:
        "Drawing letters beside all tokens at ratio {wildcards.ratio}"
