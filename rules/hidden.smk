"""Hidden states of the dense model are written to Zarr by one job, or by `hidden.shards` jobs and a joining job."""

SHARDS = config.get("hidden", {}).get("shards", 1)
EXTRACTION = {
    key: value
    for key, value in config.get("hidden", {}).items()
    if key not in ("keep", "shards")
}

if SHARDS > 1:

    ruleorder: hidden_join > hidden

else:

    ruleorder: hidden > hidden_join


rule hidden:
    input:
        dense="results/{model}/dense",
        tokens="results/{model}/{calib}/tokens.safetensors",
    output:
        kept_or_not("results/{model}/{calib}/hidden.zarr"),
    log:
        "results/logs/hidden/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/hidden/{model}-{calib}.tsv"
    priority: 10
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=1.5),
        runtime=minutes(30, per_billion=15 / SHARDS),
    params:
        dtype=dtype_of,
        device=device_of,
        options=EXTRACTION,
        code=code.of_script("states/hidden"),
    message:
        "Extracting hidden states of {wildcards.model} over {wildcards.calib}"
    script:
        "../workflow_scripts/states/hidden.py"


use rule hidden as hidden_shard with:
    output:
        temp(directory("results/{model}/{calib}/hidden-shards/{start}-{stop}")),
    log:
        "results/logs/hidden/{model}-{calib}-{start}-{stop}.log",
    benchmark:
        "results/benchmarks/hidden/{model}-{calib}-{start}-{stop}.tsv"
    message:
        "Extracting hidden states of {wildcards.model} over {wildcards.calib}, sequences {wildcards.start} to {wildcards.stop}"


# script and params are those of `hidden`, because the number of shards changes neither the code nor the options
use rule hidden as hidden_join with:
    input:
        shards_of,
    resources:
        mem_mb=memory_mb(
            2000,
            states=lambda wildcards: resources.norm_states(config, wildcards.model),
        ),
        runtime=minutes(30),
    message:
        "Joining hidden states of {wildcards.model} over {wildcards.calib}"
