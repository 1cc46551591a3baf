"""Ablations: a table and a figure each, from the summary and the scores alone."""

import re


rule ablation:
    input:
        summary="results/summary.csv",
        scores="results/scores.csv",
        comparisons="results/tables/comparisons.csv",
    output:
        **drawn("ablation-{ablation}"),
        table=[
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
        # a name that no entry can have where there are none
        ablation="|".join(map(re.escape, config.get("ablations", {}))) or "-",
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        ablation=lambda wildcards: grid.ablation(config, wildcards.ablation),
        rows=lambda wildcards: figures.looks(
            config, grid.ablation_points(config, wildcards.ablation)
        ),
        dpi=DPI,
        code=code.of_script("ablations"),
    message:
        "Tabulating and drawing the ablation {wildcards.ablation}"
    script:
        "../workflow_scripts/ablations.py"
