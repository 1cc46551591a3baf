"""Hidden states of the dense model, streamed to Zarr."""


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
        runtime=minutes(30, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        options={
            key: value
            for key, value in config.get("hidden", {}).items()
            if key != "keep"
        },
        code=plumbing.code("hidden"),
    message:
        "Extracting hidden states of {wildcards.model} over {wildcards.calib}"
    script:
        "../workflow_scripts/hidden.py"
