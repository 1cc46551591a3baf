"""Figures, each as PDF and PNG with its data as CSV: docs/figures.md says which figure of which paper each is."""

SHOWN = grid.chosen_points(config, "figures")
LOOKS = figures.looks(config, GRID)
MODELS = grid.calibrated(config)
MODEL_LABELS = grid.labels(MODELS)
COLORMAP = config.get("figures", {}).get("colormap", "viridis")


rule figure_similarity:
    input:
        "results/{model}/{calib}/similarity.safetensors",
    output:
        **drawn("{model}/{calib}/similarity"),
    log:
        "results/logs/figures/{model}-{calib}-similarity.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-similarity.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        kind="similarity",
        colormap=COLORMAP,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the similarity of layers of {wildcards.model}"
    script:
        "../workflow_scripts/figure.py"


use rule figure_similarity as figure_models with:
    input:
        [f"results/{model}/{calib}/similarity.safetensors" for model, calib in MODELS],
    output:
        **drawn("similarity-models"),
    log:
        "results/logs/figures/similarity-models.log",
    benchmark:
        "results/benchmarks/figures/similarity-models.tsv"
    params:
        kind="models",
        labels=MODEL_LABELS,
        colormap=COLORMAP,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the similarity of layers of all models"


rule figure_training:
    input:
        kernels=lambda wildcards: trained(wildcards, "kernel"),
        inverses=lambda wildcards: trained(wildcards, "inverse"),
    output:
        **drawn("{model}/{calib}/{method}-training"),
    log:
        "results/logs/figures/{model}-{calib}-{method}-training.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-{method}-training.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        kind="training",
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the training curves of {wildcards.method}"
    script:
        "../workflow_scripts/figure.py"


use rule figure_training as figure_locality with:
    input:
        [f"results/{model}/{calib}/similarity.safetensors" for model, calib in MODELS],
    output:
        **drawn("locality"),
    log:
        "results/logs/figures/locality.log",
    benchmark:
        "results/benchmarks/figures/locality.tsv"
    params:
        kind="locality",
        labels=MODEL_LABELS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the similarity of layers by distance"


use rule figure_training as figure_operators with:
    input:
        kernels=lambda wildcards: trained(wildcards, "kernel"),
    output:
        **drawn("{model}/{calib}/{method}-operators"),
    log:
        "results/logs/figures/{model}-{calib}-{method}-operators.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-{method}-operators.tsv"
    params:
        kind="operators",
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the operator norms of {wildcards.method}"


use rule figure_training as figure_joint with:
    input:
        lambda wildcards: [
            f"{grid.folder(point)}/composed.safetensors"
            for point in grid.points_like(GRID, wildcards)
        ],
    output:
        **drawn("{model}/{calib}/{method}-joint"),
    log:
        "results/logs/figures/{model}-{calib}-{method}-joint.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-{method}-joint.tsv"
    params:
        kind="joint",
        labels=lambda wildcards: [
            f"ratio {p['ratio']}, K max {p['k_max']}"
            for p in grid.points_like(GRID, wildcards)
        ],
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the joint training of {wildcards.method}"


use rule figure_training as figure_errors with:
    input:
        lambda wildcards: [
            f"{grid.folder(point)}/diagnosis.json"
            for point in grid.points_like(SHOWN, wildcards)
        ],
    output:
        **drawn("{model}/{calib}/errors-r{ratio}"),
    log:
        "results/logs/figures/{model}-{calib}-errors-r{ratio}.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-errors-r{ratio}.tsv"
    params:
        kind="errors",
        labels=lambda wildcards: grid.variants_and_k_max(grid.points_like(SHOWN, wildcards)),
        rows=LOOKS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the errors of states at ratio {wildcards.ratio}"


use rule figure_training as figure_score_ratio with:
    input:
        summary="results/summary.csv",
    output:
        **drawn("score-ratio"),
    log:
        "results/logs/figures/score-ratio.log",
    benchmark:
        "results/benchmarks/figures/score-ratio.tsv"
    params:
        kind="score_ratio",
        # points that only an ablation adds would crowd the overview
        grid=SHOWN,
        rows=LOOKS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing scores against the ratio"


use rule figure_training as figure_tasks with:
    input:
        scores="results/scores.csv",
        summary="results/summary.csv",
    output:
        **drawn("tasks-ratio"),
    log:
        "results/logs/figures/tasks-ratio.log",
    benchmark:
        "results/benchmarks/figures/tasks-ratio.tsv"
    params:
        kind="tasks",
        grid=SHOWN,
        rows=LOOKS,
        tasks=config.get("figures", {}).get("tasks"),
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing every task against the ratio"


use rule figure_training as figure_layers with:
    input:
        everything_measured,
    output:
        **drawn("layers"),
    log:
        "results/logs/figures/layers.log",
    benchmark:
        "results/benchmarks/figures/layers.tsv"
    params:
        kind="layers",
        grid=SHOWN,
        steps=STEPS,
        rows=LOOKS,
        dpi=DPI,
        code=code.of_script("figure"),
    message:
        "Drawing the replaced layers"
