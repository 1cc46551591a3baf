"""kdp_residual: stand-ins with a skip path, a linear part and a dictionary made of the model's own neurons.

    h_{l+k} ~ h_l + W x + b + O f(V x + c),    x = h_l / rms(h_l)

KDP rebuilds a whole state from 2m bounded features. Here the state passes unchanged and the features only add what the
block would have added, seen, as the block sees it, through the norm. In the terms of extended dynamic mode
decomposition the dictionary is free to choose: random Fourier features, as KDP's, their frequencies as drawn or
learned (kdp_core.methods.kdp_residual.projection), or, by default, neurons of the block's own MLPs, of which those stay that the
least-squares fit would miss most.

Everything but frequencies and the choice of neurons is one ridge regression on streamed Gram matrices:
    (W, O, b) = argmin sum_n w_n |y_n - h_n - W x_n - O f_n - b|^2 + ridge,    w_n = 1 / |y_n|^2,
centred, every feature at unit variance. Neurons go by the optimal brain surgeon's rule (Hassibi and Stork 1993):
without entry j the loss rises by |w_j|^2 / [G^-1]_jj; half of the surplus goes at a time.

Blocks are fitted in the order of depth, each on what the already pruned model feeds it (`prefix`), its target the dense
model's state: so a later stand-in mends what earlier ones broke. Then, optionally, all stand-ins together are trained
for a pass or two against the dense model's outputs (kdp_core.model.distil); no weight of the model itself ever changes, and
the closed-form start is kept unless held-out divergence falls.

Massive-activation tokens are neither fitted nor mapped: they go by (kdp_core.states.block).
"""
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Block, Composed, ModelFacts, Module, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.methods.kdp_residual import joint, projection
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, Family, activation_of, decoder_layers, family_of, norm_of
from kdp_core.model.passes import Passes, built
from kdp_core.model.stand_ins import normalised
from kdp_core.states.block import TOKEN_WEIGHTS, FitError, relative_error, split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
DICTIONARIES = ("neurons", "rff", "rff_learned", "none")
PRODUCT_TOKENS = 4096
"""Tokens whose features are in memory together."""


class Dictionary(NamedTuple):
    """Entries f(V x + c) of normalised states; see kdp_core.model.stand_ins.Residual."""
    kind: str
    """glu, mlp or rff."""
    v_RD: Tensor
    """Rows are the entries; for glu the gates' rows, then the others'."""
    c_R: Tensor
    activation: str

    @property
    def entries(self) -> int:
        """Their number."""
        return len(self.v_RD) // (2 if self.kind == "glu" else 1)

    def only(self, entries: Tensor) -> "Dictionary":
        """These entries alone."""
        rows = torch.cat((entries, entries + self.entries)) if self.kind == "glu" else entries
        return self._replace(v_RD=self.v_RD[rows], c_R=self.c_R[rows])


class Fit(NamedTuple):
    """How stand-ins are fitted: the options of `compose` that concern closed form."""
    dictionary: str
    entries: int
    bandwidth_scale: float
    ridge: float
    token_weight: str
    norm: str
    massive_factor: float
    batch_sequences: int
    seed: int
    theta_steps: int = 30
    theta_lr: float = 0.2
    device: str | torch.device = "cpu"
    """Where products are taken and solved."""


class Statistics(NamedTuple):
    """Weighted sums over tokens; features are (x, f, 1)."""
    gram_FF: Tensor
    cross_FD: Tensor


def neurons(model: nn.Module, block: Block) -> Dictionary:
    """All MLP neurons of a block's layers, the gain and bias of the norm before them multiplied in."""
    family = family_of(model)
    parts = [_neurons_of(family, layer) for layer in decoder_layers(model)[slice(*block)]]
    kind = "glu" if family.gated else "mlp"
    halves = 2 if kind == "glu" else 1
    v_RD = torch.cat([v_RD.chunk(halves)[half] for half in range(halves) for v_RD, _ in parts])
    c_R = torch.cat([c_R.chunk(halves)[half] for half in range(halves) for _, c_R in parts])
    return Dictionary(kind, v_RD, c_R, activation_of(model))


@torch.no_grad()
def _neurons_of(family: Family, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """v_RD and c_R of the neurons of one layer, as they read normalised states."""
    norm, linears = norm_of(layer, family, "mlp"), [layer.get_submodule(name) for name in family.parts["mlp"].readers]
    bias_D = getattr(norm, "bias", None)
    gain_D, bias_D = norm.weight + family.gain_offset, torch.zeros_like(norm.weight) if bias_D is None else bias_D
    # V (g * x + b) + c = (V g) x + (V b + c)
    v_RD = torch.cat([linear.weight for linear in linears]).float()
    c_R = torch.cat([torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.float().cpu()
                     for linear in linears])
    return (v_RD * gain_D.float()).cpu(), v_RD.cpu() @ bias_D.float().cpu() + c_R


def random_features(x_ND: Tensor, entries: int, bandwidth_scale: float, seed: int) -> Dictionary:
    """Random Fourier features of an RBF kernel, its width `bandwidth_scale` median distances of normalised states."""
    generator = torch.Generator().manual_seed(seed)
    one_ND, other_ND = (x_ND[torch.randint(len(x_ND), (1024,), generator=generator)] for _ in range(2))
    distances_N = (one_ND - other_ND).norm(dim=1)
    width = bandwidth_scale * distances_N[distances_N > 0].median()
    v_RD = torch.randn(entries, x_ND.shape[1], generator=generator) / width
    return Dictionary("rff", v_RD, 2 * math.pi * torch.rand(entries, generator=generator), "relu")


def counted(h_STD: Tensor, y_STD: Tensor, massive_factor: float) -> tuple[Tensor, float]:
    """Which tokens count, bool (S, T): those massive at neither end; and the norm above which one goes by."""
    norm_ST, goal_ST = h_STD.norm(dim=-1), y_STD.norm(dim=-1)
    above = massive_factor * norm_ST.median().item()
    return (norm_ST <= above) & (goal_ST <= massive_factor * goal_ST.median()), above


def fit_stand_in(block: Block, dictionary: Dictionary | None, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Module:
    """The stand-in that maps states h to y in closed form; float32 states of the sequences to fit on."""
    keep_ST, above = counted(h_STD, y_STD, fit.massive_factor)
    if not keep_ST.any():
        raise FitError(f"block {block}: every token is massive; raise hidden.massive_factor")
    statistics = _statistics(dictionary, h_STD, y_STD, keep_ST, fit)
    D = h_STD.shape[-1]
    kept = _surgeon(statistics, D, fit) if dictionary and dictionary.entries > fit.entries else None
    if dictionary and kept is not None:
        dictionary = dictionary.only(kept)
        rows = torch.cat((torch.arange(D), D + kept, torch.tensor([len(statistics.gram_FF) - 1]))).to(fit.device)
        statistics = Statistics(statistics.gram_FF[rows][:, rows], statistics.cross_FD[rows])
    w_FD, bias_D = solve(statistics, fit.ridge)
    return _module(block, dictionary, w_FD.float().cpu(), bias_D.float().cpu(), above, fit.norm)


def _module(block: Block, dictionary: Dictionary | None, w_FD: Tensor, bias_D: Tensor, above: float,
            norm: str) -> Module:
    D = w_FD.shape[1]
    tensors = {"linear.weight": w_FD[:D].T.contiguous(), "linear.bias": bias_D}
    if dictionary:
        tensors |= {"inner.weight": dictionary.v_RD.contiguous(), "inner.bias": dictionary.c_R.contiguous(),
                    "outer.weight": w_FD[D:].T.contiguous()}
    kind, activation = (dictionary.kind, dictionary.activation) if dictionary else ("mlp", "relu")
    options = {"width": D, "entries": dictionary.entries if dictionary else 0, "dictionary": kind,
               "activation": activation, "norm": norm, "bypass_above": above}
    return Module(block, "residual", options, tensors)


@torch.no_grad()
def _statistics(dictionary: Dictionary | None, h_STD: Tensor, y_STD: Tensor, keep_ST: Tensor, fit: Fit) -> Statistics:
    """Gram and cross matrices, streamed: features of a few sequences are in memory at a time."""
    D = h_STD.shape[-1]
    features = built(_module((0, 1), dictionary, torch.zeros(D + dictionary.entries, D), torch.zeros(D), 0.0, fit.norm)
                     ).to(fit.device) if dictionary else None

    def entries(h_ND: Tensor) -> Tensor:
        x_ND = normalised(h_ND, fit.norm)
        return torch.cat((x_ND, features.features(x_ND)), dim=1) if features else x_ND

    # about a constant: entries that hardly leave their mean would drown in the rounding of a float32 product
    shift_F = entries(h_STD[keep_ST.nonzero()[:64].unbind(dim=1)].to(fit.device)).mean(dim=0)
    gram, cross = 0.0, 0.0
    for h_BTD, y_BTD, keep_BT in _batches(h_STD, y_STD, keep_ST, max(1, PRODUCT_TOKENS // h_STD.shape[1])):
        h_ND, y_ND = h_BTD[keep_BT].to(fit.device), y_BTD[keep_BT].to(fit.device)
        parts_NF = torch.cat((entries(h_ND) - shift_F, h_ND.new_ones(len(h_ND), 1)), dim=1)
        # w_n = 1 / |y_n|^2: relative errors count
        weight_N1 = 1 / y_ND.norm(dim=1, keepdim=True) if fit.token_weight == "inverse_norm" else 1.0
        f_NF, goal_ND = parts_NF * weight_N1, (y_ND - h_ND) * weight_N1
        gram, cross = gram + (f_NF.T @ f_NF).double(), cross + (f_NF.T @ goal_ND).double()
    return _moved(Statistics(gram, cross), torch.cat((shift_F, shift_F.new_zeros(1))).double())


def _moved(statistics: Statistics, by_F: Tensor) -> Statistics:
    """The statistics of features that are larger by constants, the last one, 1, as it is."""
    gram_FF, cross_FD = statistics
    # sum (f + s)(f + s)' = (I + s e') sum f f' (I + e s'), e the place of the constant 1
    gram_FF = gram_FF + by_F.outer(gram_FF[-1])
    return Statistics(gram_FF + gram_FF[:, -1].outer(by_F), cross_FD + by_F.outer(cross_FD[-1]))


def _batches(h_STD: Tensor, y_STD: Tensor, keep_ST: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(h_STD.split(size), y_STD.split(size), keep_ST.split(size), strict=True)


def _standard(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariances of features at unit variance (and with the goal), their scale and their mean; the last row gone."""
    gram_FF, cross_FD = statistics
    total = gram_FF[-1, -1]
    mean_F, mean_goal_D = gram_FF[-1, :-1] / total, cross_FD[-1] / total
    covariance_FF = gram_FF[:-1, :-1] / total - mean_F.outer(mean_F)
    scale_F = covariance_FF.diagonal().clamp_min(1e-12).sqrt()
    cross_FD = (cross_FD[:-1] / total - mean_F.outer(mean_goal_D)) / scale_F[:, None]
    return covariance_FF / scale_F.outer(scale_F), cross_FD, scale_F, mean_F


def _regularised(covariance_FF: Tensor, ridge: float) -> Tensor:
    return covariance_FF + ridge * torch.eye(len(covariance_FF), dtype=torch.float64, device=covariance_FF.device)


def solve(statistics: Statistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with a free intercept: weights w_FD of the raw features and the bias_D, float64."""
    covariance_FF, cross_FD, scale_F, mean_F = _standard(statistics)
    factor, failed = torch.linalg.cholesky_ex(_regularised(covariance_FF, ridge))
    if failed.item():
        raise FitError(f"least squares: the Gram matrix is singular with ridge {ridge:g}; raise the ridge or add "
                       "calibration tokens")
    w_FD = torch.cholesky_solve(cross_FD, factor) / scale_F[:, None]
    mean_goal_D = statistics.cross_FD[-1] / statistics.gram_FF[-1, -1]
    return w_FD, mean_goal_D - mean_F @ w_FD


def _surgeon(statistics: Statistics, D: int, fit: Fit) -> Tensor:
    """The entries to keep, ascending: those without which the loss would rise most, the rest gone by halves."""
    covariance_FF, cross_FD, _, _ = _standard(statistics)
    kept = torch.arange(len(covariance_FF) - D)
    while len(kept) > fit.entries:
        rows = torch.cat((torch.arange(D), D + kept)).to(covariance_FF.device)
        inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(_regularised(covariance_FF[rows][:, rows],
                                                                               fit.ridge)))
        w_FD = inverse_FF @ cross_FD[rows]
        # increase of the loss without entry j: |w_j|^2 / [G^-1]_jj
        rise_F = (w_FD.square().sum(dim=1) / inverse_FF.diagonal())[D:]
        surplus = len(kept) - fit.entries
        gone = surplus if surplus <= 64 else surplus // 2
        kept = kept[rise_F.argsort(stable=True)[gone:].sort().values.cpu()]
    return kept


def module_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Parameters of one stand-in of `compose`, known before any fit."""
    given = {"dictionary": "neurons", "entries": 96, **options.get("compose", {})}
    entries = 0 if given["dictionary"] == "none" else given["entries"]
    rows = 2 * entries if given["dictionary"] == "neurons" and FAMILIES[facts.family].gated else entries
    return facts.width * (facts.width + 1) + rows * (facts.width + 1) + entries * facts.width


def linear_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Parameters of one stand-in of `compose_linear`."""
    return facts.width * (facts.width + 1)


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", dictionary: str = "neurons", entries: int = 96, bandwidth_scale: float = 3.0,
            theta_steps: int = 30, theta_lr: float = 0.2, ridge: float = 1e-4, token_weight: str = "inverse_norm",
            prefix: bool = True, epochs: int = 1, lr: float = 3e-4, batch_sequences: int = 4, positions: int = 32,
            kl_weight: float = 0.5, heldout: float = 0.1, seed: int = 0, resume: Resume = OFF) -> Composed:
    """Fit the stand-ins of all blocks of a grid point, in the order of depth, then train them together.

    `dense` is the checkpoint folder; `hidden` holds all its states over `tokens`.
    dictionary: `neurons` of the block's own MLPs, `rff` random Fourier features, `rff_learned` the same with learned
        frequencies, or `none`, the linear part alone.
    entries: of the dictionary, in each stand-in.
    bandwidth_scale: width of the kernel of `rff` in median distances, the start of `rff_learned`.
    theta_steps: of Adam on the frequencies and phases of `rff_learned`.
    theta_lr: of that Adam at its start, in units of the frequencies' spread.
    ridge: relative to features of unit variance.
    token_weight: `inverse_norm` weighs a token by 1 / |its target|^2 (relative errors count), `none` all alike.
    prefix: fit each block on what the already pruned model feeds it; otherwise on the dense model's states.
    epochs: passes of joint training against the dense model's outputs; 0 keeps the closed form.
    lr: peak learning rate of Adam.
    batch_sequences: sequences of an optimiser step.
    positions: tokens of a sequence whose outputs are compared in a step, drawn anew each time.
    kl_weight: lambda of lambda KL(dense || pruned) + (1 - lambda) cross-entropy of the next token.
    heldout: share of the sequences that judge and are never fitted on.
    seed: of the held-out choice, the order of training and random features.
    resume: where the state of joint training is kept.
    Raises FitError for unknown options and for states that are not stored, ProjectionError for those of theta.
    """
    began = time.perf_counter()
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    fit = Fit(dictionary, entries, bandwidth_scale, ridge, token_weight, family_of(model).norm, hidden.massive_factor,
              batch_sequences, seed, theta_steps, theta_lr, model.device)
    _check(fit, hidden, epochs, positions, heldout)
    held, kept = split(hidden.sequences, heldout, seed)
    passes = Passes(model, hidden.tokens)
    modules, fits = _in_order(passes, hidden, selection.blocks, kept, held, fit, prefix)
    stats = {"tokens": len(kept) * hidden.tokens, "seconds_closed_form": time.perf_counter() - began}
    curve: list[dict[str, Any]] = []
    if epochs:
        modules, curve = joint.train(passes, hidden, tokens, modules, kept, held, epochs=epochs, lr=lr,
                                     batch_sequences=batch_sequences, positions=positions, kl_weight=kl_weight,
                                     seed=seed, resume=resume)
        best = min(curve, key=lambda row: row["heldout_loss"])
        stats |= {name: best[name] for name in ("epoch", "heldout_loss", "heldout_kl")}
    stats["seconds"] = time.perf_counter() - began + resume.earlier_s
    return Composed(Plan("kdp_residual", [], modules, {}), curve, fits, stats)


def compose_linear(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
                   dtype: str = "float32", ridge: float = 1e-4, token_weight: str = "inverse_norm",
                   prefix: bool = True, heldout: float = 0.1, seed: int = 0) -> Composed:
    """The linear part alone, in closed form: what fitting on the pruned prefix is worth by itself.

    ridge: relative to features of unit variance.
    token_weight: `inverse_norm` weighs a token by 1 / |its target|^2 (relative errors count), `none` all alike.
    prefix: fit each block on what the already pruned model feeds it; otherwise on the dense model's states.
    heldout: share of the sequences that judge and are never fitted on.
    seed: of the held-out choice.
    """
    return compose(dense, hidden, tokens, selection, device=device, dtype=dtype, dictionary="none", ridge=ridge,
                   token_weight=token_weight, prefix=prefix, epochs=0, heldout=heldout, seed=seed)


def _check(fit: Fit, hidden: HiddenStates, epochs: int, positions: int, heldout: float) -> None:
    for name, value, known in (("dictionary", fit.dictionary, DICTIONARIES),
                               ("token_weight", fit.token_weight, TOKEN_WEIGHTS)):
        if value not in known:
            raise FitError(f"compose.{name} {value!r}: choose one of {', '.join(known)}")
    if fit.dictionary != "none" and fit.entries < 1:
        raise FitError(f"compose.entries {fit.entries}: a dictionary needs at least one entry; raise it, or choose "
                       "dictionary none")
    projection.check_options(fit.theta_steps, fit.theta_lr)
    if not 0 < heldout < 1 or max(1, round(heldout * hidden.sequences)) >= hidden.sequences:
        raise FitError(f"compose.heldout {heldout} of {hidden.sequences} sequences leaves none on one side; change it "
                       "or add calibration sequences")
    if epochs < 0 or positions < 1:
        raise FitError(f"compose.epochs {epochs} and positions {positions}: give 0 or more and 1 or more")
    if hidden.layers != list(range(len(hidden.layers))):
        raise FitError(f"{hidden.path} lacks states (stored: {hidden.layers}); set hidden.layers to all")


def _in_order(passes: Passes, hidden: HiddenStates, blocks: list[Block], kept: Tensor, held: Tensor, fit: Fit,
              prefix: bool) -> tuple[list[Module], list[dict[str, Any]]]:
    """Closed-form stand-ins, ascending, and how well each does on held-out sequences of what it is really fed."""
    modules, fits, at = [], [], blocks[0][0]
    h_STD = hidden.state(at)  # what the pruned model feeds the block
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


def closed_form_options(model: nn.Module, hidden: HiddenStates, *, dictionary: str, entries: int, seed: int) -> Fit:
    """The defaults of `compose` for one stand-in by itself."""
    return Fit(dictionary, entries, 3.0, 1e-4, "inverse_norm", family_of(model).norm, hidden.massive_factor, 8, seed,
               device=model.device)


def fit_alone(model: nn.Module, hidden: HiddenStates, block: Block, sequences: Tensor, fit: Fit) -> Module:
    """The stand-in of one block on the dense model's states."""
    h_STD, y_STD = hidden.state(block[0])[sequences], hidden.state(block[1])[sequences]
    return fit_stand_in(block, candidates(model, block, h_STD, y_STD, fit), h_STD, y_STD, fit)


def candidates(model: nn.Module, block: Block, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Dictionary | None:
    """A block's dictionary, or more neurons than it is to have; made of the sequences to fit on."""
    if fit.dictionary == "none":
        return None
    if fit.dictionary == "neurons":
        return neurons(model, block)
    h_ND = h_STD.flatten(0, 1)
    h_ND = h_ND[h_ND.norm(dim=1) <= fit.massive_factor * h_ND.norm(dim=1).median()]
    drawn = random_features(normalised(h_ND, fit.norm), fit.entries, fit.bandwidth_scale, fit.seed)
    return drawn if fit.dictionary == "rff" else _learned(drawn, h_STD, y_STD, fit)


def _learned(drawn: Dictionary, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Dictionary:
    """Random features whose frequencies and phases are then learned, on the tokens and weights of the fit itself."""
    keep_ST, _ = counted(h_STD, y_STD, fit.massive_factor)
    h_ND, y_ND = h_STD[keep_ST], y_STD[keep_ST]
    weight_N = y_ND.square().sum(dim=1).reciprocal() if fit.token_weight == "inverse_norm" else torch.ones(len(y_ND))
    sequence_N = torch.arange(len(h_STD))[:, None].expand_as(keep_ST)[keep_ST]
    sample = projection.Sample(normalised(h_ND, fit.norm), y_ND - h_ND, weight_N, sequence_N)
    found = projection.learn(sample, drawn.v_RD, drawn.c_R, ridge=fit.ridge, steps=fit.theta_steps, lr=fit.theta_lr,
                             seed=fit.seed)
    return drawn._replace(v_RD=found.v_MD, c_R=found.c_M)
