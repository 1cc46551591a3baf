"""Views of the kernel space of trained variants, and paths of the states, if the config has `views`."""


rule kernel_view:
    input:
        hidden="results/{model}/{calib}/hidden.zarr",
        kernel=f"{BLOCK}/kernel.safetensors",
    output:
        f"{BLOCK}/kernel-view.safetensors",
    log:
        "results/logs/views/{model}-{calib}-{method}-{start}-{stop}.log",
    benchmark:
        "results/benchmarks/views/{model}-{calib}-{method}-{start}-{stop}.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, states=4),
        runtime=minutes(20),
    params:
        options=VIEWS.get("heatmaps", {}),
        # the sequences that are held out are those of step 1
        split=lambda wildcards: known_options(
            options_of("kernel")(wildcards), ("heldout", "seed")
        ),
        code=code.of_script("study/views"),
    message:
        "Writing the kernel space of {wildcards.method}, block {wildcards.start}-{wildcards.stop}"
    script:
        "../workflow_scripts/study/views.py"


rule trajectories:
    input:
        hidden="results/{model}/{calib}/hidden.zarr",
    output:
        record="results/{model}/{calib}/trajectories.safetensors",
        straightness="results/{model}/{calib}/straightness.csv",
    log:
        "results/logs/views/{model}-{calib}-trajectories.log",
    benchmark:
        "results/benchmarks/views/{model}-{calib}-trajectories.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(3000, states=4),
        runtime=minutes(30),
    params:
        options=VIEWS.get("trajectories", {}),
        code=code.of_script("study/views"),
    message:
        "Computing paths of the states of {wildcards.model} through its layers"
    script:
        "../workflow_scripts/study/views.py"
