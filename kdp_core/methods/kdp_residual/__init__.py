"""kdp_residual: stand-ins with a skip path and a dictionary of the model's own neurons."""
from kdp_core.methods._method import Method
from kdp_core.methods._select import in_order, most_similar
from kdp_core.methods.kdp_residual import search
from kdp_core.methods.kdp_residual.compose import compose, compose_linear, linear_params, module_params

METHODS = (
    Method("linear_prefix", "this project: `Direct OLS`, each block fitted on what the pruned model before it feeds it",
           "layers replaced", most_similar, module_params=linear_params, compose=compose_linear, own=True,
           example={"compose": {"heldout": 0.2}}),
    Method("kdp_residual", "this project: skip path, linear part and a dictionary of the model's own neurons; "
                           "docs/kdp.md", "layers replaced", in_order, module_params=module_params,
           size_options=("compose.dictionary", "compose.entries"), search=search.by_divergence,
           similar={"order": "cka"}, orders=search.most_ordered, compose=compose, own=True,
           quick={"search": {"order": "cka"}, "compose": {"dictionary": "none"}},
           example={"search": {"entries": 8, "judge_sequences": 4},
                    "compose": {"entries": 8, "epochs": 1, "lr": 1e-2, "heldout": 0.2}}),
)
