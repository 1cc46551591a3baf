"""kdp: Kernelized Dynamics Pruning and its neighbours, as a pure PyTorch library.

Folders in the order of the flow; each imports only from itself and from those above it.
    base     records that pass between stages, their storage, resuming, texts
    model    model families, checkpoints, passes through single layers, distillation losses
    states   hidden states, the states of one block, similarity of layers
    methods  every pruning method, a file each with its row of the table METHODS
    prune    a plan to a pruned checkpoint, and its fine-tuned variant
    score    tasks, benchmarks, scores, costs, diagnosis
    study    theory, kernel-space views, three spaces, published oracles, planner
    results  tables, comparisons, ablations, the paper's tables, the report
    figures  every figure, in one style
"""
