"""The measurements of `python benchmarks/stages.py`: a module for each stage, and modules that several stages use.

    timing      runs that are timed alternately, the limit of matrix products, and the rows of every table
    setup       the model, its tokens and its states, made once for all stages
    made_up     folded blocks and models with random weights
    shared      the common parts of the CPU and the GPU measurement of kdp_residual
    accelerator the model of benchmarks/gpu.py on its device
    alone       lets benchmarks/gpu.py run from a bare checkout
"""
