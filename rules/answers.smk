"""Answers: the dense model and pruned models of one ratio continue the same prompts, if the config has `answers`."""


rule answers:
    input:
        dense="results/{model}/dense",
        checkpoints=lambda wildcards: [
            f"{grid.folder(point)}/checkpoint" for point in answering(wildcards)
        ],
    output:
        "results/{model}/{calib}/answers.json",
    log:
        "results/logs/answers/{model}-{calib}.log",
    benchmark:
        "results/benchmarks/answers/{model}-{calib}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=1.5),
        runtime=minutes(10, per_billion=15),
    params:
        dtype=dtype_of,
        device=device_of,
        names=lambda wildcards: grid.answering_names(answering(wildcards)),
        # this is a function, because snakemake reads braces in strings as wildcards
        options=lambda wildcards: known_options(
            config.get("answers", {}), ("prompts", "tokens")
        ),
        code=code.of_script("study/answers"),
    message:
        "Asking {wildcards.model} and its pruned models"
    script:
        "../workflow_scripts/study/answers.py"
