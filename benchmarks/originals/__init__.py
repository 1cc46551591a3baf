"""The comparisons of `python benchmarks/neighbours.py`: code of the authors beside code of kdp.

    cases     the data of a comparison, a pair of runs, and the rows that compare their results
    shims     lets code for GPUs and for transformers 4 run on a CPU with transformers 5
    zeros     Wanda, SparseGPT: weights are set to zero
    orders    SLEB, ShortGPT, Shortened LLaMA, LLM-Drop: layers or parts are ordered
    widths    SliceGPT, LLM-Pruner, FLAP: states, heads and channels become narrower
    replaced  LaCo, ReplaceMe, LLM-Streamline: layers are merged or replaced

No code of the authors is part of kdp. The modules import this code from clones that the user has made.
"""
