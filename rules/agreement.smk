"""Searches for layers are compared with each other, if the config has `agreement`."""

AGREEMENT = config.get("agreement", {})


rule agreement:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        composed=searches_compared,
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        "results/{model}/{calib}/agreement-r{ratio}.json",
    log:
        "results/logs/agreement/{model}-{calib}-r{ratio}.log",
    benchmark:
        "results/benchmarks/agreement/{model}-{calib}-r{ratio}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(4000, weights=3),
        runtime=minutes(60, per_billion=60),
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        names=grid.compared(config),
        options=AGREEMENT.get("heldout", {}),
        code=code.of_script("study/agreement"),
    message:
        "Comparing the searches at ratio {wildcards.ratio}"
    script:
        "../workflow_scripts/study/agreement.py"
