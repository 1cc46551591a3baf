"""Kernel-space heat maps of trained variants and paths of the states, where the config has `views`."""

VIEWS = config.get("views", {})


rule views_heatmaps:
    input:
        hidden="results/{model}/{calib}/hidden.zarr",
        kernels=viewed,
    output:
        **drawn("{model}/{calib}/{method}-heatmaps"),
    log:
        "results/logs/figures/{model}-{calib}-{method}-heatmaps.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-{method}-heatmaps.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, states=4),
        runtime=minutes(20),
    params:
        kind="heatmaps",
        options=VIEWS.get("heatmaps", {}),
        fitted=lambda wildcards: variants.options(config, wildcards.method).get(
            "kernel", {}
        ),
        colormap=config.get("figures", {}).get("colormap", "viridis"),
        dpi=DPI,
        code=code.of_script("views"),
    message:
        "Drawing the kernel space of {wildcards.method}"
    script:
        "../workflow_scripts/views.py"


rule views_trajectories:
    input:
        hidden="results/{model}/{calib}/hidden.zarr",
    output:
        **drawn("{model}/{calib}/trajectories"),
        straightness="results/{model}/{calib}/straightness.csv",
    log:
        "results/logs/figures/{model}-{calib}-trajectories.log",
    benchmark:
        "results/benchmarks/figures/{model}-{calib}-trajectories.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, states=4),
        runtime=minutes(30),
    params:
        kind="trajectories",
        options=VIEWS.get("trajectories", {}),
        colormap=config.get("figures", {}).get("colormap", "viridis"),
        dpi=DPI,
        code=code.of_script("views"),
    message:
        "Drawing the paths of states of {wildcards.model}"
    script:
        "../workflow_scripts/views.py"
