"""Linear maps in the original space instead of a block: the OLS methods of KDP's Table 3.

`direct` regresses h_{l+k} on h_l. `sequential` regresses the output of each layer on the input of the layer, and
multiplies the maps of all k layers. The paper reports that `direct` and `sequential` collapse, and gives no details of
these methods. Two choices decide whether the methods collapse. The first choice is the treatment of massive tokens,
which dominate an unweighted regression (options `massive` and `token_weight`). The second choice is the target of the
ridge: a ridge may shrink the map towards zero instead of towards the identity (option `residual`). With ridge 0,
token_weight none and massive raw, each regression is an ordinary least-squares fit.
"""
import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch

from kdp_core.base.options import Natural, NotNegative, Share, check
from kdp_core.base.records import Block, LinearMap, ModelFacts, Module
from kdp_core.methods._affine import Map, regress, stand_in
from kdp_core.methods._method import Method, Sizes
from kdp_core.methods._select import most_similar
from kdp_core.states.block import BlockStates, Massive, TokenWeight, load, relative_error
from kdp_core.states.hidden import HiddenStates


def direct(hidden: HiddenStates, block: Block, *, ridge: NotNegative = 1e-4, residual: bool = True,
           token_weight: TokenWeight = "inverse_norm", massive: Massive = "bypass", heldout: Share = 0.1,
           seed: Natural = 0) -> LinearMap:
    """Fit one affine map from the first state of the block to the last state.

    ridge: strength of the ridge, relative to the mean diagonal of the weighted Gram matrix.
    residual: whether to regress the difference of the states, so that the ridge shrinks the map to the identity.
    token_weight: `inverse_norm` weights a token by 1 / |h_{l+k}|^2, so that its relative error counts; `none` gives all
        tokens the same weight.
    massive: `bypass` excludes massive-activation tokens from the fit, and they bypass the map; `raw` treats all tokens
        in the same way.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice.
    """
    check(direct, locals())
    began = time.perf_counter()
    states = load(hidden, block, massive=massive, heldout=heldout, seed=seed, between=False)
    h_KND = states.tokens(states.train)
    return _record(block, regress(h_KND[0], h_KND[-1], ridge, residual, token_weight), states, began)


def sequential(hidden: HiddenStates, block: Block, *, ridge: NotNegative = 1e-4, residual: bool = True,
               token_weight: TokenWeight = "inverse_norm", massive: Massive = "bypass", heldout: Share = 0.1,
               seed: Natural = 0) -> LinearMap:
    """Fit one affine map for each layer, and multiply these maps to one map.

    ridge: strength of the ridge, relative to the mean diagonal of the weighted Gram matrix.
    residual: whether to regress the difference of the states, so that the ridge shrinks the map to the identity.
    token_weight: `inverse_norm` weights a token by 1 / |its target|^2, so that its relative error counts; `none` gives
        all tokens the same weight.
    massive: `bypass` excludes massive-activation tokens from the fit, and they bypass the map; `raw` treats all tokens
        in the same way.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice.
    """
    check(sequential, locals())
    began = time.perf_counter()
    states = load(hidden, block, massive=massive, heldout=heldout, seed=seed)
    h_KND = states.tokens(states.train)
    D = h_KND.shape[-1]
    total = Map(torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64))
    for x_ND, y_ND in itertools.pairwise(h_KND):
        layer = regress(x_ND, y_ND, ridge, residual, token_weight)
        # h_{l+i} = W_i h_{l+i-1} + b_i
        total = Map(layer.w_DD @ total.w_DD, layer.w_DD @ total.b_D + layer.b_D)
    return _record(block, total, states, began)


def _record(block: Block, fitted: Map, states: BlockStates, began: float) -> LinearMap:
    h_KND = states.tokens(states.heldout).double()
    stats = {"heldout_error": relative_error(h_KND[0] @ fitted.w_DD.T + fitted.b_D, h_KND[-1]),
             "heldout_error_identity": relative_error(h_KND[0], h_KND[-1]),
             "tokens": int(states.keep_ST[states.train].sum()), "seconds": time.perf_counter() - began}
    return LinearMap(block, fitted.w_DD.float(), fitted.b_D.float(), states.bypass_above, stats)


def to_module(linear: LinearMap) -> Module:
    """The stand-in that computes an affine map."""
    return stand_in(linear.block, Map(linear.weight_DD, linear.bias_D), linear.bypass_above)


def module_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Parameters of the stand-in."""
    return facts.width * (facts.width + 1)


def _flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    return sizes.tokens * 4 * sizes.width ** 2 + 7 * sizes.width ** 3 / 3


def _flops_sequential(sizes: Sizes, given: Mapping[str, Any]) -> float:
    return sizes.block_layers * _flops(sizes, given)


METHODS = (
    Method("linear", "KDP (ICLR 2026), `Direct OLS` of Table 3", "layers replaced", most_similar, {"fit": direct},
           to_module, module_params, flops={"fit": _flops}, example={"fit": {"heldout": 0.2}}),
    Method("linear_sequential", "KDP (ICLR 2026), `Sequential OLS` of Table 3", "layers replaced", most_similar,
           {"fit": sequential}, to_module, module_params, flops={"fit": _flops_sequential},
           example={"fit": {"heldout": 0.2}}),
)
