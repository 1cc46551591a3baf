"""Plan: the cost of the grid is estimated from configurations only. Nothing is downloaded or run for it."""


localrules:
    plan,


rule plan:
    output:
        table="results/plan.md",
        record="results/plan.json",
    log:
        "results/logs/plan.log",
    benchmark:
        "results/benchmarks/plan.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        work=resources.workload(config),
        options=config.get("plan", {}),
        code=code.of_script("study/plan"),
    message:
        "Estimating the cost of the grid"
    script:
        "../workflow_scripts/study/plan.py"
