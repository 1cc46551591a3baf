"""kdp_narrow: every layer keeps a narrower attention and a narrower MLP, and the writers of both are changed to
compensate.

KDP replaces the layers between two states by a map of the first state. Such a map reads one token, so the context that
the removed attentions read is lost. In kdp_narrow, a layer keeps a part of its own attention, and this part reads the
context. The method works as follows:
1. The search (`ladders`) measures the loss at the outputs if a part of one layer has fewer channels or heads.
2. The selection (`budget`) decides what each part keeps, so that the sum of these losses is least at the given ratio.
3. The fit (`fit.in_order`) chooses channels and heads by the optimal brain surgeon. All earlier parts are already
   pruned at this time. The fit solves each writer (o_proj and down_proj in LLaMA) again in closed form; the target is
   the state of the dense model.
4. The training fits all writers together to the outputs of the dense model, for `epochs` epochs.
If the search has measured the embedding (`search.rare_rank`), the budget also contains the rows of rare tokens. These
rows get low rank before the first layer is fitted, so the writers also correct the errors of the new rows (`rare`).
So only the writers, the last matrices of attentions and MLPs, are changed. All other kept weights are those of the
dense model. With `solve: false` and `epochs: 0` every kept weight is unchanged. With `trained: all` the training
changes every matrix of the narrowed parts.

ZipLM (Kurtic et al. 2023), OSSCAR (Meng et al. 2024) and SlimGPT (Ling et al. 2024) also choose units by the surgeon's
rule and solve the writers again. Four properties of kdp_narrow are new. The target is the state of the dense model, as
in kdp_residual. The cost of a removal is the loss at the outputs of the model. Heads and channels share one budget. The
writers are trained together.
"""
import logging
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.options import Chance, Count, Natural, NotNegative, Positive, Share, check
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.methods import _outputs
from kdp_core.methods.heads_channels.units import PARTS, coupled_of, narrow_tensors, sizes_of, width_of
from kdp_core.methods.kdp_narrow import fit, parts, rare
from kdp_core.methods.kdp_narrow.fit import Closed, Part
from kdp_core.methods.kdp_narrow.ladders import parts_of
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.model.stand_ins import RareEmbedding
from kdp_core.model.surgery import drop_parts, narrow, reduce_rare
from kdp_core.states.block import split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
JUDGED = 64
"""Largest number of held-out sequences that decide the ridges. Their states and those of the fitted sequences are in
memory together."""
Trained = Literal["writers", "all"]
"""Which weights the training changes."""


class _Small(NamedTuple):
    """The model with narrow parts."""
    model: nn.Module
    gone: dict[str, list[int]]
    """For each part: the layers in which the part has no units and is removed."""
    names: list[str]
    """State-dict names of the tensors of all remaining parts, and of the embedding if it is changed."""
    shape: dict[str, Any]
    """The sizes in the form of a plan."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", solve: bool = True, ridge: NotNegative | None = None, sequences: Count = 640,
            epochs: Natural = 2, trained: Trained = "writers", lr: Positive = 3e-4,
            batch_sequences: Count = 4, positions: Count = 48, kl_weight: Chance = 0.5, heldout: Share = 0.05,
            seed: Natural = 0, resume: Resume = OFF) -> Composed:
    """Narrow the attentions and MLPs of all layers to the ratio, and fit their writers.

    `dense` is the checkpoint folder. `hidden` contains all states of the dense model over `tokens`. `selection` says
    how many units each part keeps.
    solve: whether writers are solved again; otherwise kept weights stay as they are until they are trained.
    ridge: ridge of the closed form towards the old matrix, relative to the mean diagonal of the Gram matrix. null
        chooses for each writer the ridge that is best on the held-out sequences.
    sequences: number of sequences on which the writers are solved.
    epochs: number of epochs of training against the dense model's outputs; 0 keeps the closed form.
    trained: `writers`, or `all` for all matrices of the narrowed attentions and MLPs.
    lr: peak learning rate of Adam.
    batch_sequences: number of sequences in an update and in a forward pass.
    positions: number of tokens of each sequence whose outputs are compared in an update. New positions are drawn for
        every update.
    kl_weight: lambda in the loss lambda KL(dense || pruned) + (1 - lambda) cross-entropy of the next token.
    heldout: share of the sequences that are never used for fitting. These sequences decide which epoch is kept, and
        at most 64 of them decide which ridges are kept.
    seed: seed of the held-out choice and of the order of training.
    resume: file in which the state of the training is stored.
    Raises FitError for a Gram matrix that is singular.
    """
    check(compose, locals())
    began = time.perf_counter()
    held, kept = split(hidden.sequences, heldout, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    passes, how = Passes(model, hidden.tokens), Closed(ridge, solve, batch_sequences)
    drawn = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    counts = [one["kept"] for one in selection.candidates if one["part"] in PARTS]
    embedding = _embedding(passes, hidden, tokens, selection, kept, drawn, batch_sequences, seed)
    fitted, judged = drawn[:sequences].sort().values, held[:JUDGED]
    sizes, ids_ST = list(zip(parts_of(model), counts, strict=True)), tokens.ids_ST[torch.cat((fitted, judged))]
    # the states are not bound to a name here, so that they are freed after the first layer
    found = fit.in_order(passes, hidden, sizes, fitted, judged, how,
                         rare.start_states(embedding, ids_ST) if embedding else None)
    after_fit = time.perf_counter()
    small, dense_head = _small(model, dense, found, embedding, device, dtype), passes.head
    # only the head of the dense model is needed from here on
    del model, passes
    curve: list[dict[str, Any]] = []
    if epochs:
        data = _outputs.data_of(hidden, tokens, 0)
        if embedding:
            data = data._replace(head=dense_head,
                                 start=lambda which: rare.start_states(embedding, tokens.ids_ST[which]))
        curve = _trained(small, trained, hidden.tokens, data, kept, held, epochs=epochs, lr=lr,
                         batch_sequences=batch_sequences, positions=positions, kl_weight=kl_weight, seed=seed,
                         resume=resume)
    best = min(curve, key=lambda row: row["heldout_loss"]) if curve else {}
    stats = {"tokens": len(kept) * hidden.tokens, "share": selection.ratio_planned,
             "layers": selection.candidates,
             **{name: best[name] for name in ("epoch", "heldout_loss", "heldout_kl") if best},
             "seconds_closed_form": after_fit - began,
             "seconds": time.perf_counter() - began + resume.earlier_s}
    state = small.model.state_dict()
    plan = Plan("kdp_narrow", _dropped(small.gone), [], {name: state[name].detach().cpu().clone()
                                                         for name in small.names}, shape=small.shape)
    return Composed(plan, curve,
                    [{"block": (part.layer, part.layer + 1), "part": part.name, "heldout_error": error, "params": 0}
                     for part, _, error in found], stats)


def _embedding(passes: Passes, hidden: HiddenStates, tokens: Tokens, selection: Selection, kept: Tensor, drawn: Tensor,
               batch: int, seed: int) -> RareEmbedding | None:
    """The embedding that the selection asks for; None if every token keeps its row."""
    entry = next((one for one in selection.candidates if one["part"] == rare.PART), None)
    if entry is None or entry["kept"] == entry["of"]:
        return None
    known = rare.statistics(passes, hidden, tokens, kept, drawn, batch, seed)
    logger.info("embedding: %d of %d tokens keep their rows", entry["kept"], entry["of"])
    made = rare.reduced(passes.model.get_input_embeddings(), known, entry["kept"], entry["rank"])
    if not entry["trained"]:
        return made
    return rare.trained(made, passes, known, rare.head_inputs(passes, hidden, drawn), seed)


def _small(model: nn.Module, dense: Path, found: list[tuple[Part, Tensor, float]], embedding: RareEmbedding | None,
           device: str, dtype: str) -> _Small:
    """The narrowed model as a separate module."""
    layers, family = decoder_layers(model), family_of(model)
    coupled = coupled_of(layers[0], model.config)
    sizes = sizes_of(layers[0], coupled, model.config, len(layers))
    kept: list[dict[str, Tensor]] = [{} for _ in layers]
    for part, units, _ in found:
        kept[part.layer][part.name] = units
    state, widths = dict(model.state_dict()), []
    gone = {part: [number for number, own in enumerate(kept) if not len(own[part])] for part in PARTS}
    for number, own in enumerate(kept):
        # a part without units has the width of one unit until the part is removed
        wide = {part: units if len(units) else torch.zeros(1, dtype=torch.int64) for part, units in own.items()}
        state |= narrow_tensors(model, number, coupled, wide, sizes)
        widths.append(width_of(model.config, sizes, *(sizes.units[name] - len(wide[name]) for name in PARTS)))
    small = checkpoints.load_model(dense, device=device, dtype=dtype)
    narrow(small, widths)
    small.load_state_dict(state)
    drop_parts(small, gone)
    names = [f"{family.prefix}{number}.{one.name}" for number in range(len(layers)) for one in coupled
             if number not in gone[one.part]]
    shape: dict[str, Any] = {"widths": widths}
    if embedding:
        shape |= {"rare_tokens": {"frequent": len(embedding.frequent), "rank": len(embedding.basis)},
                  "tie_word_embeddings": False}
        reduce_rare(small, **shape["rare_tokens"])
        small.get_input_embeddings().load_state_dict(embedding.state_dict())
        names += [rare.prefix_of(small) + name for name in embedding.state_dict()]
    return _Small(small.requires_grad_(False).eval(), gone, names, shape)


def _trained(small: _Small, trained: Trained, length: int, data: _outputs.Data, kept: Tensor, held: Tensor,
             **options: Any) -> list[dict[str, Any]]:
    """Train the writers, or all matrices of the narrowed parts, in place."""
    passes = Passes(small.model, length)
    if trained == "writers":
        weights = [parts.writer_of(passes, layer, part).weight
                   for layer in range(len(passes.layers)) for part in PARTS if layer not in small.gone[part]]
    else:
        weights = [small.model.get_parameter(name) for name in small.names
                   if name.startswith(family_of(small.model).prefix)]
    for weight in weights:
        weight.requires_grad_(True)
    curve = _outputs.train(passes, list(range(len(passes.layers))), data, weights, kept, held, **options)
    small.model.requires_grad_(False)
    return curve


def _dropped(gone: dict[str, list[int]]) -> list[tuple[int, str]]:
    """The parts that the plan removes. If both parts of a layer are removed, the entry is the whole layer."""
    attention, mlp = (set(gone[part]) for part in PARTS)
    return sorted((layer, "whole" if layer in attention & mlp else PARTS[0] if layer in attention else PARTS[1])
                  for layer in attention | mlp)
