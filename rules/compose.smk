"""Compose: all stand-ins of a grid point are fitted together, for variants whose blocks are not fitted one by one."""


rule compose:
    input:
        dense="results/{model}/dense",
        hidden="results/{model}/{calib}/hidden.zarr",
        tokens="results/{model}/{calib}/tokens.safetensors",
        plan=f"{POINT}/plan.json",
    output:
        f"{POINT}/composed.safetensors",
    log:
        f"results/logs/compose/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/compose/{POINT_NAME}.tsv"
    wildcard_constraints:
        method=one_of(variants.having(config, "compose")),
    priority: 5
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(4000, weights=3, states=8),
        runtime=minutes(60, per_billion=30),
    params:
        method=method_of,
        options=options_of("compose"),
        dtype=dtype_of,
        device=device_of,
        code=code_of("compose"),
    message:
        "Composing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/methods/compose.py"
