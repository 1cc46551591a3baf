"""Records of the measurements on models: scores, costs, diagnosis, theory, and the comparison in three spaces.

Each record is a NamedTuple. The text below a field states its meaning, axes and unit. kdp_core.base.records defines the
axes and blocks.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kdp_core.base.records import Block

if TYPE_CHECKING:
    from torch import Tensor


class Score(NamedTuple):
    """One measured number."""
    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error over the task's items, in the unit of the value; None if the value has no standard error."""
    items: int
    higher_is_better: bool
    unit: str


class Scores(NamedTuple):
    """All scores of one model."""
    scores: list[Score]
    seconds: float
    versions: dict[str, str]


class Efficiency(NamedTuple):
    """Costs of one model and of the dense model, measured alternately in one process."""
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
    """What pruning did to states and outputs, compared with the dense model on held-out windows.

    Standard errors are computed over windows. They are None if there is only one window.
    """
    states: list[int]
    """Numbers of the pruned model's states as the dense model counts them, ascending; the last state is included."""
    error: list[float]
    """For each of `states`, sum |h' - h|^2 / sum |h - mean h|^2: 0 perfect, 1 as good as the constant mean."""
    cosine: list[float]
    """For each of `states`, mean over tokens of cos(h', h)."""
    masked: list[int]
    """For each of `states`, massive-activation tokens left out of error and cosine."""
    tokens: int
    """Number of tokens of all windows, massive tokens included."""
    windows: int
    dropped: list[int]
    """Layers of the dense model that the pruned one lacks, ascending."""
    massive_factor: float
    """A token is massive if its norm in the dense model exceeds this factor times the median norm of its window."""
    predictions: int
    """Number of tokens that are followed by another token in their window. The outputs are judged on these tokens."""
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
    """The value of the pruned model minus that of the dense model."""
    nll_increase_nats_stderr: float | None
    """Standard error of the paired differences over windows, since both models read the same text."""


class Answers(NamedTuple):
    """The texts that models write after the same prompts. At each step a model takes its most likely token."""
    prompts: list[str]
    tokens: int
    """Largest number of new tokens of a continuation."""
    rows: list[dict[str, Any]]
    """One for each model: `name`, and `texts` with a continuation of each prompt."""


class Theory(NamedTuple):
    """Theorems 1 and 2 of KDP, measured on a run of layers. Errors are norms in the kernel space unless a field says
    otherwise."""
    block: Block
    """The run of layers. Each layer is one linear step."""
    features: int
    """Dimension of the kernel space, the paper's 2m."""
    lift_input: str
    """As in KernelMap."""
    delta: float
    """Probability with which the bounds may fail."""
    tokens: int
    """Training tokens, the theorems' n."""
    sequences: int
    """Number of the sequences that these tokens come from."""
    heldout_tokens: int
    l_erm: float
    """Largest over steps of the mean squared error of one step on training tokens."""
    step_mse: list[float]
    """That error of each step."""
    b_a: float
    """Largest operator norm of a step."""
    operator_norms: list[float]
    r_phi: float
    """Largest norm of the features of training and held-out tokens."""
    generalisation: float
    """Second term under the root of equation 3, C = 1."""
    generalisation_equation_9: float
    """This term with the constants of equation 9."""
    horizons: list[dict[str, Any]]
    """Theorem 1, one row for each start and horizon: start (state), horizon, accumulation; errors train_rms, and
    held-out rms, p99, largest, constant (of predicting the training mean); bounds bound_products (equation 13),
    bound_steps (14), bound_erm (16 without the term in n), bound (16, C = 1), bound_equation_9, trivial ((1 + B_A^k)
    R_phi); beyond (share of held-out tokens above bound_erm), samples_needed (n for bound < trivial; None: no n will
    do), vacuous (bound >= trivial), vacuous_erm, uninformative (bound >= constant)."""
    ridges: list[dict[str, Any]]
    """Theorem 1 over the whole run with operators solved again, one row for each ridge: ridge, l_erm, b_a, and of the
    fields of `horizons` accumulation, train_rms, rms, constant, bound_erm, bound, trivial, vacuous, vacuous_erm."""
    risks: list[dict[str, Any]]
    """Theorem 2, one row for each class and gap: gap (layers), space (identity, random, learned), features,
    bandwidth_scale, share, tokens, risk (held-out mean squared error, units of the space squared), train_risk,
    relative_risk, state_error (relative squared error of the decoded state), state_error_stderr, state_median,
    direct_error, operator_norm, state_excess (state_error less the identity class's) and its paired
    state_excess_stderr."""
    conditions: list[dict[str, Any]]
    """Theorem 2's own inequality, one row for each RFF class and gap: risk, identity_risk, margin (Delta), b_a, r_h,
    samples_printed (equation 4, C = c = 1) and samples_proof (equation 36), None where the margin is not positive;
    holds, holds_without_fit (by A = 0 already), better_state (the decoded state is better too), state_excess and
    state_excess_stderr as in `risks`."""
    stats: dict[str, Any]


class Probes(NamedTuple):
    """Changes of states, logits and probabilities directly after a layer if one part of this layer is left out.

    Measures are means over tokens. The suffix `_stderr` names the standard error of a measure over windows (None if
    there is one window): angle_h, angle_z, angle_p (1 - cosine), parallel_h, orthogonal_h, parallel_z, orthogonal_z (of
    the change, relative to the dense norm), kl (KL(dense || other), nats), agreement of the most likely token;
    the second-order estimates estimate_h, estimate_z, estimate_p, estimate_kl; and, with other weights,
    estimate_uniform, estimate_top5, estimate_top10.
    """
    temperature: float
    final_norm: bool
    """Whether the final norm is applied to inner states before the head."""
    windows: int
    positions: list[int]
    """Positions of each window that are compared."""
    layers: list[dict[str, Any]]
    """One row for each layer and part: layer, part (attention, mlp or whole), the measures."""
    tokens: list[dict[str, Any]]
    """One row for each layer, part and window, measured on the last token of the window only: angle_p, estimate_p, kl,
    estimate_kl."""
    stats: dict[str, Any]


class Spaces(NamedTuple):
    """A pruned model compared with the dense one in states, logits and probabilities. Measures as in Probes, over
    prompts."""
    temperature: float
    final_norm: bool
    prompts: int
    prompt_tokens: int
    steps: int
    decoding: list[dict[str, Any]]
    """One row for each history and step: history (`dense`: both read the dense model's text; `own`: each reads its own
    text), step, same_text (share of prompts whose two texts are still the same), the measures of the last state."""
    depth: list[dict[str, Any]]
    """One row for each state on the dense model's text: state (number in the dense model), the measures over about 8
    steps."""
    choices: list[dict[str, Any]]
    """One row for each multiple-choice item: angle_p, kl, agreement over all tokens, the same with `_candidates` over
    the candidates renormalised, mass and mass_other (of the candidates, dense and pruned), rank (of the likeliest
    candidate among all tokens, dense)."""
    stats: dict[str, Any]


class KernelView(NamedTuple):
    """Features of one held-out sequence at P positions."""
    block: Block
    sequence: int
    """Number of the sequence among all stored sequences."""
    positions: list[int]
    """Ascending."""
    predicted_PF: Tensor
    """A_k ... A_1 phi(h_l), less `mean_F`."""
    true_PF: Tensor
    """phi(h_{l+k}), less `mean_F`."""
    mean_F: Tensor
    """The mean of phi(h_{l+k}) over the training tokens, which was subtracted."""
    error_P: list[float]
    """|predicted - true|^2 / |true - mean|^2: 0 is perfect, and 1 is the error of the mean as the prediction."""
    error_raw_P: list[float]
    """|predicted - true|^2 / |true|^2, without subtracting the mean."""
    error: float
    """The error that error_P has for one position, over all held-out tokens: a ratio of sums."""
    error_unchanged: float
    """The same error for the prediction phi(h_l): the error without any map."""
    mean_share: float
    """Share of |phi|^2 over all held-out tokens that lies in the mean."""


class Trajectories(NamedTuple):
    """Paths of the states of S samples through L layers, as t-SNE shows them, and how straight they are."""
    layers: list[int]
    sequences: list[int]
    tokens: list[int]
    """Position of each sample's token."""
    xz_SL2: Tensor
    """Coordinates in one t-SNE of all samples and layers."""
    straightness: list[dict[str, Any]]
    """A row for each space and run of layers: kdp_core.study.views.straightness_table."""
    own_neighbour: float
    """Share of states whose nearest other state is one of the same sample."""


class SingleStep(NamedTuple):
    """Statistics of single predictions of a pruned model and of the dense one: kdp_core.study.single_step."""
    windows: int
    positions: int
    """Number of compared positions of each window; the first position is left out."""
    values: dict[str, float]
    """Mean of each statistic over all positions. The prefix `last_` marks the mean over the last positions."""
    stderr: dict[str, float | None]
    """Standard error of each statistic over windows; None if there is one window."""


class Predictor(NamedTuple):
    """How the loss of generation quality is predicted from single-step statistics: kdp_core.study.expect."""
    features: list[str]
    scale: list[float]
    """Root mean square of each transformed feature over the rows of the fit."""
    coefficients: dict[str, list[float]]
    """For each loss, the weight of each feature. No weight is below 0."""
    alpha: dict[str, float]
    """The ridge of each loss. It is chosen by leave-one-group-out cross-validation on the fitted rows."""
    spread: dict[str, float]
    """For each loss, the error that nine of ten predictions for left-out methods do not exceed."""
    validation: dict[str, dict[str, float]]
    """For each loss: rank correlation for left-out methods, its interval (low, high), mean error, rows, groups."""
    rows: list[dict[str, Any]]
    """The rows of the fit: model, method, ratio, their features and losses."""
    provenance: dict[str, Any]
    """Command, file and its SHA-256, versions, and the data that the losses were measured on."""


class Candidates(NamedTuple):
    """The outputs of a dense model for multiple-choice items: kdp_core.study.candidates."""
    z_IV: Tensor
    """Logits after the context of each item."""
    log_likelihoods: list[list[float]]
    """Log-likelihoods of the choices of each item."""
    greedy: list[list[bool]]
    """For each choice of each item, whether greedy decoding writes this choice."""
    first: list[list[int]]
    """The distinct first tokens of the choices of each item."""


class Survival(NamedTuple):
    """Comparison of a pruned model with the dense one on multiple-choice items, over all tokens and over the
    candidates."""
    items: list[dict[str, Any]]
    """One row for each item: kdp_core.study.candidates.compare."""
    tasks: list[dict[str, Any]]
    """One row for each task: means over its items, and the drop of its accuracy."""


class Agreement(NamedTuple):
    """How far searches for layers agree: kdp_core.study.agreement."""
    rows: list[dict[str, Any]]
    """One row for each search: its own figures, and heldout_nats, heldout_ppl_ratio and heldout_accuracy of its
    model."""
    pairs: list[dict[str, Any]]
    """One row for each pair of searches that differ in one property: kdp_core.study.objectives.pairs."""
    claims: list[dict[str, Any]]
    """One row for each claim: draws, mean, low, high, told. low and high are None if there is one draw."""
    stats: dict[str, Any]
    """Windows, tokens and choices of the held-out text; loss, accuracy and layers of the dense model; seconds."""


class Expectation(NamedTuple):
    """What a pruned model is expected to lose in generation, from its single-step statistics."""
    losses: dict[str, float]
    """0 means as good as the dense model, and 1 means that nothing of the quality is left."""
    low: dict[str, float]
    high: dict[str, float]
    """The upper end of the range low .. high. For nine of ten left-out models the measured loss was in this range."""
    nearest: dict[str, Any]
    """The measured row whose statistics are nearest: model, method, ratio, losses, distance."""
    beyond: bool
    """Whether a statistic is larger than all those that the predictor was fitted on."""
    statistics: dict[str, float]
    sentence: str
