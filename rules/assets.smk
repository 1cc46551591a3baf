"""Assets: texts and dense models, fetched from named sources and checked by hash, and packed calibration tokens."""


rule text:
    output:
        ensure("results/texts/{text}.jsonl", non_empty=True),
    log:
        "results/logs/text/{text}.log",
    benchmark:
        "results/benchmarks/text/{text}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(2000),
        runtime=minutes(30),
    params:
        entry=lambda wildcards: config["texts"][wildcards.text],
        cache=config.get("cache", ".cache/assets"),
        code=code.of_script("model/text"),
    message:
        "Fetching text {wildcards.text}"
    script:
        "../workflow_scripts/model/text.py"


rule dense:
    output:
        checkpoint=directory("results/{model}/dense"),
        facts="results/{model}/facts.json",
    log:
        "results/logs/dense/{model}.log",
    benchmark:
        "results/benchmarks/dense/{model}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(4000, weights=3),
        runtime=minutes(20, per_billion=10),
    params:
        entry=lambda wildcards: {
            key: value
            for key, value in model_of(wildcards).items()
            if key not in ("device", "gpus", "max_memory")
        },
        cache=config.get("cache", ".cache/assets"),
        links=config.get("checkpoints") == "links",
        code=code.of_script("model/dense"),
    message:
        "Fetching and converting model {wildcards.model}"
    script:
        "../workflow_scripts/model/dense.py"


rule tokens:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        texts=lambda wildcards: [
            f"results/texts/{name}.jsonl"
            for name in config["calibrations"][wildcards.calib]["mix"]
        ],
    output:
        "results/{model}/{calib}/tokens.safetensors",
    log:
        "results/logs/tokens/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/tokens/{model}-{calib}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(2000),
        runtime=minutes(30),
    params:
        calibration=lambda wildcards: config["calibrations"][wildcards.calib],
        code=code.of_script("model/tokens"),
    message:
        "Packing calibration {wildcards.calib} for {wildcards.model}"
    script:
        "../workflow_scripts/model/tokens.py"
