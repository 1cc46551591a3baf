"""KDP, and the baselines of its paper: removal alone, and linear maps in the original space.

KDP has two steps: the kernel space (`kernel`, step 1) and the network from the kernel space back to states (`inverse`,
step 2).
"""
import math
from collections.abc import Mapping
from typing import Any

from kdp_core.methods._method import Method, Sizes
from kdp_core.methods._select import most_similar
from kdp_core.methods.kdp import inverse, kernel, linear, remove


def _kernel_flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    N, D, F, K = sizes.tokens, sizes.width, given["features"], sizes.block_layers
    batches = math.ceil(sizes.sequences / given["batch_sequences"])
    # per state 2 * D F for the lift and the gradient of Omega; per step 4 * 2 F^2 for Gram, cross, prediction, gradient
    return given["epochs"] * (N * ((K + 1) * 2 * D * F + K * 8 * F ** 2) + batches * K * 7 * F ** 3 / 3)


def _inverse_flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    # `given` also contains the options of step 1
    return given["epochs"] * sizes.tokens * 6 * given["width"] * (given["features"] + sizes.width)


METHODS = (
    *remove.METHODS,
    *linear.METHODS,
    Method("kdp", "KDP (ICLR 2026), Algorithm 1, equations 2, 5, 6", "layers replaced", most_similar,
           {"kernel": kernel.fit, "inverse": inverse.fit}, inverse.to_module, inverse.module_params,
           ("kernel.features", "inverse.width"), flops={"kernel": _kernel_flops, "inverse": _inverse_flops},
           example={"kernel": {"features": 32, "rank": 2, "epochs": 2, "heldout": 0.2},
                    "inverse": {"width": 16, "epochs": 2, "heldout": 0.2}}),
)
