"""Diagnosis: what folding did to the states and outputs, on held-out windows."""


rule diagnose:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/checkpoint",
        pruned="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/pruned.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/diagnosis.json",
    log:
        "results/logs/diagnose/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/diagnose/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
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
        code=plumbing.code("diagnose"),
    message:
        "Diagnosing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/diagnose.py"
