"""Evaluation: held-out tasks, lm-eval scores, and costs, of every pruned model and of the dense one."""

OWN_TASKS = ("window", "lastword_items", "continuation_items", "seed")
SCORING = ("tasks", "limit", "fewshot", "batch_size", "max_length", "seed")


rule tasks:
    input:
        f"results/texts/{config['evaluate']['text']}.jsonl",
    output:
        directory("results/tasks"),
    log:
        "results/logs/tasks.log",
    benchmark:
        "results/benchmarks/tasks.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        options={
            key: value for key, value in config["evaluate"].items() if key in OWN_TASKS
        },
        code=plumbing.code("tasks"),
    message:
        "Making tasks from held-out text {config[evaluate][text]}"
    script:
        "../workflow_scripts/tasks.py"


rule evaluate:
    input:
        checkpoint="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/checkpoint",
        tasks="results/tasks",
        data=plumbing.benchmark_files(config),
    output:
        scores="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/scores.json",
        samples=directory("results/{model}/{calib}/{method}/r{ratio}-k{k_max}/samples"),
    log:
        "results/logs/evaluate/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/evaluate/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=1.5),
        runtime=minutes(60, per_billion=60),
    params:
        dtype=dtype_of,
        device=device_of,
        task_folders=config["evaluate"].get("task_folders", []),
        options={
            key: value for key, value in config["evaluate"].items() if key in SCORING
        },
        benchmarks=config["evaluate"].get("benchmarks", {}),
        # what a task gave stays here when the job fails, or when another task is asked for
        records=lambda wildcards, output: f"{os.path.dirname(output.scores)}/scored",
        definitions=plumbing.task_files(),
        code=plumbing.code("evaluate"),
    message:
        "Evaluating {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/evaluate.py"


use rule evaluate as evaluate_dense with:
    input:
        checkpoint="results/{model}/dense",
        tasks="results/tasks",
        data=plumbing.benchmark_files(config),
    output:
        scores="results/{model}/scores.json",
        samples=directory("results/{model}/samples"),
    log:
        "results/logs/evaluate/{model}.log",
    benchmark:
        "results/benchmarks/evaluate/{model}.tsv"
    message:
        "Evaluating the dense {wildcards.model}"


rule efficiency:
    input:
        dense="results/{model}/dense",
        checkpoint="results/{model}/{calib}/{method}/r{ratio}-k{k_max}/checkpoint",
    output:
        "results/{model}/{calib}/{method}/r{ratio}-k{k_max}/efficiency.json",
    log:
        "results/logs/efficiency/{model}-{calib}-{method}-r{ratio}-k{k_max}.log",
    benchmark:
        "results/benchmarks/efficiency/{model}-{calib}-{method}-r{ratio}-k{k_max}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(3000, weights=3),
        runtime=minutes(10, per_billion=5),
    params:
        dtype=dtype_of,
        device=device_of,
        options=config.get("efficiency", {}),
        code=plumbing.code("efficiency"),
    message:
        "Timing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}, beside the dense model"
    script:
        "../workflow_scripts/efficiency.py"


use rule efficiency as efficiency_dense with:
    input:
        dense="results/{model}/dense",
        checkpoint="results/{model}/dense",
    output:
        "results/{model}/efficiency.json",
    log:
        "results/logs/efficiency/{model}.log",
    benchmark:
        "results/benchmarks/efficiency/{model}.tsv"
    message:
        "Timing the dense {wildcards.model}"
