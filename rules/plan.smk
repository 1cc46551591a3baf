"""Plan: what the grid would cost, from configurations alone; nothing is downloaded or run for it."""


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
        code=code.of_script("plan"),
    message:
        "Planning the grid"
    script:
        "../workflow_scripts/plan.py"
