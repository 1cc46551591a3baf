"""Ablations: each ablation is a table that is made only from the summary, the scores and the paired tests."""


rule ablation:
    input:
        summary="results/summary.csv",
        scores="results/scores.csv",
        comparisons="results/tables/comparisons.csv",
    output:
        [
            listed(path, "ablation {ablation}", "ablation")
            for path in multiext(
                "results/tables/ablation-{ablation}", ".csv", ".md", ".tex"
            )
        ],
    log:
        "results/logs/ablations/{ablation}.log",
    benchmark:
        "results/benchmarks/ablations/{ablation}.tsv"
    wildcard_constraints:
        ablation=one_of(config.get("ablations", {})),
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        ablation=lambda wildcards: grid.ablation(config, wildcards.ablation),
        code=code.of_script("results/ablations"),
    message:
        "Tabulating the ablation {wildcards.ablation}"
    script:
        "../workflow_scripts/results/ablations.py"
