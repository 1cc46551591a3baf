"""Steps: one step of one method on one block. Independent of the ratio, so grid points share them."""


rule step:
    input:
        facts="results/{model}/facts.json",
        hidden="results/{model}/{calib}/hidden.zarr",
        before=steps_before,
    output:
        "results/{model}/{calib}/{method}/blocks/{start}-{stop}/{step}.safetensors",
    log:
        "results/logs/step/{model}-{calib}-{method}-{start}-{stop}-{step}.log",
    benchmark:
        "results/benchmarks/step/{model}-{calib}-{method}-{start}-{stop}-{step}.tsv"
    conda:
        environment()
    resources:
        **ONE_GPU,
        mem_mb=memory_mb(3000, states=block_states),
        runtime=minutes(60, per_billion=30),
    params:
        method=lambda wildcards: plumbing.base_of(config, wildcards.method),
        options=lambda wildcards: plumbing.options(config, wildcards.method).get(
            wildcards.step, {}
        ),
        device=device_of,
        code=lambda wildcards: plumbing.step_code(
            plumbing.base_of(config, wildcards.method), wildcards.step
        ),
    message:
        "Fitting {wildcards.method} on layers {wildcards.start}-{wildcards.stop}: {wildcards.step}"
    script:
        "../workflow_scripts/step.py"
