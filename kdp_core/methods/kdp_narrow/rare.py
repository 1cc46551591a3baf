"""The rows of rare tokens in a tied embedding get low rank: in closed form, and then trained to the outputs.

The ladder of the embedding measures the loss at the outputs if only F tokens keep their rows. The other rows become

    e_v ~ mean + P (e_v - mean),    P = argmin over projections of rank r of sum_v f_v^(1/2) |e_v - e^_v|^2_M.

f_v is the expected frequency of token v: the number of its occurrences in the calibration text plus the sum of the
dense model's probabilities of v at the positions of this text. Without the probabilities, all tokens that do not occur
in the text would be equally rare. The metric M contains the two uses of a row. The head multiplies a row by a state h,
so its error is weighted by E[h h']. The first layer reads the row, so its error is weighted by the Fisher information
E[g g'], where g is the gradient of -log p(y) with respect to the row and y is drawn from the dense model.

A row that is right on average can still be wrong for the head: an error of the logits raises the sum of exp(logits) of
thousands of rare tokens, so these tokens get too much probability. Therefore P and the mean are trained afterwards, so
that the new head has the outputs of the dense head on the dense model's states. The coordinates of the tokens in P stay
as they are, because most rare tokens have hardly any probability in the calibration text. So few numbers are trained
that 12,000 tokens and one epoch are enough (`trained`).

GroupReduce (Chen et al., NeurIPS 2018) weights rows by their frequency too, but has no metric. On SmolLM2-135M with
8,192 frequent tokens and rank 128 the divergence is 1.30 to 1.60 nats; with E[h h'] as the metric of both uses it is
0.60 to 0.76 nats (docs/decisions.md).
Axes: S sequences, T tokens, N tokens of all sequences, D width, V vocabulary, U rare tokens, r rank, C = r + 1.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Tokens
from kdp_core.methods._outputs import Compared
from kdp_core.methods._train import cosine, descend
from kdp_core.model.distil import Head, token_losses
from kdp_core.model.families import Family, family_of
from kdp_core.model.passes import Passes
from kdp_core.model.stand_ins import RareEmbedding, RareHead
from kdp_core.model.surgery import scale_of
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

PART = "embedding"
"""Name of the embedding in a search and in a selection, beside the parts of the layers."""
RUNGS = (0.75, 0.5, 0.25, 0.125, 0.0625)
"""The shares of frequent tokens with which the embedding is measured."""
READ_WEIGHT = 0.25
"""Weight of the Fisher information in the metric, relative to the second moment of the head's inputs. Both have mean
diagonal 1. In one trial the weights 0.25, 1 and 4 gave divergences of 0.31, 0.33 and 0.36 nats on news."""
JUDGED = 64
"""Number of sequences on which the losses of the ladder are measured, if they are at most a quarter of all sequences.
Rare tokens are rare in every sequence: on two draws of eight sequences, the losses with half of the rows were 0.054 and
0.095 nats."""
FISHER_SEQUENCES = 96
"""Largest number of sequences from which the metric is computed."""
EVERY = 4
"""Every fourth position is compared and counted, because neighbouring positions are alike."""
HEAD_SEQUENCES = 384
"""Largest number of sequences on whose outputs basis and mean are trained."""
HEAD_TOKENS = 128
"""Number of tokens in an update of basis and mean."""
RATES = (0.01, 0.03)
"""Peak learning rates of basis and mean, relative to the root mean square of their entries."""
READ_PRICE = 20.0
"""Factor of the divergence that reading the new rows causes. The Fisher information is the divergence of small errors,
and it is measured on calibration text; both make it too small for other text."""
RIDGE = 1e-4
"""Ridge of the metric, relative to its mean diagonal."""


class Statistics(NamedTuple):
    """What the rows are chosen and fitted with."""
    frequency_V: Tensor
    """Expected number of occurrences of each token, float64."""
    metric_DD: Tensor
    """float64, mean diagonal 1 + READ_WEIGHT."""
    fisher_DD: Tensor
    """Fisher information of the rows that the first layer reads, float64. If every occurrence reads a row with an error
    d of its own, the outputs change by the mean of d' fisher d / 2, in nats per token, for small d."""


def check_tied(family: Family, config: object, rank: int) -> None:
    """Raise FitError if the embedding of a model cannot be reduced, or if no row would get smaller."""
    reason = ""
    if not family.entry(config, "tie_word_embeddings"):
        reason = "the output head is not tied to the embedding"
    elif len(family.embeddings) > 1:
        reason = "the first state is the sum of several embeddings"
    elif not 0 < rank < config.hidden_size:
        reason = f"the rank would be {rank}, and rows have {config.hidden_size} numbers"
    if reason:
        raise FitError(f"search.rare_rank is set, but the rows of rare tokens of this {family.name} model cannot be "
                       f"reduced: {reason}; set search.rare_rank to 0")


def rank_of(share: float, width: int) -> int:
    """The rank that is the share `share` of the width."""
    return round(share * width)


def sizes(vocabulary: int, width: int, rank: int, trained: bool) -> dict[str, int | bool]:
    """The entry of the embedding in the sizes of a search. `fixed` parameters are added, whatever the number of rare
    tokens is."""
    return {"units": vocabulary, "unit_params": width - rank, "fixed": (rank + 1) * width, "rank": rank,
            "trained": trained}


def statistics(passes: Passes, hidden: HiddenStates, tokens: Tokens, counted: Tensor, fitted: Tensor, batch: int,
               seed: int) -> Statistics:
    """Frequencies and metric. Occurrences are counted in the sequences `counted`; probabilities and metric are computed
    from the first FISHER_SEQUENCES of the sequences `fitted`."""
    generator = torch.Generator().manual_seed(seed)
    V, D, fitted = passes.head.linear.out_features, hidden.width, fitted[:FISHER_SEQUENCES]
    start_STD, path = hidden.state(0, fitted), list(range(len(passes.layers)))
    chances_V, read_DD, write_DD = (torch.zeros(*shape, dtype=torch.float64) for shape in ((V,), (D, D), (D, D)))
    positions = 0
    for h_BTD in start_STD.split(batch):
        h_BTD = h_BTD.to(passes.device, passes.model.dtype).requires_grad_(True)
        states_ND = passes.to_head(passes.run(h_BTD, path)[:, ::EVERY]).flatten(0, 1)
        # the layers run backwards once, whatever the number of chunks of logits is
        used_ND = states_ND.detach().requires_grad_(True)
        for part_ND in used_ND.split(passes.head.chunk()):
            logp_NV = passes.head(part_ND).log_softmax(dim=-1)
            p_NV = logp_NV.detach().exp().cpu()
            y_N1 = torch.multinomial(p_NV, 1, generator=generator).to(logp_NV.device)
            # g = gradient of -log p(y), y ~ p
            (-logp_NV.gather(1, y_N1).sum()).backward()
            chances_V += p_NV.sum(dim=0).double()
        states_ND.backward(used_ND.grad)
        g_ND, head_ND = (one.double().cpu() for one in (h_BTD.grad.flatten(0, 1), used_ND.detach()))
        read_DD += g_ND.T @ g_ND
        write_DD += head_ND.T @ head_ND
        positions += len(states_ND)
    ids_N = tokens.ids_ST[counted].flatten()
    frequency_V = torch.bincount(ids_N, minlength=V).double() + chances_V * (len(ids_N) / positions)
    # the first layer reads scale * e, so the gradient of a row is scale * g
    fisher_DD = scale_of(passes.model.get_input_embeddings()) ** 2 * read_DD / positions
    # M = E[h h'] + weight E[g g'], each with mean diagonal 1
    return Statistics(frequency_V, _scaled(write_DD) + READ_WEIGHT * _scaled(read_DD), fisher_DD)


def _scaled(moment_DD: Tensor) -> Tensor:
    """A second moment with mean diagonal 1."""
    return moment_DD * (len(moment_DD) / moment_DD.trace().clamp_min(1e-300))


@torch.no_grad()
def reduced(embedding: nn.Embedding, known: Statistics, frequent: int, rank: int) -> RareEmbedding:
    """The embedding in which only the `frequent` most frequent tokens keep their rows; float32, on the CPU."""
    rows_VD = embedding.weight.detach().double().cpu()
    V, D = rows_VD.shape
    order_V = known.frequency_V.argsort(descending=True, stable=True)
    rare_U = order_V[frequent:]
    weight_U = known.frequency_V[rare_U].clamp_min(1e-12).sqrt()
    mean_D = weight_U @ rows_VD[rare_U] / weight_U.sum()
    x_UD = rows_VD[rare_U] - mean_D
    # M = L L';  S = L' X' diag(w) X L
    l_DD = torch.linalg.cholesky(known.metric_DD + RIDGE * torch.eye(D, dtype=torch.float64))
    _, vectors_DD = torch.linalg.eigh(l_DD.T @ (x_UD.T * weight_U) @ x_UD @ l_DD)
    q_Dr = vectors_DD[:, -rank:]
    # X ~ (X L Q) (Q' L^-1)
    rare_Ur, basis_rD = x_UD @ (l_DD @ q_Dr), torch.linalg.solve_triangular(l_DD, q_Dr.T, upper=False, left=False)
    size_r = rare_Ur.square().mean(dim=0).sqrt().clamp_min(1e-12)
    made = RareEmbedding(V, D, frequent, rank, scale_of(embedding))
    made.frequent.copy_(rows_VD[order_V[:frequent]])
    made.rare.copy_(rare_Ur / size_r)
    made.basis.copy_(size_r[:, None] * basis_rD)
    made.mean.copy_(mean_D)
    made.place[order_V] = torch.arange(V, dtype=torch.int32)
    return made.requires_grad_(False)


def head_inputs(passes: Passes, hidden: HiddenStates, which: Tensor) -> Tensor:
    """States that enter the dense model's head, (N, D), for the first HEAD_SEQUENCES of the sequences `which`."""
    final_STD = hidden.state(hidden.layers[-1], which[:HEAD_SEQUENCES])[:, ::EVERY]
    with torch.no_grad():
        return passes.to_head(final_STD.flatten(0, 1).to(passes.device, passes.model.dtype))


def trained(made: RareEmbedding, passes: Passes, known: Statistics, states_ND: Tensor, seed: int) -> RareEmbedding:
    """Train basis and mean in place, so that the head imitates the dense model's head on the states `states_ND`.

    The loss is KL(dense || changed) plus READ_PRICE times the expected divergence that reading the new rows causes:
        sum_v f_v / f (e_v - e^_v)' fisher (e_v - e^_v) / 2,    f = sum_v f_v, over the rare tokens v,
    where e^_v = (rare_v, 1) B and B = (basis, mean).
    """
    gram_CC, cross_CD = (one.float().to(passes.device) for one in _moments(made, known, passes.model))
    fisher_DD, made = known.fisher_DD.float().to(passes.device), made.to(passes.device)
    weights = [made.basis.requires_grad_(True), made.mean.requires_grad_(True)]
    adam = torch.optim.Adam([{"params": [weight], "lr": rate * weight.detach().square().mean().sqrt().item()}
                             for weight, rate in zip(weights, RATES, strict=True)], betas=(0.9, 0.99))
    order = torch.randperm(len(states_ND), generator=torch.Generator().manual_seed(seed)).split(HEAD_TOKENS)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda update: cosine(update, len(order)))
    head = Head(RareHead(made), passes.head.soft_cap)
    for which in order:
        # e^_v = c_v B, so the sum over v is a quadratic function of B, up to a constant
        b_CD = torch.cat((made.basis, made.mean[None]))
        read = ((gram_CC @ b_CD - 2 * cross_CD) * (b_CD @ fisher_DD)).sum() / 2
        # cross-entropy is not used, so next tokens are not read
        losses = token_losses(states_ND[which], states_ND[which], torch.zeros(len(which), dtype=torch.int64), head,
                              passes.head, kl_weight=1.0)
        descend(losses.loss + READ_PRICE * read, adam, training="rows of rare tokens",
                remedy="set search.rare_rank to 0")
        schedule.step()
    return made.requires_grad_(False).cpu()


def _moments(made: RareEmbedding, known: Statistics, model: nn.Module) -> tuple[Tensor, Tensor]:
    """sum_v f_v / f c_v c_v' and sum_v f_v / f c_v e_v' over the rare tokens, with c_v = (rare_v, 1); float64."""
    rare_U = made.place.argsort()[len(made.frequent):]
    rows_UD = model.get_input_embeddings().weight.detach().cpu()[rare_U].double()
    code_UC = torch.cat((made.rare.double(), torch.ones(len(rare_U), 1)), dim=1)
    weighted_CU = (code_UC * (known.frequency_V[rare_U] / known.frequency_V.sum())[:, None]).T
    return weighted_CU @ code_UC, weighted_CU @ rows_UD


@torch.no_grad()
def start_states(embedding: RareEmbedding, ids_ST: Tensor) -> Tensor:
    """States before the first layer, (S, T, D)."""
    return torch.cat([embedding(ids_BT) for ids_BT in ids_ST.split(64)])


def ladder(passes: Passes, tokens: Tokens, known: Statistics, states_ND: Tensor | None, rank: int, judged: Tensor,
           compared: Compared, seed: int) -> dict[int, float]:
    """For each number of frequent tokens: the loss if only the embedding and the head of the dense model are changed.

    states_ND: the result of `head_inputs`; None if the rows are not trained.
    compared: the dense model's outputs for the sequences `judged`.
    """
    embedding, losses = passes.model.get_input_embeddings(), {}
    for count in sorted({round(embedding.num_embeddings * share) for share in RUNGS} - {0}, reverse=True):
        made = reduced(embedding, known, count, rank)
        if states_ND is not None:
            made = trained(made, passes, known, states_ND, seed)
        head = Head(RareHead(made.to(passes.device, passes.model.dtype)), passes.head.soft_cap)
        start_STD = start_states(made, tokens.ids_ST[judged].to(passes.device))
        losses[count] = compared.divergence(range(len(passes.layers)), start_STD, head)
    return losses


def prefix_of(model: nn.Module) -> str:
    """Prefix of the names of the embedding's tensors in a state dict."""
    family = family_of(model)
    return f"{family.trunk}.{family.embeddings[0]}."
