"""Tests of built results: `check` is a part of `all`, and `test` is a target of its own."""


rule check:
    input:
        "results/scores.csv",
        "results/summary.csv",
        [f"results/{point['model']}/facts.json" for point in POINTS],
        of_points("pruned.json"),
        of_points("efficiency.json"),
        [
            f"results/figures/{entry['name']}.{suffix}"
            for entry in FIGURES
            for suffix in ("png", "pdf", "csv")
        ],
        tests=f"{workflow.basedir}/tests/results/test_built.py",
    output:
        "results/checked.txt",
    log:
        "results/logs/check.log",
    benchmark:
        "results/benchmarks/check.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        # this is a function, because snakemake reads braces in strings as wildcards
        run=lambda wildcards: {
            "models": list(dict.fromkeys(point["model"] for point in POINTS)),
            "points": [point | {"folder": grid.folder(point)} for point in POINTS],
            "figures": [entry["name"] for entry in FIGURES],
        },
    message:
        "Testing the results"
    script:
        "../workflow_scripts/results/test.py"


rule test:
    input:
        # the tests read the same sources from the cache, which these jobs fill
        [f"results/{model}/dense" for model in embedded("models")],
        [f"results/texts/{text}.jsonl" for text in embedded("texts")],
        tests=f"{workflow.basedir}/tests/results/test_embedded.py",
    log:
        "results/logs/test.log",
    benchmark:
        "results/benchmarks/test.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(4000),
        runtime=minutes(30),
    message:
        "Testing the embedded default"
    script:
        "../workflow_scripts/results/test.py"
