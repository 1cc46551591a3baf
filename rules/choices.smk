"""Multiple choice over all tokens and over the candidates alone, if the config has `choices`."""

CHOSEN = evaluation.choices(config)


rule choices_dense:
    input:
        checkpoint="results/{model}/dense",
        data=evaluation.benchmark_files({"benchmarks": CHOSEN}),
    output:
        "results/{model}/choices.safetensors",
    log:
        "results/logs/choices/{model}.log",
    benchmark:
        "results/benchmarks/choices/{model}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=1.5),
        runtime=minutes(30, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        chosen=CHOSEN,
        definitions=evaluation.task_files(),
        code=code.of_script("study/choices"),
    message:
        "Reading choices with the dense {wildcards.model}"
    script:
        "../workflow_scripts/study/choices.py"


use rule choices_dense as choices with:
    input:
        checkpoint=f"{POINT}/checkpoint",
        known="results/{model}/choices.safetensors",
        data=evaluation.benchmark_files({"benchmarks": CHOSEN}),
    output:
        f"{POINT}/choices.json",
    log:
        f"results/logs/choices/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/choices/{POINT_NAME}.tsv"
    message:
        "Reading choices with {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
