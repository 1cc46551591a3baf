"""Evaluation: held-out tasks, lm-eval scores and costs of every pruned model and of the dense model.

With `evaluate.split` every task of every model is a job of its own, and `evaluate` joins the records of these jobs.
"""

OWN_TASKS = ("window", "lastword_items", "continuation_items", "seed")
SCORING = ("tasks", "limit", "fewshot", "scorer", "batch_size", "max_length", "seed")


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
        options=known_options(config["evaluate"], OWN_TASKS),
        code=code.of_script("score/tasks"),
    message:
        "Making tasks from held-out text {config[evaluate][text]}"
    script:
        "../workflow_scripts/score/tasks.py"


rule score:
    input:
        checkpoint=f"{POINT}/checkpoint",
        tasks="results/tasks",
        data=lambda wildcards: evaluation.benchmark_files(one_task(wildcards)),
    output:
        scores=f"{POINT}/scored/{{task}}.json",
    log:
        f"results/logs/score/{POINT_NAME}-{{task}}.log",
    benchmark:
        f"results/benchmarks/score/{POINT_NAME}-{{task}}.tsv"
    conda:
        environment()
    resources:
        **GPU,
        mem_mb=memory_mb(5000, weights=1.5),
        # a single task can take nearly as long as all tasks together
        runtime=minutes(60, per_billion=60),
    params:
        dtype=dtype_of,
        device=device_of,
        task_folders=config["evaluate"].get("task_folders", []),
        options=lambda wildcards: known_options(one_task(wildcards), SCORING),
        benchmarks=lambda wildcards: one_task(wildcards).get("benchmarks", {}),
        records=lambda wildcards, output: os.path.dirname(output.scores),
        definitions=evaluation.task_files(),
        code=code.of_script("score/evaluate"),
    message:
        "Scoring {wildcards.task} of {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/score/evaluate.py"


use rule score as score_dense with:
    input:
        checkpoint="results/{model}/dense",
        tasks="results/tasks",
        data=lambda wildcards: evaluation.benchmark_files(one_task(wildcards)),
    output:
        scores="results/{model}/scored/{task}.json",
    log:
        "results/logs/score/{model}-{task}.log",
    benchmark:
        "results/benchmarks/score/{model}-{task}.tsv"
    message:
        "Scoring {wildcards.task} of the dense {wildcards.model}"


rule evaluate:
    input:
        checkpoint=f"{POINT}/checkpoint",
        tasks="results/tasks",
        data=evaluation.benchmark_files(config["evaluate"]),
        scored=of_tasks(f"{POINT}/scored"),
    output:
        scores=f"{POINT}/scores.json",
        samples=directory(f"{POINT}/samples"),
    log:
        f"results/logs/evaluate/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/evaluate/{POINT_NAME}.tsv"
    # the longest measurement of a point; timings and diagnoses fill what is left at the end of a run
    priority: 1
    # jobs that only join records are small; a profile can put several of them into one job
    group:
        "evaluate" if SPLIT else None
    conda:
        environment()
    resources:
        **({} if SPLIT else GPU),
        mem_mb=memory_mb(3000 if SPLIT else 5000, weights=0 if SPLIT else 1.5),
        # with `split`, the checkpoint is read only to compute its hash
        runtime=minutes(30, per_billion=3) if SPLIT else minutes(60, per_billion=60),
    params:
        dtype=dtype_of,
        device=device_of,
        task_folders=config["evaluate"].get("task_folders", []),
        options=known_options(config["evaluate"], SCORING),
        benchmarks=config["evaluate"].get("benchmarks", {}),
        # the record of a task remains here if the job fails or another task is added
        records=lambda wildcards, output: f"{os.path.dirname(output.scores)}/scored",
        definitions=evaluation.task_files(),
        code=code.of_script("score/evaluate"),
    message:
        "Evaluating {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}"
    script:
        "../workflow_scripts/score/evaluate.py"


use rule evaluate as evaluate_dense with:
    input:
        checkpoint="results/{model}/dense",
        tasks="results/tasks",
        data=evaluation.benchmark_files(config["evaluate"]),
        scored=of_tasks("results/{model}/scored"),
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
        checkpoint=f"{POINT}/checkpoint",
    output:
        f"{POINT}/efficiency.json",
    log:
        f"results/logs/efficiency/{POINT_NAME}.log",
    benchmark:
        f"results/benchmarks/efficiency/{POINT_NAME}.tsv"
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
        code=code.of_script("score/efficiency"),
    message:
        "Timing {wildcards.method}, ratio {wildcards.ratio}, K_max {wildcards.k_max}, beside the dense model"
    script:
        "../workflow_scripts/score/efficiency.py"


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
