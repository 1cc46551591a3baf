"""The ladder of each part: the loss at the outputs of the model if this part has fewer heads or channels.

One part of the dense model at a time is narrowed, and its writer is solved again. The loss is KL(dense || pruned) of
the next-token distributions. The losses do not depend on the ratio, so one search is enough for all ratios. MLPs are
measured with three quarters, half, a quarter and none of their channels, and attentions with every number of heads.
With `rare_rank`, the embedding is a part too (`rare`).
"""
import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from kdp_core.base.options import Chance, Count, Natural, NotNegative, check
from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods._method import no_state_between
from kdp_core.methods._outputs import Compared
from kdp_core.methods.heads_channels.units import PARTS, check_family, columns_of, coupled_of, no_single_heads, sizes_of
from kdp_core.methods.kdp_narrow import parts, rare
from kdp_core.methods.kdp_narrow.fit import Closed, Part, first_ridge, goal, inputs, matrix_of, narrow, products_of
from kdp_core.methods.kdp_narrow.surgeon import kept_units
from kdp_core.model import checkpoints
from kdp_core.model.families import Family, decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.states.block import FitError, check_all_states
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
RUNGS = (0.75, 0.5, 0.25, 0.0)
"""The shares of its channels with which an MLP is measured."""


def refuses(family: Family) -> str:
    """Why the method refuses this family: its parts cannot be solved one after the other, or its heads cannot be
    removed one by one."""
    return no_state_between(family) or no_single_heads(family)


def ladders(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int, device: str = "cpu",
            dtype: str = "float32", solve: bool = True, ridge: NotNegative = 1e-3, fit_sequences: Count = 96,
            judge_sequences: Count = 8, batch_sequences: Count = 8, rare_rank: Chance = 0.0,
            rare_trained: bool = True, seed: Natural = 0) -> Search:
    """The loss of every part with fewer units. The field `single` of the result contains the losses. The key of a loss
    joins the layer, the part and the number of kept units by dots.

    solve: whether writers are solved again; otherwise kept weights stay as they are.
    ridge: ridge of the closed form towards the old matrix, relative to the mean diagonal of the Gram matrix.
    fit_sequences: number of sequences on which writers are solved.
    judge_sequences: number of other sequences, on which outputs are compared. The embedding is judged on at least as
        many.
    batch_sequences: number of sequences in one forward pass.
    rare_rank: rank of the embedding's rows of rare tokens, relative to the width of the model. The budget decides how
        many tokens are rare. 0 leaves the embedding as it is. Only for models whose output head is tied to the
        embedding.
    rare_trained: whether these rows are trained to the outputs of the dense head; otherwise they keep their closed
        form.
    seed: seed of the choice of sequences.
    Raises FitError for a family that is refused, for states that are not stored, for too few sequences, and for an
    embedding that cannot be reduced.
    """
    check(ladders, locals())
    config = checkpoints.config_of(dense)
    check_family("kdp_narrow", config, refuses)
    rank = rare.rank_of(rare_rank, hidden.width)
    if rare_rank:
        rare.check_tied(family_of(config), config, rank)
    began = time.perf_counter()
    check_all_states(hidden)
    if judge_sequences >= hidden.sequences:
        raise FitError(f"search.judge_sequences {judge_sequences} of {hidden.sequences} sequences leave none to fit "
                       "on; lower it or add calibration sequences")
    drawn = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    judged, fitted = drawn[:judge_sequences], drawn[judge_sequences:][:fit_sequences]
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    passes, how, single = Passes(model, hidden.tokens), Closed(ridge, solve, batch_sequences), {}
    every, compared = parts_of(model), Compared(passes, hidden.state(facts.layers, judged), batch_sequences)
    for part in every:
        for count, loss in ladder(passes, hidden, part, fitted, judged, compared, how).items():
            single[f"{part.layer}.{part.name}.{count}"] = loss
    sizes = {part.name: {"units": part.units, "unit_params": part.unit_params} for part in every}
    if rare_rank:
        own_judged, others = drawn.tensor_split([max(judge_sequences, min(rare.JUDGED, len(drawn) // 4))])
        known = rare.statistics(passes, hidden, tokens, others, others, batch_sequences, seed)
        states_ND = rare.head_inputs(passes, hidden, others) if rare_trained else None
        # the logits that were kept for the layers are freed
        compared = Compared(passes, hidden.state(facts.layers, own_judged), batch_sequences)
        for count, loss in rare.ladder(passes, tokens, known, states_ND, rank, own_judged, compared, seed).items():
            single[f"0.{rare.PART}.{count}"] = loss
            logger.info("embedding: divergence %.4f with %d frequent tokens", loss, count)
        sizes[rare.PART] = rare.sizes(facts.vocabulary, hidden.width, rank, rare_trained)
    return Search([], [], "divergence", k_max, single, len(single),
                  {"sizes": sizes, "fit_tokens": len(fitted) * hidden.tokens,
                   "judge_tokens": len(judged) * hidden.tokens, "seconds": time.perf_counter() - began})


def parts_of(model: nn.Module) -> list[Part]:
    """All parts in the order of depth, with their units and the parameters of a unit."""
    layers = decoder_layers(model)
    sizes = sizes_of(layers[0], coupled_of(layers[0], model.config), model.config, len(layers))
    return [Part(number, name, sizes.units[name], sizes.unit_params[name])
            for number in range(len(layers)) for name in PARTS]


@torch.no_grad()
def ladder(passes: Passes, hidden: HiddenStates, part: Part, fitted: Tensor, judged: Tensor, compared: Compared,
           how: Closed) -> dict[int, float]:
    """For each number of kept units: the loss if one part of the dense model keeps this number of units. At the end the
    writer's old weights are restored.

    compared: the dense model's outputs for the sequences `judged`.
    """
    length = inputs(passes, part)
    counts = list(range(part.units)) if length > 1 else [round(part.units * share) for share in RUNGS]
    judged_STD, path = hidden.state(part.layer, judged), range(part.layer, len(passes.layers))
    given = parts.fed(passes, part.layer, part.name, hidden.state(part.layer, fitted), how.batch)
    products = products_of(passes, part, given, goal(passes, hidden, part, given, fitted, how), how)
    old_FD = products.old_FD
    kept = kept_units(products.equations(first_ridge(how)), part.units, counts,
                      parts.gain_after(passes, part.layer, part.name))
    losses, writer = {}, parts.writer_of(passes, part.layer, part.name)
    bias_D = None if writer.bias is None else writer.bias.clone()
    for count, units in kept.items():
        narrow(passes, part, units, matrix_of(products, columns_of(units, length), how))
        losses[count] = compared.divergence(path, judged_STD)
        parts.put(writer, old_FD, torch.arange(len(old_FD)))
        if bias_D is not None:
            writer.bias.copy_(bias_D)
    logger.info("layer %d, %s: divergence %s", part.layer, part.name,
                ", ".join(f"{loss:.4f} with {count}" for count, loss in losses.items()))
    return losses
