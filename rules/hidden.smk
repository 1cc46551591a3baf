"""Hidden states of the dense model, streamed to Zarr."""


rule hidden:
    input:
        dense="results/{model}/dense",
        tokens="results/{model}/{calib}/tokens.safetensors",
    output:
        directory("results/{model}/{calib}/hidden.zarr"),
    log:
        "results/logs/hidden/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/hidden/{model}-{calib}.tsv"
    priority: 10
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000),
        runtime=120,
    params:
        dtype=dtype_of,
        device=device_of,
        options=config.get("hidden", {}),
        code=plumbing.code("hidden"),
    message:
        "Extracting hidden states of {wildcards.model} over {wildcards.calib}"
    script:
        "../workflow_scripts/hidden.py"
