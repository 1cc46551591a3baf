"""Compose: all stand-ins of a grid point at once, for rows whose blocks are not fitted one by one."""


rule compose:
    input:
        dense="results/{model}/dense",
        hidden="results/{model}/{calib}/hidden.zarr",
        tokens="results/{model}/{calib}/tokens.safetensors",
        plan="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/plan.json",
    output:
        "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/composed.safetensors",
    log:
        "results/logs/compose/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/compose/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
    wildcard_constraints:
        method=rows_with("compose"),
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(4000, weights=3, states=8),
        runtime=minutes(60, per_billion=30),
    params:
        method=lambda wildcards: plumbing.base_of(config, wildcards.method),
        options=lambda wildcards: plumbing.options(config, wildcards.method).get(
            "compose", {}
        ),
        dtype=dtype_of,
        device=device_of,
        code=lambda wildcards: plumbing.step_code(
            plumbing.base_of(config, wildcards.method), "compose"
        ),
    message:
        "Composing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/compose.py"
