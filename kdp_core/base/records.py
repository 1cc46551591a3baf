"""What passes between stages: one NamedTuple a record, each field with its meaning, axes and unit.

Axes, used as suffixes of tensor names throughout kdp_core:
    S sequences, T tokens of a sequence, N tokens of any sequence (S*T flattened), L layer states,
    D hidden width of the model, F features of the lift (the paper's 2m), M frequencies (the paper's m),
    R rank of the kernel's low-rank factor, H hidden width of the inverse network, V vocabulary.
State k is the input of decoder layer k before its norm; state `layers` is taken before the final norm.
A block (start, stop) is the half-open run of layers start..stop-1: it maps state `start` to state `stop`.
"""
from typing import Any, NamedTuple

from torch import Tensor

Block = tuple[int, int]


class ModelFacts(NamedTuple):
    """What later stages must know of a dense model without loading it."""
    family: str
    """transformers model type, such as `llama`."""
    layers: int
    width: int
    """Hidden width D."""
    vocabulary: int
    """Rows of the embedding."""
    params_total: int
    """All parameters, tied ones counted once."""
    params_per_layer: list[int]
    macs_per_token: int
    """Multiply-adds of all linear layers for one token, output head in, embedding and attention scores out."""
    source: str
    sha256: str
    """Of the source file; for a folder, of the sorted list of its files' hashes."""


class Tokens(NamedTuple):
    """Packed sequences of equal length, without padding."""
    ids_ST: Tensor
    """int64 token ids."""
    sources: list[str]
    """For each sequence, the name of the text it was cut from."""
    provenance: dict[str, Any]


class Similarity(NamedTuple):
    """Similarity of every pair of stored states; each matrix symmetric, L x L, in the order of `layers`."""
    layers: list[int]
    cosine_LL: Tensor
    """Mean over tokens of the cosine of the two states."""
    angular_LL: Tensor
    """Mean over tokens of arccos(cosine) / pi: a distance, 0 to 1."""
    angular_last_LL: Tensor
    """The same at the last token of each sequence, whatever the treatment."""
    cka_linear_LL: Tensor
    cka_rbf_LL: Tensor
    """CKA from minibatch unbiased HSIC; RBF bandwidth is the median distance of each layer."""
    treatment: str
    """How massive-activation tokens were treated: mask, normalise or raw."""
    tokens: int
    """Tokens that entered."""
    masked: int
    """Massive-activation tokens left out."""


class Selection(NamedTuple):
    """The blocks to replace at one grid point, with the arithmetic that led to them."""
    blocks: list[Block]
    """Non-overlapping, ascending."""
    scores: list[float]
    """Criterion of each block, as in `blocks`."""
    criterion: str
    ratio_target: float
    """Share of all parameters to remove."""
    ratio_planned: float
    """Share that these blocks remove, counted modules put back."""
    ratio_largest: float
    """Largest share that the eligible layers allow."""
    k_max: int
    """Layers of context of a block: a block removes k_max - 1 layers."""
    candidates: list[dict[str, Any]]
    """Every eligible block with its score, best first."""
    layers: int
    """Layers that go: those of the blocks, or as many as the fit is to choose where it chooses them itself."""


class Search(NamedTuple):
    """In which order layers go, by a criterion of the row's own."""
    order: list[int]
    """Layers, the first to go first."""
    scores: list[float]
    """What each layer of `order` adds to the criterion: once those before it are gone where the search is greedy, when
    it alone goes where it ranks layers once."""
    criterion: str
    """Such as `divergence`: KL(dense || pruned) in nats a token."""
    k_max: int
    """At most k_max - 1 consecutive layers go, where the search looks at that."""
    single: dict[str, float]
    """Layer -> its score when it alone goes."""
    evaluations: int
    """Runs of the model, or of a part of it."""
    stats: dict[str, Any]
    """Tokens fitted and judged on, seconds."""


class KernelMap(NamedTuple):
    """Step 1 of KDP: the lift phi and the linear step operators of one block."""
    block: Block
    omega_DM: Tensor
    """Frequencies, per unit of the lift's input (after its own normalisation)."""
    b_M: Tensor
    """Phases in radians."""
    operators_KFF: Tensor
    """A_1 .. A_k, one a layer of the block; phi(h_{l+i}) ~ A_i phi(h_{l+i-1})."""
    gamma_K: Tensor
    """gamma_i of A_i = I + gamma_i B_i."""
    lift_input: str
    """What the lift sees: `raw` states or `rms` (states scaled to unit root mean square)."""
    bypass_above: float | None
    """Tokens whose first state has a larger norm go by the folded block unchanged; None: all are mapped."""
    curve: list[dict[str, Any]]
    """A row an epoch: epoch, seconds (of training, judging left out), lr, loss, mse, cos, heldout_loss, heldout_mse,
    heldout_cos, phi_variance, phi_norm, operator_norm (list, one a step); where asked for, decode_error and
    decode_error_true_features."""
    stats: dict[str, Any]
    """Final held-out figures, ridge used, tokens, seconds."""


class Inverse(NamedTuple):
    """Step 2 of KDP: h_{l+k} ~ alpha * (W2 act(W1 z + b1) + b2), z = prod A_i phi(h_l)."""
    block: Block
    w1_HF: Tensor
    b1_H: Tensor
    w2_DH: Tensor
    b2_D: Tensor
    alpha: float
    activation: str
    curve: list[dict[str, Any]]
    """A row an epoch: epoch, seconds, loss, heldout_loss, heldout_error (relative squared error of the states)."""
    stats: dict[str, Any]


class LinearMap(NamedTuple):
    """An affine stand-in for a block: h_{l+k} ~ weight h_l + bias."""
    block: Block
    weight_DD: Tensor
    """Rows are outputs: y_D = weight_DD @ h_D + bias_D."""
    bias_D: Tensor
    bypass_above: float | None
    """As in KernelMap."""
    stats: dict[str, Any]


class Module(NamedTuple):
    """What stands in the place of a block in the folded model."""
    block: Block
    kind: str
    """A key of kdp_core.model.stand_ins.MODULES, such as `rff_mlp` or `linear`."""
    options: dict[str, Any]
    """The module's shape, as its constructor takes it."""
    tensors: dict[str, Tensor]
    """The module's state dict."""


class Plan(NamedTuple):
    """All that `fold` needs to turn a dense model into a pruned one."""
    method: str
    drop: list[tuple[int, str]]
    """(layer, part) to leave out, ascending; part is `whole`, `attention` or `mlp`."""
    modules: list[Module]
    """Stand-ins, ascending; neighbouring blocks have one each."""
    tensors: dict[str, Tensor]
    """Replacements of remaining tensors of the dense model, by state-dict name."""
    sparse: bool = False
    """Whether the method means the zeros of `tensors`, so that they count as removed; a sum may hold some by chance."""
    shape: dict[str, Any] | None = None
    """Entries of the folded configuration that say in which shapes the model is built, for plans that change widths;
    `tensors` then have these shapes, and may hold tensors that the dense model lacks. Such a plan drops no layers."""


class Composed(NamedTuple):
    """The stand-ins of one grid point, fitted together rather than block by block."""
    plan: Plan
    curve: list[dict[str, Any]]
    """A row an epoch, if any: epoch, seconds; of joint training kl, heldout_loss, heldout_kl (nats a token), of other
    training loss and heldout_loss in its own unit."""
    fits: list[dict[str, Any]]
    """A row a stand-in: block, heldout_error (relative squared error of the block's last state on what the pruned
    model feeds it), params."""
    stats: dict[str, Any]
    """Tokens, seconds of the parts; after joint training the kept epoch and its heldout_loss and heldout_kl."""


class PrunedFacts(NamedTuple):
    """What fold did, counted on the folded model itself."""
    method: str
    layers_before: int
    layers_removed: int
    params_before: int
    params_after: int
    params_added: int
    """Parameters of the modules put in, part of params_after."""
    params_removed: float
    """Share of all parameters removed: 1 - (params_after - params_zeroed) / params_before."""
    blocks: list[Block]
    """Runs of layers that are gone: those with a stand-in one by one, the others as long as they are."""
    parts: list[tuple[int, str]]
    """(layer, part) of the layers that lack `attention` or `mlp` alone, ascending."""
    params_zeroed: int
    """Weights set to zero: still stored, counted as removed, no smaller or faster without sparse kernels."""


class Finetuned(NamedTuple):
    """A low-rank change of the output head, trained to give the dense model's outputs (the dagger rows)."""
    place: str
    """`head`: merged into the head's weight; `adapter`: kept before a head that is tied to the embedding."""
    rank: int
    params_added: int
    """By the change itself: 0 where it was merged or not kept."""
    epoch: int
    """Whose weights were kept; 0 is the start, where the change is zero: nothing was better, nothing was changed."""
    judge: str
    """Held-out figure that chose the epoch: `loss` or `ppl`."""
    curve: list[dict[str, Any]]
    """A row an epoch, the start first as 0: epoch, seconds, lr, loss (None at the start), heldout_loss,
    heldout_kl_nats, heldout_ce_nats."""
    sequences: int
    """Trained on."""
    heldout_sequences: int
    tokens: int
    """Predictions of one epoch."""
    options: dict[str, Any]
    seconds: float
    """Of everything: both models' states, training, judging."""


class Score(NamedTuple):
    """One measured number."""
    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error over the task's items, in the unit of the value; None where it has none."""
    items: int
    higher_is_better: bool
    unit: str


class Scores(NamedTuple):
    """All that one model scored."""
    scores: list[Score]
    seconds: float
    versions: dict[str, str]


class Efficiency(NamedTuple):
    """Costs of one model beside the dense one, measured in turns in one process."""
    params: int
    params_dense: int
    macs: int
    """Multiply-adds of the linear layers for `tokens` tokens (the paper's FLOPs)."""
    macs_dense: int
    tokens: int
    prefill_ms: float
    """Median latency of a forward pass over `tokens` tokens."""
    prefill_dense_ms: float
    decode_ms: float
    """Median latency of one cached decoding step."""
    decode_dense_ms: float
    speedup_prefill: float
    """Median of the paired ratios dense / pruned."""
    speedup_decode: float
    peak_memory_mib: float
    """Peak resident memory (CPU) or allocated memory (GPU) of the pruned model's runs."""
    peak_memory_kind: str
    device: str
    threads: int
    repeats: int


class Diagnosis(NamedTuple):
    """What pruning did to states and outputs, on held-out windows beside the dense model.

    Standard errors are over windows, None where there is one window only.
    """
    states: list[int]
    """The dense model's numbers of the states that the pruned one has, ascending: of its layers, and the last."""
    error: list[float]
    """For each of `states`, sum |h' - h|^2 / sum |h - mean h|^2: 0 perfect, 1 as good as the constant mean."""
    cosine: list[float]
    """For each of `states`, mean over tokens of cos(h', h)."""
    masked: list[int]
    """For each of `states`, massive-activation tokens left out of error and cosine."""
    tokens: int
    """Tokens of all windows, massive ones in."""
    windows: int
    dropped: list[int]
    """Layers of the dense model that the pruned one lacks, ascending."""
    massive_factor: float
    """A token is massive where its dense norm exceeds this times its window's median norm."""
    predictions: int
    """Tokens with a next one in their window: what the outputs are judged on."""
    kl_nats: float
    """Mean KL(dense || pruned) in nats per token."""
    kl_nats_stderr: float | None
    agreement: float
    """Share of predictions with the same most likely token."""
    agreement_stderr: float | None
    nll_dense_nats: float
    """Mean negative log-likelihood of the next token, nats per token."""
    nll_dense_nats_stderr: float | None
    nll_pruned_nats: float
    nll_pruned_nats_stderr: float | None
    nll_increase_nats: float
    """Pruned less dense."""
    nll_increase_nats_stderr: float | None
    """Of the paired differences, window by window: both models read the same text."""


class Theory(NamedTuple):
    """Theorems 1 and 2 of KDP measured on a run of layers; errors are norms in the kernel space unless named."""
    block: Block
    """The run: one linear step a layer."""
    features: int
    """Dimension of the kernel space, the paper's 2m."""
    lift_input: str
    """As in KernelMap."""
    delta: float
    """Probability with which the bounds may fail."""
    tokens: int
    """Training tokens, the theorems' n."""
    sequences: int
    """Training sequences that they come from."""
    heldout_tokens: int
    l_erm: float
    """Largest over steps of the mean squared error of one step on training tokens."""
    step_mse: list[float]
    """That error of each step."""
    b_a: float
    """Largest operator norm of a step."""
    operator_norms: list[float]
    r_phi: float
    """Largest norm of features, training and held-out."""
    generalisation: float
    """Second term under the root of equation 3, C = 1."""
    generalisation_equation_9: float
    """The same with the constants of equation 9."""
    horizons: list[dict[str, Any]]
    """Theorem 1, a row a start and horizon: start (state), horizon, accumulation; errors train_rms, and held-out rms,
    p99, largest, constant (of predicting the training mean); bounds bound_products (equation 13), bound_steps (14),
    bound_erm (16 without the term in n), bound (16, C = 1), bound_equation_9, trivial ((1 + B_A^k) R_phi);
    beyond (share of held-out tokens above bound_erm), samples_needed (n for bound < trivial; None: no n will do),
    vacuous (bound >= trivial), vacuous_erm, uninformative (bound >= constant)."""
    ridges: list[dict[str, Any]]
    """Theorem 1 over the whole run with operators solved anew, a row a ridge: ridge, l_erm, b_a, and of the fields of
    `horizons` accumulation, train_rms, rms, constant, bound_erm, bound, trivial, vacuous, vacuous_erm."""
    risks: list[dict[str, Any]]
    """Theorem 2, a row a class and gap: gap (layers), space (identity, random, learned), features, bandwidth_scale,
    share, tokens, risk (held-out mean squared error, units of the space squared), train_risk, relative_risk,
    state_error (relative squared error of the decoded state), state_error_stderr, state_median, direct_error,
    operator_norm, state_excess (state_error less the identity class's) and its paired state_excess_stderr."""
    conditions: list[dict[str, Any]]
    """Theorem 2's own inequality, a row an RFF class and gap: risk, identity_risk, margin (Delta), b_a, r_h,
    samples_printed (equation 4, C = c = 1) and samples_proof (equation 36), None where the margin is not positive;
    holds, holds_without_fit (by A = 0 already), better_state (the decoded state is better too), state_excess and
    state_excess_stderr as in `risks`."""
    stats: dict[str, Any]


class Probes(NamedTuple):
    """One part of one layer left out at a time: what changes after that layer in states, logits and probabilities.

    Measures are means over tokens, each with its `_stderr` over windows (None where there is one): angle_h, angle_z,
    angle_p (1 - cosine), parallel_h, orthogonal_h, parallel_z, orthogonal_z (of the change, relative to the dense
    norm), kl (KL(dense || other), nats), agreement of the most likely token; estimates of second order estimate_h,
    estimate_z, estimate_p, estimate_kl; and of the same unit with other weights estimate_uniform, estimate_top5,
    estimate_top10.
    """
    temperature: float
    final_norm: bool
    """Whether inner states pass the final norm before the head."""
    windows: int
    positions: list[int]
    """Of each window."""
    layers: list[dict[str, Any]]
    """A row a layer and part: layer, part (attention, mlp or whole), the measures."""
    tokens: list[dict[str, Any]]
    """A row a layer, part and window, its last token alone: angle_p, estimate_p, kl, estimate_kl."""
    stats: dict[str, Any]


class Spaces(NamedTuple):
    """A pruned model beside the dense one in states, logits and probabilities; measures as in Probes, over prompts."""
    temperature: float
    final_norm: bool
    prompts: int
    prompt_tokens: int
    steps: int
    decoding: list[dict[str, Any]]
    """A row a history and step: history (`dense`: both read what the dense model says; `own`: each reads what it says
    itself), step, same_text (share of prompts whose two texts are still the same), the measures of the last state."""
    depth: list[dict[str, Any]]
    """A row a state (the dense model's number) on the dense model's text: state, the measures over about 8 steps."""
    choices: list[dict[str, Any]]
    """A row a multiple-choice item: angle_p, kl, agreement over all tokens, the same with `_candidates` over the
    candidates renormalised, mass and mass_other (of the candidates, dense and pruned), rank (of the likeliest
    candidate among all tokens, dense)."""
    stats: dict[str, Any]
