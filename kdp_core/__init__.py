"""kdp: Kernelized Dynamics Pruning and its neighbours, as a pure PyTorch library.

Modules in the order of the flow; each imports only from those above it.
    records     what passes between stages, with the glossary of axes
    store       records to and from disk, atomically
    resume      the state of a training on disk, so that one cut short goes on
    assets      source strings to local files, checked by hash
    modeling    folded Hugging Face models
    models      dense checkpoints: convert once, load, count
    texts       documents, calibration mixes, packed sequences
    hidden      hidden states of a model, streamed to Zarr
    states      the states of one block, split and masked for fitting
    similarity  cosine, angular distance and CKA of all pairs of layers
    blocks      which layers to replace for a ratio
    runs        one run of consecutive layers for a ratio
    lorp        layers that resemble many others, spread over the depth
    distil      the loss between a pruned model's outputs and the dense one's
    passes      single layers of a model, run on stored states
    joint       stand-ins trained together against the dense model's outputs
    kernel      step 1: learnable random Fourier features and linear step operators
    inverse     step 2: from the kernel space back to hidden states
    theory      Theorems 1 and 2 of KDP as numbers
    linear      affine maps in the original space
    projection  frequencies of random features learned against held-out decode error
    residual    stand-ins with a skip path and a dictionary of the model's own neurons
    replaceme   a run of layers absorbed into the MLP before it
    influence   block influence of layers, and orders that papers published
    sleb        layers by the loss without them, one after another
    shortened   layers by perplexity, Taylor expansion or magnitude, ranked once
    streamline  a run of layers replaced by one trained layer
    sparsity    weights set to zero, the model's shape unchanged
    merging     layers merged into those before them
    dropping    attentions and MLPs left out one by one
    search      in which order layers go, by what each does to the outputs
    methods     the table METHODS: every pruning method, as named steps
    planner     what a sweep would cost, from configurations
    fold        a plan to a pruned checkpoint
    finetune    low-rank fine-tuning of a pruned checkpoint's output head
    tasks       evaluation data and task definitions made from held-out text
    evaluate    lm-eval scores with standard errors
    efficiency  parameters, multiply-adds, latency, memory
    diagnose    what training and folding did to the states
    views       kernel-space rows of a held-out sequence, paths of states through the layers
    tables      every measured number and one row a pruned model
    ablations   rows of the grid by what differs between them
    figures     figures with the data they show
    ablation_figures  scores against what an ablation varies
    views_figures  heat maps of the kernel space, paths of the states
    theory_figures  Theorems 1 and 2 drawn and tabulated
    report      one self-contained HTML page
"""
