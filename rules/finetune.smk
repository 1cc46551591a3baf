"""Finetune: the pruned checkpoint of a variant is fine-tuned. Blocks, steps and fold are those of that variant."""


# a fine-tuned variant has the plan of its source, so nothing is selected or folded for it
ruleorder: finetune > blocks
ruleorder: finetune > fold


rule finetune:
    input:
        dense="results/{model}/dense",
        tokens="results/{model}/{calib}/tokens.safetensors",
        checkpoint=of_source("checkpoint"),
        pruned=of_source("pruned.json"),
        plan=of_source("plan.json"),
    output:
        checkpoint=directory(f"{POINT}/checkpoint"),
        pruned=f"{POINT}/pruned.json",
        plan=f"{POINT}/plan.json",
        finetuned=f"{POINT}/finetuned.json",
    log:
        f"results/logs/finetune/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/finetune/{POINT_NAME}.tsv"
    wildcard_constraints:
        # without fine-tuned variants the rule matches nothing
        method=one_of(variants.finetuned(config)),
    priority: 5
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(4000, weights=3),
        runtime=minutes(60, per_billion=30),
    params:
        dtype=dtype_of,
        device=device_of,
        options=lambda wildcards: variants.options(config, wildcards.method)["finetune"],
        code=code.of_script("prune/finetune"),
    message:
        "Fine-tuning {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/prune/finetune.py"
