"""kdp, the command line: everyday tasks with one model, without the workflow. `python -m kdp` runs the same commands.

Each command calls kdp_core and prints the result. A grid of many points is the workflow's task.

    app         the commands, and the form of an error
    sources     models and texts by source string or path; `default` names the embedded model and texts
    pruning     the stages of `kdp prune`, each with its record on disk
    heldout     perplexity of checkpoints on the windows of one text, and the paired difference of two
    about       the model card and the provenance that a checkpoint carries
    expectation what a pruned checkpoint is expected to lose in generation
    record      what is known of a checkpoint
    show        tables, progress and the picture of the layers
    workflow    calls of the workflow: the check of a configuration, and the plan
    starter     the configuration that `kdp init` writes
"""
