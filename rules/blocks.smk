"""Blocks: the layers that a grid point replaces.

The rule is a checkpoint, because the selection decides which blocks are trained.
"""


checkpoint blocks:
    input:
        basis=basis_of,
        facts="results/{model}/facts.json",
    output:
        f"{POINT}/plan.json",
    log:
        f"results/logs/blocks/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/blocks/{POINT_NAME}.tsv"
    priority: 10
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        grid=lambda wildcards: {
            "ratio": float(wildcards.ratio),
            "k_max": int(wildcards.k_max),
        },
        variant=lambda wildcards: variants.selection(config, wildcards.method),
        sized_as=lambda wildcards: variants.sized_as(config, wildcards.method),
        code=lambda wildcards: code.of_blocks(
            method_of(wildcards),
            variants.sized_as(config, wildcards.method)["method"],
        ),
    message:
        "Selecting blocks: {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/methods/blocks.py"
