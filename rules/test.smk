"""Test: the tests of tests/results on the embedded default; `all` does not run them."""


rule test:
    input:
        # the tests take the same sources from the cache that these jobs fill
        [f"results/{model}/dense" for model in embedded("models")],
        [f"results/texts/{text}.jsonl" for text in embedded("texts")],
        tests=f"{workflow.basedir}/tests/results",
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
