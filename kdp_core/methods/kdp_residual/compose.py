"""kdp_residual: stand-ins with a skip path, a linear part and a dictionary made of the model's own neurons.

    h_{l+k} ~ h_l + W x + b + O f(V x + c),    x = h_l / rms(h_l)

KDP rebuilds a whole state from 2m bounded features. Here the state itself is kept, and the features only approximate
what the block would have added. The features read the state through the norm, as the block does. The module
`dictionaries` makes the entries f, and the module `closed_form` solves the regression that finds W, O and b.

Blocks are fitted in the order of depth. Each block is fitted on the states that enter it in the already pruned model
(`prefix`). The target is the state of the dense model, so that a later stand-in corrects the errors of earlier
stand-ins. Then all stand-ins are trained together for `epochs` epochs against the outputs of the dense model (`joint`).
The training changes only weights of stand-ins; all kept weights of the dense model are unchanged. If the training does
not lower the held-out loss, the closed form is kept.

Massive-activation tokens are not fitted, and they bypass the stand-in (kdp_core.states.block).
"""
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdp_core.base.options import Chance, Count, Natural, NotNegative, Positive, Share, check, settings
from kdp_core.base.records import Block, Composed, ModelFacts, Module, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.methods.kdp_residual import joint, projection
from kdp_core.methods.kdp_residual.closed_form import fit_stand_in
from kdp_core.methods.kdp_residual.dictionaries import (
    BANDWIDTH_SCALE,
    RIDGE,
    THETA_LR,
    THETA_STEPS,
    TOKEN_WEIGHT,
    Fit,
    Kind,
    candidates,
    counted,
)
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, family_of
from kdp_core.model.passes import Passes, built
from kdp_core.states.block import FitError, TokenWeight, check_all_states, relative_error, split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


def module_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Number of parameters of one stand-in of `compose`, known before any fit."""
    given = settings(compose, options.get("compose", {}))
    entries = 0 if given["dictionary"] == "none" else given["entries"]
    rows = 2 * entries if given["dictionary"] == "neurons" and FAMILIES[facts.family].gated else entries
    return facts.width * (facts.width + 1) + rows * (facts.width + 1) + entries * facts.width


def linear_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Number of parameters of one stand-in of `compose_linear`."""
    return facts.width * (facts.width + 1)


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", dictionary: Kind = "neurons", entries: Count = 96,
            bandwidth_scale: Positive = BANDWIDTH_SCALE, theta_steps: Natural = THETA_STEPS,
            theta_lr: Positive = THETA_LR, ridge: NotNegative = RIDGE, token_weight: TokenWeight = TOKEN_WEIGHT,
            prefix: bool = True, epochs: Natural = 1, lr: Positive = 3e-4, batch_sequences: Count = 4,
            positions: Count = 32, kl_weight: Chance = 0.5, heldout: Share = 0.1, seed: Natural = 0,
            resume: Resume = OFF) -> Composed:
    """Fit the stand-ins of all blocks of a grid point, in the order of depth, then train them together.

    `dense` is the checkpoint folder. `hidden` contains all states of the dense model over `tokens`.
    dictionary: `neurons` (of the block's own MLPs), `rff` (random Fourier features), `rff_learned` (random Fourier
        features with learned frequencies), or `none` (only the linear part).
    entries: number of entries of the dictionary in each stand-in.
    bandwidth_scale: width of the kernel of `rff`, in median distances. The kernel of `rff_learned` has this width
        before its frequencies are learned.
    theta_steps: number of updates of Adam for the frequencies and phases of `rff_learned`.
    theta_lr: learning rate of Adam at the start, for the frequencies and phases of `rff_learned`. The unit is the
        standard deviation of the frequencies, and for phases one radian.
    ridge: ridge of the closed form, relative to features of unit variance.
    token_weight: `inverse_norm` weights a token by 1 / |its target|^2, so that its relative error counts; `none` gives
        all tokens the same weight.
    prefix: whether each block is fitted on the states of the already pruned model; otherwise on the states of the dense
        model.
    epochs: number of epochs of joint training against the dense model's outputs; 0 keeps the closed form.
    lr: peak learning rate of Adam.
    batch_sequences: number of sequences in an update.
    positions: number of tokens of each sequence whose outputs are compared in an update. New positions are drawn for
        every update.
    kl_weight: lambda in the loss lambda KL(dense || pruned) + (1 - lambda) cross-entropy of the next token.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice, the order of training and random features.
    resume: file in which the state of the joint training is stored.
    Raises OptionError for a wrong option, and FitError if states are not stored or if there are too few sequences.
    """
    check(compose, locals())
    began = time.perf_counter()
    _check_states(hidden, heldout, dictionary)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    fit = Fit(dictionary, entries, bandwidth_scale, ridge, token_weight, family_of(model).reads, hidden.massive_factor,
              batch_sequences, seed, theta_steps, theta_lr, model.device)
    held, kept = split(hidden.sequences, heldout, seed)
    passes = Passes(model, hidden.tokens)
    modules, fits = _in_order(passes, hidden, selection.blocks, kept, held, fit, prefix)
    stats = {"tokens": len(kept) * hidden.tokens, "seconds_closed_form": time.perf_counter() - began}
    curve: list[dict[str, Any]] = []
    if epochs:
        modules, curve = joint.train(passes, hidden, tokens, modules, kept, held, epochs=epochs, lr=lr,
                                     batch_sequences=batch_sequences, positions=positions, kl_weight=kl_weight,
                                     seed=seed, resume=resume)
        best = min(curve, key=lambda epoch: epoch["heldout_loss"])
        stats |= {name: best[name] for name in ("epoch", "heldout_loss", "heldout_kl")}
    stats["seconds"] = time.perf_counter() - began + resume.earlier_s
    return Composed(Plan("kdp_residual", [], modules, {}), curve, fits, stats)


def compose_linear(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
                   dtype: str = "float32", ridge: NotNegative = RIDGE, token_weight: TokenWeight = TOKEN_WEIGHT,
                   prefix: bool = True, heldout: Share = 0.1, seed: Natural = 0) -> Composed:
    """Fit only the linear part, in closed form. The stand-in has no dictionary and is not trained, so its result shows
    the gain of `prefix` alone.

    ridge: ridge of the closed form, relative to features of unit variance.
    token_weight: `inverse_norm` weights a token by 1 / |its target|^2, so that its relative error counts; `none` gives
        all tokens the same weight.
    prefix: whether each block is fitted on the states of the already pruned model; otherwise on the states of the dense
        model.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice.
    """
    return compose(dense, hidden, tokens, selection, device=device, dtype=dtype, dictionary="none", ridge=ridge,
                   token_weight=token_weight, prefix=prefix, epochs=0, heldout=heldout, seed=seed)


def _check_states(hidden: HiddenStates, heldout: float, dictionary: str) -> None:
    """Raise FitError if states are not stored, or if there are too few sequences for fitting or for judging."""
    held = max(1, round(heldout * hidden.sequences))
    if held >= hidden.sequences:
        raise FitError(f"compose.heldout {heldout} of {hidden.sequences} sequences "
                       "leaves none to fit on or none to judge on; change it or add calibration sequences")
    if dictionary == "rff_learned" and hidden.sequences - held < projection.LEAST:
        raise FitError(f"compose.dictionary rff_learned needs {projection.LEAST} sequences to fit on, and there are "
                       f"{hidden.sequences - held}; add calibration sequences or choose rff")
    check_all_states(hidden)


def _in_order(passes: Passes, hidden: HiddenStates, blocks: list[Block], kept: Tensor, held: Tensor, fit: Fit,
              prefix: bool) -> tuple[list[Module], list[dict[str, Any]]]:
    """Fit the stand-ins in closed form, in the order of depth. Returns the stand-ins, and the held-out error of each
    stand-in on the states that enter this stand-in in the pruned model."""
    modules, fits, at = [], [], blocks[0][0]
    h_STD = hidden.state(at)  # the states that enter the block in the pruned model
    for block in blocks:
        h_STD = passes.run_batches(h_STD, range(at, block[0]), fit.batch_sequences)
        fed_STD, y_STD = h_STD if prefix else hidden.state(block[0]), hidden.state(block[1])
        dictionary = candidates(passes.model, block, fed_STD[kept], y_STD[kept], fit)
        module = fit_stand_in(block, dictionary, fed_STD[kept], y_STD[kept], fit)
        run = built(module)
        with torch.no_grad():
            h_STD = torch.cat([run(h_BTD) for h_BTD in h_STD.split(fit.batch_sequences)])
        keep_ST, _ = counted(fed_STD, y_STD, fit.massive_factor)
        error = relative_error(h_STD[held][keep_ST[held]], y_STD[held][keep_ST[held]])
        modules.append(module)
        fits.append({"block": block, "heldout_error": error,
                     "params": sum(tensor.numel() for tensor in module.tensors.values())})
        logger.info("stand-in %d-%d: held-out error %.4f", *block, error)
        at = block[1]
    return modules, fits
