"""The records that stages write and read. Each is a NamedTuple; the text below a field states its meaning and unit.

Axes, used as suffixes of tensor names throughout kdp_core:
    S sequences, T tokens of a sequence, N tokens of any sequence (S*T flattened), L layer states,
    D hidden width of the model, F features of the lift (the paper's 2m), M frequencies (the paper's m),
    R rank of the kernel's low-rank factor, H hidden width of the inverse network, V vocabulary.
State k is the input of decoder layer k before its norm. State `layers` is the input of the final norm. A block (start,
stop) is the half-open run of layers start..stop-1. These layers map state `start` to state `stop`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # tables and pages read records of plain numbers, without the seconds that torch takes to import
    from torch import Tensor

Block = tuple[int, int]


class ModelFacts(NamedTuple):
    """The facts about a dense model that later stages need without loading the model."""
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
    """Multiply-adds of all linear maps for one token, with the output head, but without embedding and attention
    scores."""
    source: str
    sha256: str
    """SHA-256 of the source file; for a folder, the hash of the sorted list of its files' hashes."""
    licence: str = ""
    """The licence of the base model as its files name it, such as `apache-2.0`; empty if they name none."""


class Tokens(NamedTuple):
    """Packed sequences of equal length, without padding."""
    ids_ST: Tensor
    """int64 token ids."""
    sources: list[str]
    """For each sequence, the name of the text from which the sequence was cut."""
    provenance: dict[str, Any]


class Similarity(NamedTuple):
    """Similarity of every pair of stored states. Each matrix is symmetric, L x L, in the order of `layers`."""
    layers: list[int]
    cosine_LL: Tensor
    """Mean over tokens of the cosine of the two states."""
    angular_LL: Tensor
    """Mean over tokens of arccos(cosine) / pi: a distance, 0 to 1."""
    angular_last_LL: Tensor
    """The angular distance at the last token of each sequence, for every treatment."""
    cka_linear_LL: Tensor
    cka_rbf_LL: Tensor
    """CKA from minibatch unbiased HSIC; the RBF bandwidth of each layer is its median distance."""
    cosine_all_LL: Tensor
    """Mean cosine of the two states over all tokens, massive ones included, for every treatment. Published methods use
    this cosine."""
    treatment: str
    """How massive-activation tokens were treated: mask, normalise or raw."""
    tokens: int
    """Tokens that were read."""
    masked: int
    """Massive-activation tokens left out."""


class Selection(NamedTuple):
    """The blocks to replace at one grid point, with the figures by which they were chosen."""
    blocks: list[Block]
    """Non-overlapping, ascending."""
    scores: list[float]
    """Value of the criterion for each block, in the order of `blocks`."""
    criterion: str
    ratio_target: float
    """Share of all parameters to remove."""
    ratio_planned: float
    """Share of all parameters that these blocks remove; the parameters of stand-ins are subtracted."""
    ratio_largest: float
    """Largest share that the eligible layers allow."""
    k_max: int
    """Layers of context of a block: a block removes k_max - 1 layers."""
    candidates: list[dict[str, Any]]
    """Every eligible block with its score, best first."""
    layers: int
    """Number of layers to remove: the layers of the blocks. If the fit chooses the layers itself, the number that it
    must choose."""


class Search(NamedTuple):
    """The order in which layers are removed, by a criterion of the method."""
    order: list[int]
    """Layers; the first is removed first."""
    scores: list[float]
    """What the removal of each layer of `order` adds to the criterion. In a greedy search the layers that precede this
    layer in `order` are already removed. In a ranking only this layer is removed."""
    criterion: str
    """The criterion, such as `divergence`: KL(dense || pruned) in nats per token."""
    k_max: int
    """At most k_max - 1 consecutive layers are removed, if the search reads this number."""
    single: dict[str, float]
    """Layer -> its score when it alone is removed."""
    evaluations: int
    """How often the model, or a part of it, was run."""
    stats: dict[str, Any]
    """Numbers of tokens for fitting and for judging; seconds."""


class KernelMap(NamedTuple):
    """Step 1 of KDP: the lift phi and the operators A_i of one block."""
    block: Block
    omega_DM: Tensor
    """Frequencies, per unit of the lift's input after normalisation."""
    b_M: Tensor
    """Phases in radians."""
    operators_KFF: Tensor
    """A_1 .. A_k, one for each layer of the block; phi(h_{l+i}) ~ A_i phi(h_{l+i-1})."""
    gamma_K: Tensor
    """gamma_i of A_i = I + gamma_i B_i."""
    lift_input: str
    """What the lift reads: `raw` states, or `rms` states, which are scaled to a root mean square of 1."""
    bypass_above: float | None
    """Tokens whose first state has a larger norm bypass the stand-in; None means that all tokens are mapped."""
    curve: list[dict[str, Any]]
    """One row for each epoch: epoch, seconds (of training, without judging), lr, loss, mse, cos, heldout_loss,
    heldout_mse, heldout_cos, phi_variance, phi_norm, operator_norm (a list, one for each operator); if asked for,
    decode_error and decode_error_true_features."""
    stats: dict[str, Any]
    """Final held-out figures, the ridge, tokens, seconds."""


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
    """One row for each epoch: epoch, seconds, loss, heldout_loss, heldout_error (relative squared error of the
    states)."""
    stats: dict[str, Any]


class LinearMap(NamedTuple):
    """An affine stand-in of a block: h_{l+k} ~ weight h_l + bias."""
    block: Block
    weight_DD: Tensor
    """Rows are outputs: y_D = weight_DD @ h_D + bias_D."""
    bias_D: Tensor
    bypass_above: float | None
    """As in KernelMap."""
    stats: dict[str, Any]


class Module(NamedTuple):
    """The stand-in of a block in the folded model."""
    block: Block
    kind: str
    """A key of kdp_core.model.stand_ins.MODULES, such as `rff_mlp` or `linear`."""
    options: dict[str, Any]
    """The arguments of the module's constructor, which determine its shape."""
    tensors: dict[str, Tensor]
    """The module's state dict."""


class Plan(NamedTuple):
    """All data that `fold` needs to turn a dense model into a pruned model."""
    method: str
    drop: list[tuple[int, str]]
    """(layer, part) to remove, ascending; part is `whole`, `attention` or `mlp`."""
    modules: list[Module]
    """Stand-ins in the order of their blocks. Of two neighbouring blocks, each has a stand-in of its own."""
    tensors: dict[str, Tensor]
    """Replacements of remaining tensors of the dense model, by state-dict name."""
    sparse: bool = False
    """Whether the zeros of `tensors` count as removed weights. This is true if the method sets weights to zero. The
    tensors of other methods may hold zeros by chance."""
    shape: dict[str, Any] | None = None
    """Entries of the folded configuration that give the shapes of the model, for plans that change widths. `tensors`
    then have these shapes, and may hold tensors that the dense model lacks. Such a plan has no stand-ins."""


class Composed(NamedTuple):
    """The stand-ins of one grid point, fitted together rather than block by block."""
    plan: Plan
    curve: list[dict[str, Any]]
    """One row for each epoch, if any: epoch, seconds; of joint training kl, heldout_loss, heldout_kl (nats a token), of
    other training loss and heldout_loss in its own unit."""
    fits: list[dict[str, Any]]
    """One row for each stand-in: block, heldout_error (relative squared error of the block's last state on what the
    pruned model feeds it), params."""
    stats: dict[str, Any]
    """Tokens, seconds of the parts; after joint training the kept epoch and its heldout_loss and heldout_kl."""


class PrunedFacts(NamedTuple):
    """The changes that `fold` made, counted on the folded model."""
    method: str
    layers_before: int
    layers_removed: int
    params_before: int
    params_after: int
    params_added: int
    """Parameters of the inserted modules; they are included in params_after."""
    params_removed: float
    """Share of all parameters removed: 1 - (params_after - params_zeroed) / params_before."""
    blocks: list[Block]
    """Runs of removed layers. Each block that has a stand-in is one run. All other consecutive layers form one run."""
    parts: list[tuple[int, str]]
    """(layer, part) of the layers that lack only `attention` or only `mlp`, ascending."""
    params_zeroed: int
    """Weights set to zero. They are stored and count as removed. Only sparse kernels make the model smaller or faster
    through these zeros."""


class Finetuned(NamedTuple):
    """A low-rank change of the output head, trained to reproduce the dense model's outputs (rows with a dagger in the
    paper)."""
    place: str
    """`head`: merged into the head's weight; `adapter`: kept before a head that is tied to the embedding."""
    rank: int
    params_added: int
    """Parameters of the change itself; 0 if it was merged or not kept."""
    epoch: int
    """The epoch whose weights were kept. 0 is the start, where the change is zero. It is kept if no epoch is better."""
    judge: str
    """The held-out figure by which the epoch was chosen: `loss` or `ppl`."""
    curve: list[dict[str, Any]]
    """One row for each epoch, the start first as 0: epoch, seconds, lr, loss (None at the start), heldout_loss,
    heldout_kl_nats, heldout_ce_nats."""
    sequences: int
    """Sequences that were trained on."""
    heldout_sequences: int
    tokens: int
    """Number of predicted tokens in one epoch."""
    options: dict[str, Any]
    seconds: float
    """Seconds of the whole fine-tuning: computing the states of both models, training and judging."""
