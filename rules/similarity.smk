"""Similarity: all pairs of layers are compared."""


rule similarity:
    input:
        "results/{model}/{calib}/hidden.zarr",
    output:
        "results/{model}/{calib}/similarity.safetensors",
    log:
        "results/logs/similarity/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/similarity/{model}-{calib}.tsv"
    priority: 10
    conda:
        environment()
    resources:
        **ONE_GPU,
        mem_mb=memory_mb(
            3000,
            states=lambda wildcards: resources.gathered_states(
                config, wildcards.model, wildcards.calib
            ),
        ),
        runtime=minutes(20, per_billion=6),
    params:
        options=config.get("similarity", {}),
        device=device_of,
        code=code.of_script("states/similarity"),
    message:
        "Comparing the layers of {wildcards.model}"
    script:
        "../workflow_scripts/states/similarity.py"
