"""The text and the tables of the benchmarks whose runs can be continued. A table is made from the rows on disk and
those of earlier runs.

    retention   the comparison on real tasks, with the outcome of every item
    generation  the statistics and the generated text of pruned models
    text        the calibration mix and the held-out texts of both
"""
