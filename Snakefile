"""kdp prunes language models by every variant of a grid, scores them, and writes a report.

Flow: text, dense -> tokens -> hidden -> similarity, search -> blocks -> step, compose -> fold -> finetune
      -> evaluate, efficiency, diagnose, answers -> comparisons -> tables, ablations, paper, views, theory, spaces
      -> figures -> cards, report, check.
Each stage has a rule file and a library module; each rule has a thin script.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


report: "rules/captions/workflow.rst"


# `exec` replaces the shell by the script, so that signals reach the script and the job ends when the script ends
shell.prefix("set -euo pipefail; exec ")


include: "rules/common.smk"
include: "rules/common_figures.smk"
include: "rules/common_report.smk"
include: "rules/common_sources.smk"
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
include: "rules/expect.smk"
include: "rules/agreement.smk"
include: "rules/choices.smk"
include: "rules/answers.smk"
include: "rules/paper.smk"
include: "rules/cards.smk"
include: "rules/report.smk"
include: "rules/test.smk"


onstart:
    refuse_absent()


onerror:
    for reason in failures.reasons([str(path) for path in log]):
        failures.say_last(reason)


localrules:
    all,


rule all:
    default_target: True
    input:
        "results/report.html",
        "results/scores.csv",
        "results/summary.csv",
        "results/checked.txt",
        # the dense scores are also named here, so that they run in parallel with the extraction, before blocks are
        # selected
        dense_measured(),
        # the scores are also named here, so that the blocks of all points are selected at the same time
        of_points("scores.json"),
        of_points("card.md"),
        theory_wanted(),
        tables_wanted(),
    message:
        "Everything is built"
