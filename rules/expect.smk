"""Expectations: predicts whether pruned models will still generate, if the config has `generation`."""

GENERATION = config.get("generation", {})


rule expect:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint=f"{POINT}/checkpoint",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
        predictor=f"{code.ROOT}/kdp_core/study/expect.json",
    output:
        f"{POINT}/expectation.json",
    log:
        f"results/logs/expect/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/expect/{POINT_NAME}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=3),
        runtime=minutes(30, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        options=GENERATION.get("statistics", {}),
        code=code.of_script("study/expect"),
    message:
        "Expecting the generation of {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/study/expect.py"
