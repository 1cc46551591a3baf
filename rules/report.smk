"""Tables and the report."""

import yaml


rule tables:
    input:
        everything_measured,
        comparisons="results/tables/comparisons.csv",
    output:
        scores=listed("results/scores.csv", "every measured number", "scores"),
        summary=listed("results/summary.csv", "one row for each model"),
        fits=listed("results/tables/fits.csv", "fits", "fits"),
        csv=listed("results/tables/summary.csv", "summary for print"),
        md=listed("results/tables/summary.md", "summary for print"),
        tex=listed("results/tables/summary.tex", "summary for print"),
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
        code=code.of_script("results/tables"),
    message:
        "Writing tables"
    script:
        "../workflow_scripts/results/tables.py"


rule report:
    input:
        summary="results/summary.csv",
        scores="results/scores.csv",
        fits="results/tables/fits.csv",
        comparisons="results/tables/comparisons.csv",
        figures=[f"results/figures/{entry['name']}.png" for entry in FIGURES],
        expectations=expectations_wanted(),
        agreements=agreements_wanted(),
        answers=[
            f"{CALIBRATED}/answers.json".format(model=model, calib=calib)
            for model, calib in (MODELS if ANSWERING else [])
        ],
    output:
        report(
            "results/report.html",
            caption="captions/report.rst",
            category="Report",
            labels={"page": "all results"},
        ),
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
        # these are functions, because snakemake reads braces in strings as wildcards
        figures=lambda wildcards: FIGURES,
        expected=(
            grid.chosen_points(config, "generation") if "generation" in config else []
        ),
        seeds=grid.seeds(config),
        refused=lambda wildcards: refusals.named(config),
        config_yaml=lambda wildcards: yaml.safe_dump(
            {key: value for key, value in config.items() if key != "refused"},
            sort_keys=False,
            allow_unicode=True,
        ),
        code=code.of_script("results/report"),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/results/report.py"
