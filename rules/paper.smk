"""Comparisons of models on the same items, the spread over calibration seeds, and the tables of KDP's paper."""


rule comparisons:
    input:
        of_points("samples"),
        of_points("scores.json"),
        of_points("pruned.json"),
        [f"results/{model}/samples" for model in config["grid"]["models"]],
        [f"results/{model}/scores.json" for model in config["grid"]["models"]],
    output:
        listed("results/tables/comparisons.csv", "paired tests", "comparisons"),
    log:
        "results/logs/comparisons.log",
    benchmark:
        "results/benchmarks/comparisons.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(2000),
        runtime=minutes(30),
    params:
        grid=POINTS,
        code=code.of_script("results/comparisons"),
    message:
        "Comparing models item by item"
    script:
        "../workflow_scripts/results/comparisons.py"


rule seeds:
    input:
        "results/summary.csv",
    output:
        [
            listed(f"results/tables/seeds.{suffix}", "calibration seeds", "seeds")
            for suffix in TABLE_FORMS
        ],
    log:
        "results/logs/seeds.log",
    benchmark:
        "results/benchmarks/seeds.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        families=FAMILIES,
        code=code.of_script("results/seeds"),
    message:
        "Tabulating calibration seeds"
    script:
        "../workflow_scripts/results/seeds.py"


rule paper_costs:
    output:
        table10=paper_table("table10"),
        table12=paper_table("table12"),
    log:
        "results/logs/paper-costs.log",
    benchmark:
        "results/benchmarks/paper-costs.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(2000),
        runtime=minutes(10),
    params:
        code=code.of_script("results/costs"),
    message:
        "Counting the costs of the paper's models from their configurations"
    script:
        "../workflow_scripts/results/costs.py"


rule paper:
    input:
        rules.paper_costs.output,
        summary="results/summary.csv",
        scores="results/scores.csv",
        comparisons="results/tables/comparisons.csv",
        facts=[f"results/{model}/facts.json" for model in config["grid"]["models"]],
    output:
        index=listed(
            "results/tables/paper/index.md", "the paper's tables: index", "paper"
        ),
        folder=directory("results/tables/paper/measured"),
    log:
        "results/logs/paper.log",
    benchmark:
        "results/benchmarks/paper.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        models=config["grid"]["models"],
        calibrations=grid.calibration_sizes(config),
        ablations=grid.paper_ablations(config),
        code=code.of_script("results/paper"),
    message:
        "Writing the paper's tables"
    script:
        "../workflow_scripts/results/paper.py"
