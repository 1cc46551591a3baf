"""Fold: the plan of a grid point and the dense checkpoint become a pruned checkpoint."""


rule fold:
    input:
        dense="results/{model}/dense",
        plan=f"{POINT}/plan.json",
        fitted=records_of,
    output:
        checkpoint=directory(f"{POINT}/checkpoint"),
        pruned=f"{POINT}/pruned.json",
    log:
        f"results/logs/fold/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/fold/{POINT_NAME}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, weights=2),
        runtime=minutes(10, per_billion=3),
    params:
        method=method_of,
        links=config.get("checkpoints") == "links",
        code=lambda wildcards: code.of_method(
            "prune/fold", method_of(wildcards), "module"
        ),
    message:
        "Folding {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/prune/fold.py"
