"""Steps: one step of one method is fitted on one block.

A step does not depend on the ratio, so all grid points that have the block share the step.
"""


rule step:
    input:
        facts="results/{model}/facts.json",
        hidden="results/{model}/{calib}/hidden.zarr",
        before=steps_before,
    output:
        f"{BLOCK}/{{step}}.safetensors",
    log:
        "results/logs/step/{model}-{calib}-{method}-{start}-{stop}-{step}.log",
    benchmark:
        "results/benchmarks/step/{model}-{calib}-{method}-{start}-{stop}-{step}.tsv"
    priority: 5
    conda:
        environment()
    resources:
        **ONE_GPU,
        mem_mb=memory_mb(
            3000,
            states=lambda wildcards: resources.block_states(
                int(wildcards.start), int(wildcards.stop)
            ),
        ),
        runtime=minutes(60, per_billion=30),
    params:
        method=method_of,
        options=options_of("step"),
        device=device_of,
        code=code_of("step"),
    message:
        "Fitting {wildcards.method} on layers {wildcards.start}-{wildcards.stop}: {wildcards.step}"
    script:
        "../workflow_scripts/methods/step.py"
