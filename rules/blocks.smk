"""Blocks: which layers a grid point replaces. A checkpoint, since the choice decides which blocks are trained."""


checkpoint blocks:
    input:
        basis=basis_of,
        facts="results/{model}/facts.json",
    output:
        "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/plan.json",
    log:
        "results/logs/blocks/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/blocks/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
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
        row=selection_row,
        sized_as=lambda wildcards: plumbing.sized_as(config, wildcards.method),
        code=lambda wildcards: plumbing.blocks_code(
            plumbing.base_of(config, wildcards.method),
            plumbing.sized_as(config, wildcards.method)["method"],
        ),
    message:
        "Selecting blocks: {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/blocks.py"
