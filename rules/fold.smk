"""Fold: a grid point's plan to a pruned checkpoint."""


rule fold:
    input:
        dense="results/{model}/dense",
        plan="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/plan.json",
        fitted=records_of,
    output:
        checkpoint=directory(
            "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/checkpoint"
        ),
        pruned="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/pruned.json",
    log:
        "results/logs/fold/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/fold/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, weights=2),
        runtime=minutes(10, per_billion=3),
    params:
        method=lambda wildcards: plumbing.base_of(config, wildcards.method),
        code=lambda wildcards: plumbing.code(
            "fold", plumbing.base_of(config, wildcards.method)
        ),
    message:
        "Folding {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/fold.py"
