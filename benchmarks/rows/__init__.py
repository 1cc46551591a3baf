"""Tables of the benchmarks whose runs can be continued: from the rows on disk, and from those of earlier runs.

    retention   the comparison on real tasks, with the outcome of every item
    generation  the statistics and the generated text of pruned models
"""
