"""Cards: the model card and the provenance of every checkpoint, written next to the checkpoint and into it."""


rule cards:
    input:
        of_points("pruned.json"),
        of_points("scores.json"),
        of_points("efficiency.json"),
        dense_measured(),
    output:
        cards=of_points("card.md"),
        provenance=of_points("provenance.json"),
    log:
        "results/logs/cards.log",
    benchmark:
        "results/benchmarks/cards.tsv"
    conda:
        environment()
    resources:
        mem_mb=memory_mb(1500),
        runtime=minutes(10),
    params:
        # this is a function, because snakemake reads braces in strings as wildcards
        points=lambda wildcards: [
            {
                "point": point,
                "method": variants.base_of(config, point["method"]),
                "config": grid.alone(config, point),
                "seeds": grid.seeds_of(config, point),
            }
            for point in POINTS
        ],
        code=code.of_script("results/cards"),
    message:
        "Writing model cards"
    script:
        "../workflow_scripts/results/cards.py"
