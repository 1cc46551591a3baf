"""ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819): the MLP before a run of layers replaces the run.

Layers s .. e-1 are removed. Let m be the output of the MLP of layer s-1 and x the state after that layer's attention,
so that state s is x + m. A matrix T replaces the run, so that x + T'm approximates state e. T is found by least squares
(`compose`),
    T = (X'X + alpha I)^-1 X'Y,    X = m,    Y = state_e - x,
or by angle (`compose_cosine`), where Adam minimises
    L = mean_n 1 - cos(x_n + T'm_n, state_e,n),
T is multiplied into the last matrix of layer s-1's MLP, so that no parameter is added. Least squares only accumulates
X'X and X'Y, batch by batch. The fit by angle needs m, x and state e of all tokens in memory.

As in the paper, by default all tokens have the same weight and alpha = 0. If there are few calibration tokens, a small
ridge improves the fit; `ridges` selects the ridge on held-out sequences. In least squares, massive tokens dominate X'X;
`massive: mask` excludes massive tokens. In the fit by angle, every token has the same weight, whatever its norm is.

Adam starts at the identity, as in the paper. If T is the identity, the run of layers is removed and nothing replaces
it. One update changes an entry of T by about the learning rate at most. The paper trains for 10 epochs on 8000 x 1024
tokens, which are 80,000 updates. One epoch on a few ten thousand tokens has only a few dozen updates. The default of
`epochs` is therefore 100. The result is the T with the lowest held-out loss: the T after an epoch, or the T before the
training. The released code has a mode (`accurate: false`) that trains on cos(T'm, Y). This loss does not depend on the
length of T'm. Training with this loss therefore hardly changes the length of T'm.
"""
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdp_core.base.options import Count, Natural, NotNegative, Positive, Share, check
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._method import Method
from kdp_core.methods._select import one_run
from kdp_core.methods._train import descend
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, Family, as_weight, decoder_layers, family_of, matrix, type_of
from kdp_core.model.passes import Passes
from kdp_core.states.block import Counted, FitError, relative_error, ridge_solve, split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


class _Fit(NamedTuple):
    """The tokens of one batch: the output m of the MLP, and the goal, which is the target state minus the state to
    which m is added."""
    m_ND: Tensor
    goal_ND: Tensor
    rest_ND: Tensor
    """The state to which m is added: the state after the attention."""


class _Case(NamedTuple):
    """A run of layers, and the data for its fit."""
    passes: Passes
    hidden: HiddenStates
    start: int
    stop: int
    keep_ST: Tensor
    """bool: tokens on which T is fitted and judged."""
    kept: Tensor
    """Numbers of the sequences on which T is fitted, int64."""
    held: Tensor
    """Numbers of the sequences on which T is judged."""
    batch: int

    def pairs(self, which: Tensor) -> Iterator[_Fit]:
        """The tokens of the sequences `which`, one batch at a time."""
        for part in which.split(self.batch):
            yield _pairs(self.passes, self.hidden, part, self.keep_ST, self.start, self.stop)


class _Angles(NamedTuple):
    """The vectors of the loss by angle: cos(base + T'm, goal); float32."""
    m_ND: Tensor
    base_ND: Tensor
    goal_ND: Tensor


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", ridge: NotNegative = 0.0, ridges: list[NotNegative] | None = None,
            massive: Counted = "raw", batch_sequences: Count = 8, heldout: Share = 0.1,
            seed: Natural = 0) -> Composed:
    """Fit T for the selected run of layers, and multiply T into the MLP before the run.

    ridge: alpha, as a multiple of the mean diagonal of X'X. The default is 0, as in the paper.
    ridges: several values of alpha. The value with the lowest error on held-out sequences is used. If two values have
        equal errors, the first of them is used. If `ridges` is given, `ridge` is not read.
    massive: `raw` treats all tokens in the same way; `mask` excludes massive tokens from the fit.
    batch_sequences: number of sequences in one forward pass.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice.
    Raises FitError for a family with a norm after its MLPs, and for a run that starts at the first layer.
    """
    check(compose, locals())
    if ridges is not None and not ridges:
        raise FitError("compose.ridges is []; name at least one ridge, or omit the option")
    began = time.perf_counter()
    case = _case(dense, hidden, selection, device, dtype, massive, batch_sequences, heldout, seed)
    gram_DD, cross_DD = _products(case)
    parts, stats = list(case.pairs(case.held)), {}
    if ridges is None:
        # T = (X'X + alpha I)^-1 X'Y
        t_DD = ridge_solve(gram_DD, cross_DD, ridge)
        error = _error(parts, t_DD)
    else:
        tried = [(_error(parts, t_DD), t_DD) for t_DD in _ridge_path(gram_DD, cross_DD, ridges)]
        best = min(range(len(ridges)), key=lambda number: tried[number][0])
        error, t_DD = tried[best]
        stats = {"ridge": ridges[best], "ridges": [{"ridge": one, "heldout_error": its_error}
                                                   for one, (its_error, _) in zip(ridges, tried, strict=True)]}
    return _composed("replaceme_lstsq", case, t_DD, error, [], stats, began)


def compose_cosine(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
                   dtype: str = "float32", lr: Positive = 1e-4, epochs: Natural = 100, batch_tokens: Count = 1024,
                   accurate: bool = True, start: Literal["identity", "lstsq"] = "identity", ridge: NotNegative = 1e-4,
                   massive: Counted = "raw", batch_sequences: Count = 8, heldout: Share = 0.1, seed: Natural = 0,
                   resume: Resume = OFF) -> Composed:
    """Train T for the selected run of layers by the cosine, and multiply T into the MLP before the run.

    lr: learning rate of Adam.
    epochs: passes over the tokens. The paper makes 10 passes, but over about a hundred times as many tokens. The T of
        the epoch with the lowest held-out loss is used, or the start if its loss is lower. With 0 epochs the start is
        used.
    batch_tokens: number of tokens in one update.
    accurate: whether x + T'm is compared with state e after the run. If false, T'm is compared with Y = state e - x.
    start: `identity` as in the paper, or `lstsq`, the least-squares T.
    ridge: ridge of the least-squares T of `start: lstsq`, relative to the mean diagonal of X'X.
    massive: `raw` treats all tokens in the same way; `mask` excludes massive tokens from the fit.
    batch_sequences: number of sequences in one forward pass.
    heldout: share of the sequences that are used only for judging, never for fitting.
    seed: seed of the held-out choice and of the order of training.
    resume: file in which the state of the training is stored.
    Raises FitError for the same reasons as `compose`, and TrainingFailed for a loss that is not a number.
    """
    check(compose_cosine, locals())
    began = time.perf_counter()
    case = _case(dense, hidden, selection, device, dtype, massive, batch_sequences, heldout, seed)
    parts = list(case.pairs(case.held))
    t_DD = torch.eye(hidden.width, dtype=torch.float64)
    if start == "lstsq":
        t_DD = ridge_solve(*_products(case), ridge)
    train, held = (_angles(pairs, accurate, case.passes.device) for pairs in (case.pairs(case.kept), parts))
    t_DD, curve, epoch = _by_angle(t_DD, train, held, lr, epochs, batch_tokens, seed, resume)
    return _composed("replaceme_cosine", case, t_DD, _error(parts, t_DD), curve,
                     {"epoch": epoch, "heldout_loss": curve[epoch]["heldout_loss"]}, began - resume.earlier_s)


def _case(dense: Path, hidden: HiddenStates, selection: Selection, device: str, dtype: str, massive: str,
          batch_sequences: int, heldout: float, seed: int) -> _Case:
    """Check the run of layers, and load the model."""
    _check_run(selection, checkpoints.config_of(dense), heldout, hidden.sequences)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    (start, stop), (held, kept) = selection.blocks[0], split(hidden.sequences, heldout, seed)
    keep_ST = torch.ones(hidden.sequences, hidden.tokens, dtype=torch.bool)
    if massive == "mask":
        keep_ST &= ~hidden.massive([start, stop])
    return _Case(Passes(model, hidden.tokens), hidden, start, stop, keep_ST, kept, held, batch_sequences)


def _composed(method: str, case: _Case, t_DD: Tensor, error: float, curve: list[dict[str, Any]],
              stats: dict[str, Any], began: float) -> Composed:
    """Multiply a fitted T into the MLP, and return the record with the plan."""
    model = case.passes.model
    plan = Plan(method, [], [], _absorbed(model, case.start - 1, t_DD))
    return Composed(plan, curve, [{"block": (case.start, case.stop), "heldout_error": error, "params": 0}],
                    {"tokens": len(case.kept) * case.hidden.tokens, **stats, "seconds": time.perf_counter() - began})


def _check_run(selection: Selection, config: Any, heldout: float, sequences: int) -> None:
    if why := refuses(family_of(config)):
        fits = [name for name, family in FAMILIES.items() if not refuses(family)]
        raise FitError(f"ReplaceMe cannot be folded into a {type_of(config)} model: {why}; choose a model of "
                       f"{', '.join(fits)}")
    if len(selection.blocks) != 1 or selection.blocks[0][0] == 0:
        raise FitError(f"ReplaceMe folds one run of layers into the layer before it; the blocks are {selection.blocks}")
    if max(1, round(heldout * sequences)) >= sequences:
        raise FitError(f"compose.heldout {heldout} of {sequences} sequences "
                       "leaves none to fit on or none to judge on; change it or add calibration sequences")


def _products(case: _Case) -> tuple[Tensor, Tensor]:
    """X'X and X'Y, summed over the sequences on which T is fitted; float64."""
    gram, cross = 0.0, 0.0
    for fit in case.pairs(case.kept):
        gram, cross = gram + fit.m_ND.T @ fit.m_ND, cross + fit.m_ND.T @ fit.goal_ND
    return gram, cross


def _ridge_path(gram_DD: Tensor, cross_DD: Tensor, ridges: list[float]) -> Iterator[Tensor]:
    """Yields the solution T for each ridge; one eigendecomposition is enough for all ridges. A ridge is a multiple of
    the mean diagonal of X'X."""
    l_D, q_DD = torch.linalg.eigh(gram_DD)
    rotated_DD, rounding = q_DD.T @ cross_DD, len(l_D) * torch.finfo(l_D.dtype).eps * l_D[-1]
    for ridge in ridges:
        shifted_D = l_D + ridge * gram_DD.diagonal().mean()
        if shifted_D[0] <= rounding:
            raise FitError(f"least squares: the Gram matrix is singular with ridge {ridge:g}; raise the ridge or add "
                           "calibration tokens")
        # X'X = Q diag(l) Q':  T = Q diag(1 / (l + alpha)) Q' X'Y
        yield q_DD @ (rotated_DD / shifted_D[:, None])


def _error(parts: list[_Fit], t_DD: Tensor) -> float:
    """Relative squared error of x + T'm."""
    return relative_error(torch.cat([p.rest_ND + p.m_ND @ t_DD for p in parts]),
                          torch.cat([p.rest_ND + p.goal_ND for p in parts]))


def _angles(parts: Iterator[_Fit] | list[_Fit], accurate: bool, device: torch.device) -> _Angles:
    """The vectors of all tokens in float32. If `accurate` is true, the loss compares x + T'm with state e, otherwise
    T'm with Y."""
    made = [tuple(pair_ND.to(device, torch.float32) for pair_ND in
                  ((p.m_ND, p.rest_ND, p.rest_ND + p.goal_ND) if accurate else
                   (p.m_ND, torch.zeros_like(p.rest_ND), p.goal_ND))) for p in parts]
    return _Angles(*(torch.cat(kind) for kind in zip(*made, strict=True)))


def _by_angle(t_DD: Tensor, train: _Angles, held: _Angles, lr: float, epochs: int, batch_tokens: int,
              seed: int, resume: Resume) -> tuple[Tensor, list[dict[str, Any]], int]:
    """Three results: T of the epoch with the lowest held-out loss, one entry for each epoch, and the number of that
    epoch. Epoch 0 is the start."""
    t_DD = t_DD.to(train.m_ND.device, torch.float32).requires_grad_()
    adam, generator = torch.optim.Adam([t_DD], lr=lr), torch.Generator().manual_seed(seed)
    progress = Progress(resume, [t_DD], {"adam": adam, "order": generator}, best=0, best_DD=t_DD.detach().clone(),
                        sums=0.0, curve=[{"epoch": 0, "seconds": 0.0, "loss": None,
                                          "heldout_loss": _judge(held, t_DD)}])
    values, curve = progress.values, progress.values["curve"]
    for epoch in progress.epochs(epochs):
        order = progress.order(lambda: torch.randperm(len(train.m_ND), generator=generator))
        for which in progress.updates(order.split(batch_tokens)):
            loss = _loss(_Angles(*(pairs_ND[which.to(pairs_ND.device)] for pairs_ND in train)), t_DD)
            descend(loss, adam, training="ReplaceMe by cosine", remedy="lower compose.lr, or, if it is so from the "
                    "start, extract the hidden states again")
            values["sums"] += loss.item() * len(which)
        curve.append({"epoch": epoch, "seconds": progress.seconds(), "loss": values["sums"] / len(train.m_ND)})
        values["sums"] = 0.0
        with progress.judging():
            curve[epoch]["heldout_loss"] = _judge(held, t_DD)
        if curve[epoch]["heldout_loss"] < curve[values["best"]]["heldout_loss"]:
            values |= {"best": epoch, "best_DD": t_DD.detach().clone()}
    best = values["best"]
    logger.info("cosine: epoch %d of %d, held out %.5f, at the start %.5f", best, epochs, curve[best]["heldout_loss"],
                curve[0]["heldout_loss"])
    return values["best_DD"].cpu().double(), curve, best


def _loss(pairs: _Angles, t_DD: Tensor) -> Tensor:
    # mean_n 1 - cos(x_n + T'm_n, state_e,n)
    return (1 - functional.cosine_similarity(pairs.base_ND + pairs.m_ND @ t_DD, pairs.goal_ND)).mean()


@torch.no_grad()
def _judge(pairs: _Angles, t_DD: Tensor) -> float:
    return _loss(pairs, t_DD).item()


@torch.no_grad()
def _pairs(passes: Passes, hidden: HiddenStates, which: Tensor, keep_ST: Tensor, start: int, stop: int) -> _Fit:
    """m, Y and x of the sequences `which`, float64, without the tokens that `keep_ST` excludes."""
    caught: list[Tensor] = []
    last = passes.layers[start - 1].get_submodule(family_of(passes.model).parts["mlp"].writer)
    hook = last.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        h_BTD = passes.layer(start - 1, hidden.state(start - 1, which).to(passes.device, passes.model.dtype))
    finally:
        hook.remove()
    keep_BT = keep_ST[which]
    m_ND = caught[0].view(h_BTD.shape).cpu()[keep_BT].double()
    rest_ND = h_BTD.cpu()[keep_BT].double() - m_ND
    return _Fit(m_ND, hidden.state(stop, which)[keep_BT].double() - rest_ND, rest_ND)


def _absorbed(model: nn.Module, layer: int, t_DD: Tensor) -> dict[str, Tensor]:
    """The MLP's last matrix, and its bias if it has a bias, multiplied by T' from the left."""
    writer = family_of(model).parts["mlp"].writer
    prefix, last = f"{family_of(model).prefix}{layer}.{writer}", decoder_layers(model)[layer].get_submodule(writer)
    # down <- T' down
    made = {f"{prefix}.weight": as_weight(last, t_DD.T @ matrix(last).detach().cpu().double()).to(last.weight.dtype)}
    if last.bias is not None:
        made[f"{prefix}.bias"] = (t_DD.T @ last.bias.detach().cpu().double()).to(last.bias.dtype)
    return made


def refuses(family: Family) -> str:
    """The reason why T cannot be multiplied into the MLPs of this family; empty if this is possible."""
    return "a norm follows its MLPs" if family.parts["mlp"].norm_after else ""


METHODS = (
    Method("replaceme_lstsq", "Shopkhoev et al. 2025, ReplaceMe, least squares: a run of layers absorbed into the MLP "
                              "before it", "layers replaced", one_run, compose=compose, refuses=refuses,
           example={"compose": {"heldout": 0.2}}),
    Method("replaceme_cosine", "Shopkhoev et al. 2025, ReplaceMe, cosine: the same matrix trained on the angle of the "
                               "states", "layers replaced", one_run, compose=compose_cosine, refuses=refuses,
           example={"compose": {"epochs": 2, "heldout": 0.2}}),
)
