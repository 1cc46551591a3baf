"""Methods that remove layers by a search for the best set under one of several objectives, or by an estimate of each
layer's effect."""
from kdp_core.methods._method import Method, no_state_between
from kdp_core.methods._select import in_order, no_layer
from kdp_core.methods.searching import fragility, sets

METHODS = (
    Method("layer_search", "after arXiv 2604.24938, whose objectives and searches are not known by name: the set of "
                           "layers that a search finds best by a calibration objective", "layers removed",
           sets.as_many_replaced, module_params=sets.module_params, size_options=("compose.stand_in",),
           compose=sets.compose, flops={"compose": sets.flops},
           example={"compose": {"sequences": 4, "budget": 70}}),
    Method("fragility", "ICML 2026, Representation Hierarchies, Theorem 3: layers by Var_p(Dz) / (2 T^2)",
           "layers removed", in_order, search=fragility.rank, example={"search": {"sequences": 4}}),
    Method("fragility_parts", "ICML 2026, Representation Hierarchies, Theorem 3: attentions and MLPs by "
                              "Var_p(Dz) / (2 T^2)", "parts removed", no_layer, compose=fragility.compose,
           refuses=no_state_between, example={"compose": {"sequences": 4}}),
)
