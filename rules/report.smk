"""Tables and the report."""

import yaml


rule tables:
    input:
        everything_measured,
    output:
        scores="results/scores.csv",
        summary="results/summary.csv",
        fits="results/tables/fits.csv",
        csv="results/tables/summary.csv",
        md="results/tables/summary.md",
        tex="results/tables/summary.tex",
    log:
        "results/logs/tables.log",
    benchmark:
        "results/benchmarks/tables.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        grid=POINTS,
        steps=STEPS,
        code=plumbing.code("tables"),
    message:
        "Writing tables"
    script:
        "../workflow_scripts/tables.py"


rule report:
    input:
        summary="results/summary.csv",
        scores="results/scores.csv",
        fits="results/tables/fits.csv",
        figures=[f"results/figures/{entry['name']}.png" for entry in FIGURES],
    output:
        "results/report.html",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        figures=FIGURES,
        seeds=plumbing.seeds(config),
        config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        code=plumbing.code("report"),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/report.py"
