"""The records that stages write and read. Each record is a NamedTuple. The text below a field states meaning and unit.

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
    """The facts about a dense model that later stages need, so that these stages do not load the model."""
    family: str
    """transformers model type, such as `llama`."""
    layers: int
    width: int
    """Hidden width D."""
    vocabulary: int
    """Rows of the embedding."""
    params_total: int
    """Number of all parameters; tied parameters are counted once."""
    params_per_layer: list[int]
    macs_per_token: int
    """Multiply-adds of all linear maps for one token, including the output head. The embedding and the attention scores
    are not counted."""
    source: str
    sha256: str
    """SHA-256 of the source file; for a folder, the hash of the sorted list of its files' hashes."""
    licence: str = ""
    """The licence that the files of the base model name, such as `apache-2.0`; empty if the files name no licence."""


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
    """The angular distance at the last token of each sequence. `treatment` does not change this distance."""
    cka_linear_LL: Tensor
    cka_rbf_LL: Tensor
    """CKA from minibatch unbiased HSIC; the RBF bandwidth of each layer is its median distance."""
    cosine_all_LL: Tensor
    """Mean cosine of the two states over all tokens, massive tokens included. `treatment` does not change this cosine.
    Published methods use it."""
    treatment: str
    """How massive-activation tokens were treated: mask, normalise or raw."""
    tokens: int
    """Number of tokens that were read."""
    masked: int
    """Number of massive tokens that were excluded."""


class Selection(NamedTuple):
    """The blocks to remove at one grid point, with the scores by which the blocks were selected."""
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
    """Largest share of all parameters that can be removed, if protected layers are kept."""
    k_max: int
    """Number of layers of a context. The block of a context has k_max - 1 layers, because the first layer of the
    context is kept."""
    candidates: list[dict[str, Any]]
    """Every eligible block with its score, best first."""
    layers: int
    """Number of layers to remove. If the selection has blocks, `layers` is the number of layers in all blocks. If the
    selection has no blocks, the fit itself must choose `layers` layers."""


class Search(NamedTuple):
    """The order in which layers are removed, by a criterion of the method."""
    order: list[int]
    """Layers in the order of their removal."""
    scores: list[float]
    """For each layer of `order`, how much its removal adds to the criterion. In a greedy search, all layers that come
    before this layer in `order` are already removed. In a ranking, no other layer is removed."""
    criterion: str
    """The criterion, such as `divergence`: KL(dense || pruned) in nats per token."""
    k_max: int
    """At most k_max - 1 consecutive layers are removed. Some searches ignore k_max."""
    single: dict[str, float]
    """For each layer, the score if only this layer is removed."""
    evaluations: int
    """How often the model, or a part of it, was run."""
    stats: dict[str, Any]
    """Number of tokens for fitting, number of tokens for judging, seconds."""


class KernelMap(NamedTuple):
    """Step 1 of KDP: the lift phi and the operators A_i of one block."""
    block: Block
    omega_DM: Tensor
    """Frequencies omega of the random features; they are multiplied by the normalised input of the lift."""
    b_M: Tensor
    """Phases in radians."""
    operators_KFF: Tensor
    """A_1 .. A_k, one for each layer of the block; phi(h_{l+i}) ~ A_i phi(h_{l+i-1})."""
    gamma_K: Tensor
    """gamma_i of A_i = I + gamma_i B_i."""
    lift_input: str
    """The input of the lift: `raw` for the states themselves, `rms` for states scaled to a root mean square of 1."""
    bypass_above: float | None
    """A token bypasses the stand-in if the norm of its state before the block is above this value. None: no token
    bypasses the stand-in."""
    curve: list[dict[str, Any]]
    """One row for each epoch: epoch, seconds (training without judging), lr, loss, mse, cos, heldout_loss, heldout_mse,
    heldout_cos, phi_variance, phi_norm, operator_norm (a list with one entry for each operator). With the option
    `decode_every`, the rows of some epochs also contain decode_error and decode_error_true_features."""
    stats: dict[str, Any]
    """The measures on held-out tokens after the fit, the ridge, the number of tokens, seconds."""


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
    """Stand-ins in the order of their blocks. Each block has its own stand-in, even if two blocks are adjacent."""
    tensors: dict[str, Tensor]
    """New values of tensors that remain in the model, by their names in the state dict."""
    sparse: bool = False
    """Whether the zeros of `tensors` count as removed weights: true if the method sets weights to zero. The tensors of
    other methods may contain zeros by chance."""
    shape: dict[str, Any] | None = None
    """Entries of the folded configuration that give the shapes of the model, for plans that change widths. The entries
    of `tensors` then have these shapes. `tensors` may also contain tensors that the dense model does not have. A plan
    with `shape` has no stand-ins."""


class Composed(NamedTuple):
    """All stand-ins of one grid point, fitted together and not block by block."""
    plan: Plan
    curve: list[dict[str, Any]]
    """One row for each epoch, if the fit trains: epoch, seconds, and the losses. Joint training records kl,
    heldout_loss and heldout_kl in nats a token. All trainings except joint training record loss and heldout_loss in the
    unit of their own loss."""
    fits: list[dict[str, Any]]
    """One row for each stand-in: block, heldout_error, params. `heldout_error` is the relative squared error of the
    state after the block, if the stand-in reads the states of the pruned model."""
    stats: dict[str, Any]
    """Number of tokens, and seconds of each part of the fit. After joint training, `stats` also contains the epoch
    whose weights were kept, and the heldout_loss and heldout_kl of this epoch."""


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
    """Runs of removed layers. A block with a stand-in is one run. Adjacent removed layers without stand-in form one run
    together."""
    parts: list[tuple[int, str]]
    """(layer, part) for each layer from which only the part `attention` or only the part `mlp` was removed;
    ascending."""
    params_zeroed: int
    """Number of weights that were set to zero. A weight that was set to zero is still stored, but counts as removed.
    The zeros make the model smaller or faster only with sparse kernels."""


class Finetuned(NamedTuple):
    """Low-rank changes of a pruned model, trained to reproduce the dense model's outputs (rows with a dagger in the
    paper)."""
    place: str
    """`head`: the change is merged into the weight of the head. `adapter`: the head is tied to the embedding, and the
    change is a separate module before the head. `linear`: the changes are merged into all linear layers."""
    rank: int
    params_added: int
    """Number of parameters that the change adds to the model; 0 if the change was merged or discarded."""
    epoch: int
    """The epoch whose weights were kept. Epoch 0 is the start of the training, where the change is zero. If no epoch is
    better than the start, epoch 0 is kept."""
    judge: str
    """The held-out figure by which the epoch was chosen: `loss` or `ppl`."""
    curve: list[dict[str, Any]]
    """One row for each epoch; the first row, epoch 0, is the start. Fields: epoch, seconds, lr, loss (None at the
    start), heldout_loss, heldout_kl_nats, heldout_ce_nats."""
    sequences: int
    """Number of sequences on which the change was trained."""
    heldout_sequences: int
    tokens: int
    """Number of predicted tokens in one epoch."""
    options: dict[str, Any]
    seconds: float
    """Seconds of the whole fine-tuning: computing the states of both models, training and judging."""
