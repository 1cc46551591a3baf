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
    """Peak of the resident memory (CPU) or of the allocated memory (GPU) while the pruned model runs."""
    peak_memory_kind: str
    device: str
    threads: int
    repeats: int


class Diagnosis(NamedTuple):
    """What pruning did to states and outputs, compared with the dense model on held-out windows.

    Standard errors are computed over windows. A standard error is None if there is only one window.
    """
    states: list[int]
    """For each state of the pruned model, the index of the corresponding state of the dense model; ascending."""
    error: list[float]
    """For each of `states`, sum |h' - h|^2 / sum |h - mean h|^2: 0 is perfect, and 1 is the error of the mean of h."""
    cosine: list[float]
    """For each of `states`, mean over tokens of cos(h', h)."""
    masked: list[int]
    """For each of `states`, the number of massive tokens that `error` and `cosine` exclude."""
    tokens: int
    """Number of tokens of all windows, massive tokens included."""
    windows: int
    dropped: list[int]
    """Layers of the dense model that the pruned model lacks, ascending."""
    massive_factor: float
    """A token is massive if its norm in the dense model exceeds this factor times the median norm of its window."""
    predictions: int
    """Number of tokens that are followed by another token in their window. The outputs are compared only at these
    tokens."""
    kl_nats: float
    """Mean KL(dense || pruned) in nats per token."""
    kl_nats_stderr: float | None
    agreement: float
    """Share of predictions for which both models have the same most likely token."""
    agreement_stderr: float | None
    nll_dense_nats: float
    """Mean negative log-likelihood of the next token, nats per token."""
    nll_dense_nats_stderr: float | None
    nll_pruned_nats: float
    nll_pruned_nats_stderr: float | None
    nll_increase_nats: float
    """`nll_pruned_nats` minus `nll_dense_nats`."""
    nll_increase_nats_stderr: float | None
    """Standard error over windows of the paired differences; the differences are paired because both models read the
    same text."""


class Answers(NamedTuple):
    """The texts that models write after the same prompts. At each step a model takes its most likely token."""
    prompts: list[str]
    tokens: int
    """Largest number of new tokens of a continuation."""
    rows: list[dict[str, Any]]
    """One entry for each model: `name`, and `texts`, which contains the model's continuation of each prompt."""


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
    """Number of training tokens, the theorems' n."""
    sequences: int
    """Number of the sequences that contain the training tokens."""
    heldout_tokens: int
    l_erm: float
    """The largest entry of `step_mse`."""
    step_mse: list[float]
    """For each linear step, its mean squared error on the training tokens."""
    b_a: float
    """The largest entry of `operator_norms`, the operator norms of the linear steps."""
    operator_norms: list[float]
    r_phi: float
    """Largest norm of the features of training and held-out tokens."""
    generalisation: float
    """The second term under the root of equation 3, with C = 1."""
    generalisation_equation_9: float
    """The second term under the root of equation 3, with the constants of equation 9."""
    horizons: list[dict[str, Any]]
    """Errors and bounds of Theorem 1, one row for each first state `start` and each number of layers `horizon`.
    `accumulation` is the sum of powers of B_A in equation 3. Errors: `train_rms` on training tokens; `rms`, `p99` and
    `largest` on held-out tokens; `constant`, if the training mean is the prediction. Bounds: `bound_products` (equation
    13), `bound_steps` (equation 14), `bound_erm` (equation 16 without the term in n), `bound` (equation 16 with C = 1),
    `bound_equation_9`, and `trivial`, which is (1 + B_A^k) R_phi. `beyond` is the share of held-out tokens whose error
    is above `bound_erm`. `samples_needed` is the n from which `bound` is below `trivial`; None if no n is large enough.
    Truth values: `vacuous` (`bound` >= `trivial`), `vacuous_erm` (`bound_erm` >= `trivial`), `uninformative` (`bound`
    >= `constant`)."""
    ridges: list[dict[str, Any]]
    """Theorem 1 over the whole run of layers, for operators that are fitted again with another ridge. One row for each
    `ridge`, with `l_erm`, `b_a`, and these fields as in `horizons`: `accumulation`, `train_rms`, `rms`, `constant`,
    `bound_erm`, `bound`, `trivial`, `vacuous`, `vacuous_erm`."""
    risks: list[dict[str, Any]]
    """Theorem 2, one row for each class of maps and each number of layers `gap`. `space` (identity, random or learned),
    `features` and `bandwidth_scale` define the class. `share` is the share of the training sequences, and `tokens` is
    the number of tokens in these sequences. `risk` and `train_risk` are the mean squared errors on held-out and on
    training tokens, in squared units of the space. `relative_risk` is `risk` divided by the variance in the space.
    `state_error` is the relative squared error of the state that is decoded from the prediction. `state_error_stderr`
    is the standard error of `state_error`. `state_median` is the median of the relative squared errors of single
    tokens. `direct_error` is the error of the state that is decoded from the input of the map. `operator_norm` is the
    norm of the map. `state_excess` is `state_error` minus the `state_error` of the class identity.
    `state_excess_stderr` is the paired standard error of `state_excess`."""
    conditions: list[dict[str, Any]]
    """The inequality of Theorem 2, one row for each class with random Fourier features and each `gap`. `risk` is the
    left side, `identity_risk` is the right side, and `margin` (Delta) is `identity_risk` - `risk`. `b_a` and `r_h` are
    constants of the theorem. `samples_printed` is the n that equation 4 requires with C = c = 1. `samples_proof` is the
    n of equation 36. `samples_printed` and `samples_proof` are None if `margin` is not positive. Truth values: `holds`
    (the inequality), `holds_without_fit` (the inequality with A = 0), `better_state` (the decoded state is better than
    with the class identity). `state_excess` and `state_excess_stderr` are as in `risks`."""
    stats: dict[str, Any]


class Probes(NamedTuple):
    """How states, logits and probabilities right after a layer change if one part of this layer is removed.

    Each measure is a mean over tokens; h are states, z logits and p probabilities. A field with the suffix `_stderr` is
    the standard error of a measure over windows (None if there is one window). The measures are:
        angle_h, angle_z, angle_p    1 - cosine between the dense and the changed vector
        parallel_h, parallel_z       the change along the dense vector, relative to the norm of this vector
        orthogonal_h, orthogonal_z   the change orthogonal to the dense vector, relative to the norm of this vector
        kl, agreement                KL(dense || other) in nats; whether the most likely token is the same
        estimate_h, estimate_z, estimate_p, estimate_kl    second-order estimates of the angles and of kl
        estimate_uniform, estimate_top5, estimate_top10    estimate_kl with equal weights for all, 5 or 10 tokens
    """
    temperature: float
    final_norm: bool
    """Whether the logits of an inner layer are computed with the final norm."""
    windows: int
    positions: list[int]
    """The positions of each window at which states and outputs are compared."""
    layers: list[dict[str, Any]]
    """One row for each layer and part, with the fields layer, part (attention, mlp or whole) and the measures."""
    tokens: list[dict[str, Any]]
    """One row for each layer, part and window, measured only on the last token of the window: angle_p, estimate_p, kl,
    estimate_kl."""
    stats: dict[str, Any]


class Spaces(NamedTuple):
    """A pruned model compared with the dense model in states, logits and probabilities.

    The measures are those of Probes, as means over prompts.
    """
    temperature: float
    final_norm: bool
    prompts: int
    prompt_tokens: int
    steps: int
    decoding: list[dict[str, Any]]
    """One row for each history and step. With the history `dense`, both models read the text of the dense model. With
    the history `own`, each model reads the text that it has written itself. `same_text` is the share of prompts for
    which the texts of both models are equal up to this step. The other fields are `history`, `step`, and the measures
    of the last state."""
    depth: list[dict[str, Any]]
    """One row for each state, on the text of the dense model. `state` is the index of the state in the dense model. The
    other fields are the measures, as means over about 8 decoding steps."""
    choices: list[dict[str, Any]]
    """One row for each multiple-choice item. `angle_p`, `kl` and `agreement` compare the probabilities of all tokens.
    The fields with the suffix `_candidates` compare the renormalised probabilities of the candidates. `mass` and
    `mass_other` are the total probabilities of the candidates in the dense and in the pruned model. `rank` is the rank
    of the likeliest candidate among all tokens in the dense model."""
    stats: dict[str, Any]


class KernelView(NamedTuple):
    """Features of one held-out sequence at P positions."""
    block: Block
    sequence: int
    """Number of the sequence among all stored sequences."""
    positions: list[int]
    """Ascending."""
    predicted_PF: Tensor
    """A_k ... A_1 phi(h_l), minus `mean_F`."""
    true_PF: Tensor
    """phi(h_{l+k}), minus `mean_F`."""
    mean_F: Tensor
    """The mean of phi(h_{l+k}) over the training tokens."""
    error_P: list[float]
    """|predicted - true|^2 / |true - mean|^2: 0 is perfect, and 1 is the error of the mean as the prediction."""
    error_raw_P: list[float]
    """|predicted - true|^2 / |true|^2, without subtracting the mean."""
    error: float
    """Sum of |predicted - true|^2 over all held-out tokens, divided by the sum of |true - mean|^2 over these tokens."""
    error_unchanged: float
    """The error as in `error` if phi(h_l) itself is the prediction, without any map."""
    mean_share: float
    """The share of |phi|^2 that is due to the mean of the features, over all held-out tokens."""


class Trajectories(NamedTuple):
    """The paths of the states of S samples through L layers in a t-SNE, and the straightness of these paths."""
    layers: list[int]
    sequences: list[int]
    tokens: list[int]
    """For each sample, the position of its token in the sequence."""
    xz_SL2: Tensor
    """Coordinates of all samples and layers in one common t-SNE."""
    straightness: list[dict[str, Any]]
    """One row for each space and run of layers; kdp_core.study.views.straightness_table describes the fields."""
    own_neighbour: float
    """Share of the states whose nearest other state belongs to the same sample."""


class SingleStep(NamedTuple):
    """Statistics of single predictions of a pruned and a dense model; kdp_core.study.single_step defines them."""
    windows: int
    positions: int
    """Number of compared positions of each window; the first position is left out."""
    values: dict[str, float]
    """Mean of each statistic over all positions. The prefix `last_` marks the mean over the last positions."""
    stderr: dict[str, float | None]
    """Standard error of each statistic over windows; None if there is one window."""


class Predictor(NamedTuple):
    """The coefficients by which kdp_core.study.expect predicts lost generation quality from single-step statistics."""
    features: list[str]
    scale: list[float]
    """Root mean square of each transformed feature over all entries of `rows`."""
    coefficients: dict[str, list[float]]
    """For each loss, the weight of each feature. No weight is negative."""
    alpha: dict[str, float]
    """For each loss, the ridge (the penalty) of the regression. Leave-one-group-out cross-validation on the fitted rows
    chooses the ridge."""
    spread: dict[str, float]
    """For each loss, an error bound: for methods left out of the fit, 90 % of the predictions have a smaller error."""
    validation: dict[str, dict[str, float]]
    """For each loss, how well the loss is predicted for methods left out of the fit. The entries are the rank
    correlation, its interval (low, high), the mean error, and the numbers of rows and groups."""
    rows: list[dict[str, Any]]
    """The rows on which the predictor was fitted, with the fields model, method, ratio, features and losses."""
    provenance: dict[str, Any]
    """The command, the data file and its SHA-256, versions, and the data on which the losses were measured."""


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
    """Comparison of a pruned model with the dense model on multiple-choice items, over all tokens and over the
    candidates."""
    items: list[dict[str, Any]]
    """One row for each item; kdp_core.study.candidates.compare makes the row."""
    tasks: list[dict[str, Any]]
    """One row for each task: the means over the items of the task, and the drop of accuracy on the task."""


class Agreement(NamedTuple):
    """How far searches for layers agree: kdp_core.study.agreement."""
    rows: list[dict[str, Any]]
    """One row for each search: the results of the search, and the fields heldout_nats, heldout_ppl_ratio and
    heldout_accuracy of the pruned model."""
    pairs: list[dict[str, Any]]
    """One row for each pair of searches that differ in one property; kdp_core.study.objectives.pairs makes the row."""
    claims: list[dict[str, Any]]
    """One row for each claim of the paper: draws, mean, low, high, told. `told` says whether the data confirm the
    claim. `low` and `high` are None if there is only one draw."""
    stats: dict[str, Any]
    """Numbers of windows, tokens and choices of the held-out text; loss, accuracy and layers of the dense model;
    seconds."""


class Expectation(NamedTuple):
    """What a pruned model is expected to lose in generation, from its single-step statistics."""
    losses: dict[str, float]
    """For each loss, the expected value. 0 means as good as the dense model, and 1 means that no quality remains."""
    low: dict[str, float]
    high: dict[str, float]
    """The upper end of the range from low to high. The range contained the measured loss of nine out of ten models
    whose methods were left out of the fit."""
    nearest: dict[str, Any]
    """The measured model whose statistics are nearest, with the fields model, method, ratio, loss_quality and
    distance."""
    beyond: bool
    """Whether a statistic of the model is larger than in every row on which the predictor was fitted."""
    statistics: dict[str, float]
    sentence: str
