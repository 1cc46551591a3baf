"""Search: layers are ordered for removal, for variants that do not select blocks by similarity.

A search does not depend on the ratio.
"""


rule search:
    input:
        dense="results/{model}/dense",
        facts="results/{model}/facts.json",
        hidden="results/{model}/{calib}/hidden.zarr",
        tokens="results/{model}/{calib}/tokens.safetensors",
        similarity=similarity_read,
    output:
        SEARCH,
    log:
        "results/logs/search/{model}-{calib}-{method}-k{k_max}.log",
    benchmark:
        "results/benchmarks/search/{model}-{calib}-{method}-k{k_max}.tsv"
    wildcard_constraints:
        method=one_of(variants.having(config, "search")),
    priority: 10
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(4000, weights=2, states=6),
        runtime=minutes(60, per_billion=60),
    params:
        method=method_of,
        options=options_of("search"),
        dtype=dtype_of,
        device=device_of,
        code=code_of("search"),
    message:
        "Ordering the layers to remove: {wildcards.method}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/methods/search.py"
