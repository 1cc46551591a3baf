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
    influence   block influence of layers
    sleb        layers by the loss without them, one after another
    shortened   layers by perplexity, Taylor expansion or magnitude, ranked once
    streamline  a run of layers replaced by one trained layer
    sparsity    weights set to zero, the model's shape unchanged
    merging     layers merged into those before them
    dropping    attentions and MLPs left out one by one
    width       heads and MLP channels cut out, by what they are worth to the loss
    slicing     the width of the states cut to their principal components
    search      in which order layers go, by what each does to the outputs
    methods     the table METHODS: every pruning method, as named steps
    oracles     choices of layers that papers published
    planner     what a sweep would cost, from configurations
    fold        a plan to a pruned checkpoint
    finetune    low-rank fine-tuning of a pruned checkpoint's output head
    tasks       evaluation data and task definitions made from held-out text
    sandbox     programs in a process of their own, with limits
    benchmarks  the paper's benchmarks and others as lm-eval tasks, from the hub or a folder
    evaluate    lm-eval scores with standard errors
    efficiency  parameters, multiply-adds, latency, memory
    diagnose    what training and folding did to the states
    spaces      what pruning does to states, logits and probabilities
    views       kernel-space rows of a held-out sequence, paths of states through the layers
    tables      every measured number and one row a pruned model
    compare     which models can be told apart, on the same items and over seeds
    ablations   rows of the grid by what differs between them
    paper       the KDP paper's tables, as far as a run has their numbers
    costs       what the KDP paper's models cost, from their configurations
    figures     figures with the data they show, and the style of all
    score_figures  rows of methods side by side: scores, layers, errors
    locality_figures  similarity of layers of several models, by distance
    spaces_figures  states, logits and probabilities drawn
    ablation_figures  scores against what an ablation varies
    views_figures  heat maps of the kernel space, paths of the states
    theory_figures  Theorems 1 and 2 drawn and tabulated
    findings    the summary in plain words
    page        parts of the report's page: tables, style, script
    report      one self-contained HTML page
"""
