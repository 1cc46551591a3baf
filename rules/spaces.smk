"""States, logits and probabilities are compared with those of the dense model, if the config has `spaces`."""

SPACES = config.get("spaces", {})


rule spaces_probe:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        "results/{model}/{calib}/probes.json",
    log:
        "results/logs/spaces/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/spaces/{model}-{calib}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=3),
        runtime=minutes(30, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=SPACES.get("probe", {}),
        code=code.of_script("study/spaces"),
    message:
        "Measuring {wildcards.model} without single layers"
    script:
        "../workflow_scripts/study/spaces.py"


use rule spaces_probe as spaces with:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        checkpoint=f"{POINT}/checkpoint",
        pruned=f"{POINT}/pruned.json",
        text=f"results/texts/{config['evaluate']['text']}.jsonl",
        tasks="results/tasks",
    output:
        f"{POINT}/spaces.json",
    log:
        f"results/logs/spaces/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/spaces/{POINT_NAME}.tsv"
    params:
        dtype=dtype_of,
        device=device_of,
        length=lambda wildcards: config["calibrations"][wildcards.calib]["length"],
        options=SPACES.get("compare", {}),
        code=code.of_script("study/spaces"),
    message:
        "Comparing the spaces of {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
