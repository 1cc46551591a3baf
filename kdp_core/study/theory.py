"""Measures both sides of Theorems 1 and 2 of KDP on the states of a run: consecutive layers on which a kernel was
fitted.

Paper: KDP (ICLR 2026), section 2.3. The docstrings of `theorem_1` and `theorem_2` define the measured quantities. These
docstrings also list where a theorem's statement disagrees with the theorem's proof.
"""
import time
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, MultipleOf
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.measurements import Theory
from kdp_core.base.options import Count, NotNegative, Positive, Share
from kdp_core.base.records import KernelMap
from kdp_core.states.block import BlockStates, load
from kdp_core.states.hidden import HiddenStates
from kdp_core.study import theorem_1, theorem_2
from kdp_core.study.theorem_2 import Part


class TheoryError(ValueError):
    """The options are not compatible with the run of layers."""


def measure(hidden: HiddenStates, kernel: KernelMap, *, delta: Share = 0.05,
            operator_ridges: list[Positive] | None = None, gaps: list[Count] | None = None,
            feature_counts: list[Annotated[int, Ge(2), MultipleOf(2)]] | None = None,
            bandwidth_scales: list[Positive] | None = None,
            shares: list[Annotated[float, Gt(0), Le(1)]] | None = None, ridge: NotNegative = 1e-6,
            heldout: Share = 0.1, seed: int = 0, device: str = "cpu") -> Theory:
    """Measure both theorems on the states of the run, the layers on which `kernel` was fitted.

    delta: probability with which each bound may fail.
    operator_ridges: further ridges for Theorem 1; the operators are solved again with each of these ridges. A larger
        ridge lowers B_A and raises L_ERM. null means no further ridge.
    gaps: gaps for Theorem 2. A gap is the number of layers between the first state of the run and the target state.
        null means a gap of 1 layer and a gap of all layers of the run.
    feature_counts: numbers 2m of random features for Theorem 2; each number is even. null means the number of features
        of the fitted kernel.
    bandwidth_scales: kernel widths of the random features, as multiples of the median distance of two tokens; null
        means 3.
    shares: shares of the training sequences on which the maps of Theorem 2 are fitted; null means all training
        sequences.
    ridge: ridge of the maps and decoders of Theorem 2, relative to the mean diagonal of the Gram matrix.
    heldout: share of the sequences that are held out to judge the fit, as in step 1.
    seed: seed of the random features, and of the choice of held-out sequences (as in step 1) and of training sequences.
    device: device of the computation, such as cpu or cuda.
    Raises OptionError for a value out of range, and TheoryError for a value that is not compatible with the run.
    """
    options.check(measure, locals())
    steps = len(kernel.operators_KFF)
    gaps = sorted({1, steps}) if gaps is None else gaps
    scales, shares, counts = bandwidth_scales or [3.0], shares or [1.0], feature_counts or [len(kernel.b_M) * 2]
    if not gaps or max(gaps) > steps:
        raise TheoryError(f"theory.gaps is {gaps}, but the run has {steps} layers; give 1 to {steps}, or lengthen "
                          "theory.run")
    began = time.perf_counter()
    states = load(hidden, kernel.block, massive="raw" if kernel.bypass_above is None else "bypass", heldout=heldout,
                  seed=seed)
    train, judged = (_part(states, which, device) for which in (states.train, states.heldout))
    fields = theorem_1.measure(kernel, train.h_KND, judged.h_KND, operator_ridges or [], delta)
    designs = theorem_2.designs(kernel, train, counts, scales, shares, seed)
    risks = [row for gap in gaps for row in theorem_2.risks(kernel, designs, train, judged, gap, ridge, seed)]
    return Theory(block=kernel.block, features=len(kernel.b_M) * 2, lift_input=kernel.lift_input, delta=delta,
                  tokens=len(train.sequence_N), sequences=len(states.train), heldout_tokens=len(judged.sequence_N),
                  **fields, risks=risks,
                  conditions=theorem_2.conditions(risks, fields["r_phi"], train, judged, delta),
                  stats={"ridge": ridge, "kernel_epochs": len(kernel.curve), "seconds": time.perf_counter() - began})


def _part(states: BlockStates, which: Tensor, device: str) -> Part:
    keep_ST = states.keep_ST[which]
    sequence_ST = torch.arange(len(which))[:, None].expand(keep_ST.shape)
    return Part(states.tokens(which).to(device), sequence_ST[keep_ST].to(device))
