"""kdp: prune language models by every method of a grid, evaluate, and report.

Flow: text, dense -> tokens -> hidden -> similarity, search -> blocks -> step, compose -> fold -> finetune
      -> evaluate, efficiency, diagnose -> comparisons -> tables, ablations, paper, views, theory, spaces -> figures
      -> report.
One rule file a stage, one thin script a rule, one library module a stage.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


report: "rules/captions/workflow.rst"


# a script takes the place of the shell that starts it, so that a signal finds it and nothing ends before it
shell.prefix("set -euo pipefail; exec ")


include: "rules/common.smk"
include: "rules/plan.smk"
include: "rules/assets.smk"
include: "rules/hidden.smk"
include: "rules/similarity.smk"
include: "rules/search.smk"
include: "rules/blocks.smk"
include: "rules/step.smk"
include: "rules/compose.smk"
include: "rules/fold.smk"
include: "rules/finetune.smk"
include: "rules/evaluate.smk"
include: "rules/diagnose.smk"
include: "rules/figures.smk"
include: "rules/ablations.smk"
include: "rules/views.smk"
include: "rules/theory.smk"
include: "rules/spaces.smk"
include: "rules/paper.smk"
include: "rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        "results/report.html",
        "results/scores.csv",
        "results/summary.csv",
        # named here too, so that they run beside the extraction, before any block is known
        dense_measured(),
        # and these, so that the blocks of all points are chosen at once
        of_points("scores.json"),
        theory_wanted(),
        tables_wanted(),
    message:
        "Everything is built"
