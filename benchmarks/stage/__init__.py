"""The stages that `python benchmarks/stages.py` measures; a module for each, and what they share.

    timing      runs that are timed in turns, the limit of matrix products, and the rows of every table
    setup       the model, its tokens and its states, made once for all stages
"""
