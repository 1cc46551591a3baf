"""kdp: Kernelized Dynamics Pruning and its neighbours, as a pure PyTorch library.

Modules in the order of the flow; each imports only from those above it.
    records     what passes between stages, with the glossary of axes
    store       records to and from disk, atomically
    assets      source strings to local files, checked by hash
    models      dense checkpoints: convert once, load, count
    texts       documents, calibration mixes, packed sequences
    hidden      hidden states of a model, streamed to Zarr
    similarity  cosine, angular distance and CKA of all pairs of layers
    blocks      which layers to replace for a ratio
    kernel      step 1: learnable random Fourier features and linear step operators
    inverse     step 2: from the kernel space back to hidden states
    linear      affine maps in the original space
    modeling    folded Hugging Face models
    methods     the table METHODS: every pruning method, as named steps
    fold        a plan to a pruned checkpoint
    tasks       evaluation data and task definitions made from held-out text
    evaluate    lm-eval scores with standard errors
    efficiency  parameters, multiply-adds, latency, memory
    diagnose    what training and folding did to the states
    figures     figures and tables from records
    report      one self-contained HTML page
"""
