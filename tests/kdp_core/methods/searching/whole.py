"""Whole models without some layers, as transformers itself runs them."""
import copy

import torch
from torch import nn

from kdp_core.base.records import Selection
from kdp_core.methods._search.evaluator import Evaluator
from kdp_core.methods._search.objectives import items_of_text, objective_of
from kdp_core.methods._search.strategies import Space
from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import Passes
from tests.kdp_core import stored

LAYERS = 6
TOKENS = stored.tokens()
IDS_ST = TOKENS.ids_ST[:5]


class Identity(nn.Module):
    """A layer that is switched off."""

    def __init__(self, layer):
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, h, *args, **kwargs):
        return h


def without(model, removed):
    """A copy of a model in which the identity takes the place of some layers."""
    pruned = copy.deepcopy(model)
    for layer in removed:
        decoder_layers(pruned)[layer] = Identity(decoder_layers(pruned)[layer])
    return pruned


@torch.no_grad()
def logits(model, removed, ids_ST):
    return without(model, removed)(ids_ST).logits


def evaluator(model, goal="kl", size=2, budget=10_000, ids_ST=IDS_ST, positions=None, **more):
    items = items_of_text(ids_ST, 3) if goal in ("margin", "accuracy") else None
    made = objective_of(goal, ids_ST, items, positions)
    return Evaluator(Passes(model, ids_ST.shape[1]), made, size=size, budget=budget, batch_sequences=2, **more)


def space(size=2, seed=0, layers=LAYERS):
    return Space(list(range(1, layers - 1)), size, seed, width=2, offspring=4)


def as_many(count):
    """The selection of a ratio that needs so many layers."""
    return Selection([], [], "fit", 0.2, 0.2, 0.9, 3, [], count)
