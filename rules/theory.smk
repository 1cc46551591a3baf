"""Theorems 1 and 2 are measured, if the config has `theory`."""


rule theory:
    input:
        "results/{model}/{calib}/hidden.zarr",
    output:
        "results/{model}/{calib}/theory.json",
    log:
        "results/logs/theory/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/theory/{model}-{calib}.tsv"
    conda:
        environment()
    resources:
        **ONE_GPU,
        mem_mb=memory_mb(
            4000,
            states=lambda wildcards: resources.block_states(*config["theory"]["run"]),
        ),
        runtime=minutes(20, per_billion=6),
    params:
        run=config.get("theory", {}).get("run"),
        kernel=variants.theory_kernel(config),
        options=variants.theory_options(config),
        device=device_of,
        code=code.of_script("study/theory"),
    message:
        "Measuring Theorems 1 and 2 on {wildcards.model}"
    script:
        "../workflow_scripts/study/theory.py"


rule theory_tables:
    input:
        theories,
    output:
        csv=listed("results/tables/theory.csv", "Theorems 1 and 2", "theory"),
        md=listed("results/tables/theory.md", "Theorems 1 and 2", "theory"),
    log:
        "results/logs/theory-tables.log",
    benchmark:
        "results/benchmarks/theory-tables.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        code=code.of_script("results/theory_tables"),
    message:
        "Writing the tables of Theorems 1 and 2"
    script:
        "../workflow_scripts/results/theory_tables.py"
