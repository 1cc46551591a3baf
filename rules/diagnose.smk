"""Diagnosis: states and outputs of a pruned model are compared with those of the dense model on held-out windows."""


rule diagnose:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint=f"{POINT}/checkpoint",
        pruned=f"{POINT}/pruned.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        f"{POINT}/diagnosis.json",
    log:
        f"results/logs/diagnose/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/diagnose/{POINT_NAME}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=3),
        runtime=minutes(10, per_billion=5),
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=config.get("diagnose", {}),
        code=code.of_script("score/diagnose"),
    message:
        "Diagnosing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/score/diagnose.py"
