"""The stages that `python benchmarks/stages.py` measures; a module for each, and what they share.

    timing      runs that are timed in turns, the limit of matrix products, and the rows of every table
    setup       the model, its tokens and its states, made once for all stages
    made_up     folded blocks and models with random weights
    shared      what the CPU and the GPU measurement of kdp_residual share
    accelerator the model of benchmarks/gpu.py on its device
    alone       lets benchmarks/gpu.py run from a bare checkout
"""
