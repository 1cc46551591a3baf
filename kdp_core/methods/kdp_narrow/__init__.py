"""kdp_narrow: every layer gets a narrower MLP and attention, whose writers are solved again and then trained."""
from kdp_core.methods._method import Method
from kdp_core.methods.kdp_narrow.budget import by_budget
from kdp_core.methods.kdp_narrow.compose import compose
from kdp_core.methods.kdp_narrow.ladders import ladders, refuses

METHODS = (
    Method("kdp_narrow", "this project: heads and channels removed by the optimal brain surgeon under one budget, the "
                         "last matrices of attentions and MLPs solved again and trained; docs/kdp.md",
           "heads and channels removed", by_budget, search=ladders, compose=compose, refuses=refuses, own=True,
           example={"search": {"fit_sequences": 8, "judge_sequences": 2},
                    "compose": {"sequences": 12, "epochs": 1, "positions": 8, "heldout": 0.2}}),
)
