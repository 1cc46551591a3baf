"""Sparsity: single weights are set to zero, as many as a depth method would remove for the same ratio.

A matrix has R rows (its outputs) and C columns (its inputs). Three rules say which weights are set to zero:
    magnitude: the lowest |W_ij| of the matrix.
    Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1): the lowest |W_ij| a_j of each row, a_j = sqrt(sum x_j^2 / n).
    SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, Algorithm 1): H = (2/n) X'X + damp I, H^-1 = U'U; in blocks
        of columns the lowest W_ij^2 / U_jj^2 are set to zero, and later columns change to compensate for each zero.
Layers are pruned one after the other. The inputs of a layer are the outputs of the layers before it, which are already
pruned, over n sequences. All tokens count equally. Size and speed stay those of the dense model, because zeros are
stored.

Scope and share. Weights are set to zero only in the matrices of the linear modules inside decoder layers. Let the ratio
be a share of all parameters, where tied parameters count once. Then the share s = ratio * all / in scope of the weights
in these matrices must become zero. The share s is the same for every matrix. After each matrix, the total of zeros is s
times the number of weights so far, rounded down. Each matrix gets as many zeros as this total grows by the matrix. The
number of zeros of all matrices together is therefore exact to one weight. With a pattern (2:4, 4:8) half of every group
of 4 or 8 columns is set to zero, as in the papers, and the ratio is not read. The statistics contain the share of
zeros.

Where we differ from the released code (locuslab/wanda 8e8fc87, IST-DASLab/sparsegpt 147d215):
    Wanda sets int(C s) weights of each row to zero, up to R - 1 weights too few. Here one more weight becomes zero in
        some rows, until the number is exact: in the rows whose next weight has the lowest score. If C s is a whole
        number, both codes give the same zeros.
    SparseGPT and magnitude set one weight too many to zero: all up to the int(count s)-th score inclusive. Here the
        count is exact.
    SparseGPT stops if H is singular; here damp is raised tenfold, up to 0.1. SparseGPT uses float32, we use float64.
    As in SparseGPT's code, all weights of dead columns (whose inputs are always 0) become zero, even if this exceeds
        the count.
"""
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count, NotNegative
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method
from kdp_core.methods._select import no_layer
from kdp_core.model import checkpoints
from kdp_core.model.families import as_weight, family_of, is_linear, matrix
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.states.block import FitError, gram
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)

Pattern = Literal["unstructured", "2:4", "4:8"]
"""Where the zeros of a matrix may be: anywhere in the matrix, or the same number in each group of columns."""
PATTERNS: dict[str, tuple[int, int] | None] = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}
"""(zeros in a group, columns of a group). Other patterns N:M are not possible: N is the number of kept weights in
papers, but the number of zeros in code."""
DAMP_LARGEST = 0.1
"""Largest damp that is tried, relative to the mean diagonal of H."""


class _Matrix(NamedTuple):
    """One linear module in which weights are set to zero."""
    name: str
    """Name of the module's weight in the dense checkpoint."""
    layer: int
    module: nn.Module


Rule = Callable[[Tensor, Tensor, int], Tensor]
"""(w_RC, statistic of the inputs, weights to zero) -> pruned w_RC."""


def magnitude(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
              dtype: str = "float32", pattern: Pattern = "unstructured") -> Composed:
    """Set the weights with the lowest magnitude to zero, matrix by matrix. Calibration text is not needed.

    pattern: `unstructured`, `2:4` or `4:8`. `2:4` and `4:8` set half of the weights of each linear module to zero; then
        the ratio is not read.
    Raises FitError for a ratio that cannot be reached by zeros in the linear modules of the layers.
    """
    options.check(magnitude, locals())
    began, counts = time.perf_counter(), _counts(dense, selection.ratio_target, PATTERNS[pattern])
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    matrices = list(_matrices(model))
    with torch.no_grad():
        for one in matrices:
            w_RC = matrix(one.module)
            mask_RC = _lowest(w_RC.abs(), counts[one.name], PATTERNS[pattern])
            _replace(one.module, w_RC.masked_fill(mask_RC, 0))
    return _composed("magnitude", model, matrices, {"tokens": 0, "seconds": time.perf_counter() - began})


def wanda(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
          dtype: str = "float32", pattern: Pattern = "unstructured", sequences: Count | None = None,
          batch_sequences: Count = 8, seed: int = 0) -> Composed:
    """In each row, set to zero the weights for which |weight| times the norm of the weight's input is lowest.

    pattern: `unstructured`, `2:4` or `4:8`. `2:4` and `4:8` set half of the weights of each linear module to zero; then
        the ratio is not read.
    sequences: number of calibration sequences, drawn by `seed`; null means all.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises FitError for a ratio that cannot be reached by zeros in the linear modules of the layers.
    """
    options.check(wanda, locals())
    began, counts = time.perf_counter(), _counts(dense, selection.ratio_target, PATTERNS[pattern])
    h_STD = _calibration(hidden, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    matrices = list(_matrices(model))

    def rule(w_RC: Tensor, squares_C: Tensor, count: int) -> Tensor:
        # |W_ij| a_j,    a_j = sqrt(sum over tokens of x_j^2 / n)
        score_RC = w_RC.abs() * (squares_C / len(h_STD)).sqrt()
        mask_RC = _lowest_by_row(score_RC, count) if pattern == "unstructured" else \
            _lowest(score_RC, count, PATTERNS[pattern])
        return w_RC.masked_fill(mask_RC, 0)

    _in_turn(Passes(model, hidden.tokens), matrices, counts, h_STD, batch_sequences,
             lambda x_NC: x_NC.square().sum(0, dtype=torch.float64), rule)
    return _composed("wanda", model, matrices, {"tokens": h_STD[..., 0].numel(),
                                                "seconds": time.perf_counter() - began})


def sparsegpt(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
              dtype: str = "float32", pattern: Pattern = "unstructured", sequences: Count | None = None,
              batch_sequences: Count = 8, damp: NotNegative = 0.01, block_size: Count = 128, seed: int = 0) -> Composed:
    """Set to zero the weights whose removal changes a matrix's outputs least. Later columns are changed to compensate
    for the zeros.

    pattern: `unstructured`, `2:4` or `4:8`. `2:4` and `4:8` set half of the weights of each linear module to zero; then
        the ratio is not read.
    sequences: number of calibration sequences, drawn by `seed`; null means all.
    batch_sequences: number of sequences in one forward pass.
    damp: multiple of the mean diagonal of H that is added to the diagonal. If H is singular, damp is raised tenfold, up
        to 0.1.
    block_size: number of columns whose zeros are chosen together. For each block, the columns after the block are
        changed once.
    seed: seed of the choice of sequences.
    Raises FitError for a ratio that cannot be reached by zeros in the linear modules of the layers. Also raises
    FitError if H is singular for every damp.
    """
    options.check(sparsegpt, locals())
    began, groups = time.perf_counter(), PATTERNS[pattern]
    if groups and block_size % groups[1]:
        raise FitError(f"compose.block_size {block_size} with pattern {pattern}: give a multiple of {groups[1]}, the "
                       "columns of the pattern")
    counts = _counts(dense, selection.ratio_target, groups)
    h_STD = _calibration(hidden, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    matrices = list(_matrices(model))
    damps: list[float] = []

    def rule(w_RC: Tensor, gram_CC: Tensor, count: int) -> Tensor:
        # H = (2/n) X'X
        hessian_CC, w_RC = gram_CC * (2 / len(h_STD)), w_RC.double()
        dead_C = hessian_CC.diagonal() == 0
        hessian_CC.diagonal()[dead_C] = 1
        u_CC, level = _inverse_factor(hessian_CC, damp)
        damps.append(level)
        return _moved(w_RC.masked_fill(dead_C, 0), u_CC, count, groups, block_size)

    _in_turn(Passes(model, hidden.tokens), matrices, counts, h_STD, batch_sequences, lambda x: gram(x, x), rule)
    return _composed("sparsegpt", model, matrices, {"tokens": h_STD[..., 0].numel(), "damp_largest": max(damps),
                                                    "seconds": time.perf_counter() - began})


def _calibration(hidden: HiddenStates, sequences: int | None, seed: int) -> Tensor:
    """State 0 of `sequences` randomly drawn sequences (seed `seed`), in their order in the calibration set."""
    wanted = hidden.sequences if sequences is None else sequences
    if wanted > hidden.sequences:
        raise FitError(f"compose.sequences {sequences}: there are {hidden.sequences} calibration sequences; lower it "
                       "or add sequences")
    order = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    return hidden.state(0, order[:wanted].sort().values)


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    """The linear modules of the decoder layers, in the order of the model."""
    prefix = family_of(model).prefix
    for path, module in model.named_modules():
        if path.startswith(prefix) and is_linear(module):
            yield _Matrix(f"{path}.weight", int(path[len(prefix):].split(".")[0]), module)


def _counts(dense: Path, ratio: float, groups: tuple[int, int] | None) -> dict[str, int]:
    """Number of weights to set to zero in each matrix, by the matrix's name. The numbers follow from shapes alone."""
    model = checkpoints.on_meta(checkpoints.config_of(dense))
    matrices = list(_matrices(model))
    total, scope = count_params(model), sum(one.module.weight.numel() for one in matrices)
    if groups:
        zeros, columns = groups
        for name, _, module in matrices:
            if matrix(module).shape[1] % columns:
                raise FitError(f"compose.pattern {zeros}:{columns}: {name} has {matrix(module).shape[1]} columns, no "
                               f"multiple of {columns}; choose another pattern or unstructured")
        return {name: module.weight.numel() * zeros // columns for name, _, module in matrices}
    goal = round(ratio * total)
    if goal >= scope:
        raise FitError(f"ratio {ratio}: {goal} zeros do not fit into the linear modules of the layers, which hold "
                       f"{scope} of {total} parameters; choose a ratio below {scope / total:.4f}")
    made, seen = {}, 0
    for name, _, module in matrices:
        size = module.weight.numel()
        # differences of floor(s * weights so far),    s = ratio * all / in scope
        made[name] = goal * (seen + size) // scope - goal * seen // scope
        seen += size
    return made


@torch.no_grad()
def _in_turn(passes: Passes, matrices: list[_Matrix], counts: dict[str, int], h_STD: Tensor, batch: int,
             statistic: Callable[[Tensor], Tensor], rule: Rule) -> None:
    """Prune the layers in order. Each layer reads the outputs of the pruned layers before it."""
    for number in range(len(passes.layers)):
        if not torch.isfinite(h_STD).all():
            raise FitError(f"state {number} of the pruned model is not finite; try dtype float32 for the model")
        own = [one for one in matrices if one.layer == number]
        sums = _sums(passes, own, h_STD.split(batch), statistic)
        for name, _, module in own:
            _replace(module, rule(matrix(module), sums[name], counts[name]))
        if number + 1 < len(passes.layers):
            h_STD = passes.run_batches(h_STD, [number], batch)
        logger.info("pruned layer %d of %d", number + 1, len(passes.layers))


def _sums(passes: Passes, own: list[_Matrix], batches: tuple[Tensor, ...],
          statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The statistic of each matrix's inputs, summed over the batches. If several matrices read the same input, the
    statistic of this input is computed once."""
    inputs: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
             for name, _, module in own]
    sums: dict[str, Tensor | float] = {name: 0.0 for name, _, _ in own}
    try:
        for h_BTD in batches:
            passes.layer(own[0].layer, h_BTD.to(passes.device, passes.model.dtype))
            # all inputs of the batch are in memory at this point, so equal ids mean the same tensor
            made = {id(x): statistic(x.flatten(0, -2).float()) for x in {id(x): x for x in inputs.values()}.values()}
            sums = {name: sums[name] + made[id(inputs[name])] for name in sums}
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _replace(module: nn.Module, w_RC: Tensor) -> None:
    """Replace the matrix of a module by a matrix in the same precision. The old memory is not overwritten, because it
    may be the memory map of a weight file."""
    module.weight = nn.Parameter(as_weight(module, w_RC).to(module.weight.dtype), requires_grad=False)


def _lowest(score_RC: Tensor, count: int, groups: tuple[int, int] | None) -> Tensor:
    """bool_RC: true for the `count` lowest scores, or for the lowest scores of each group of columns. If two scores are
    equal, the score in the lower row is chosen first, and within a row the score in the lower column."""
    if groups:
        zeros, columns = groups
        score_RGM = score_RC.unflatten(1, (-1, columns))
        first = score_RGM.argsort(dim=2, stable=True)[..., :zeros]
        return torch.zeros_like(score_RGM, dtype=torch.bool).scatter(2, first, True).flatten(1)
    return _lowest_by_row(score_RC.flatten()[None], count).view(score_RC.shape)


def _lowest_by_row(score_RC: Tensor, count: int) -> Tensor:
    """bool_RC: true for the lowest scores of each row, the same number in each row. If `count` is not a multiple of the
    number of rows, the rows whose next score is lowest have one more true entry."""
    each, remainder = divmod(count, len(score_RC))
    mask_RC = _first_of_row(score_RC, each)
    if remainder:
        # of equal scores, argmin returns the first
        next_R = score_RC.masked_fill(mask_RC, torch.inf).argmin(dim=1)
        rows = score_RC.gather(1, next_R[:, None])[:, 0].argsort(stable=True)[:remainder]
        mask_RC[rows, next_R[rows]] = True
    return mask_RC


def _first_of_row(score_RC: Tensor, each: int) -> Tensor:
    """bool_RC: true for the `each` lowest scores of each row. Of equal scores, the first are chosen."""
    last_R1 = score_RC.kthvalue(max(each, 1), dim=1, keepdim=True).values
    mask_RC = score_RC <= last_R1
    tied_R = mask_RC.sum(dim=1) > each
    if tied_R.any():
        below_RC, equal_RC = score_RC[tied_R] < last_R1[tied_R], score_RC[tied_R] == last_R1[tied_R]
        mask_RC[tied_R] = below_RC | equal_RC & (equal_RC.cumsum(1) <= each - below_RC.sum(1, keepdim=True))
    return mask_RC


def _inverse_factor(hessian_CC: Tensor, damp: float) -> tuple[Tensor, float]:
    """Two results: the upper triangular U with U'U = (H + damp mean diag(H) I)^-1, and the smallest damp that was large
    enough. Raises FitError if every damp is too small."""
    eye_CC, mean = torch.eye(len(hessian_CC)).to(hessian_CC), hessian_CC.diagonal().mean()
    level = damp
    while True:
        factor_CC, failed = torch.linalg.cholesky_ex(hessian_CC + level * mean * eye_CC)
        if not failed.item():
            u_CC, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor_CC), upper=True)
        if not failed.item():
            return u_CC, level
        if not 0 < level <= DAMP_LARGEST / 10 * (1 + 1e-9):
            raise FitError(f"SparseGPT: the Hessian is singular with damp {level:g}; raise compose.damp or add "
                           "calibration tokens")
        level *= 10
        logger.warning("SparseGPT: singular Hessian, damp raised to %g", level)


def _moved(w_RC: Tensor, u_CC: Tensor, count: int, groups: tuple[int, int] | None, block_size: int) -> Tensor:
    """The matrix with `count` weights set to zero. After each block of columns, later columns are changed to compensate
    for the zeros of the block."""
    w_RC, C = w_RC.clone(), w_RC.shape[1]
    for start in range(0, C, block_size):
        stop = min(start + block_size, C)
        width, u_BB = groups[1] if groups else stop - start, u_CC[start:stop, start:stop]
        # transposed, because rows are read and changed faster than columns
        w_BR = w_RC[:, start:stop].T.contiguous()
        errors_BR, steps_BR = torch.empty_like(w_BR), torch.empty_like(w_BR)
        for column, u_B in enumerate(u_BB):
            if column % width == 0:
                # lowest W_ij^2 / U_jj^2: of the whole block, or of each group when its first column is reached
                ahead = slice(column, column + width)
                mask_MR = _lowest((w_BR[ahead].T.contiguous() / u_BB.diagonal()[ahead]).square(),
                                  count * stop // C - count * start // C, groups).T.contiguous()
            zero_R = mask_MR[column % width]
            # e = (w - masked w) / U_jj,    W_j.. -= e U_j..
            errors_BR[column] = torch.where(zero_R, w_BR[column], 0) / u_B[column]
            w_BR[column:] -= torch.mul(u_B[column:, None], errors_BR[column], out=steps_BR[column:])
            w_BR[column].masked_fill_(zero_R, 0)
        w_RC[:, start:stop] = w_BR.T
        # W_later -= E U_block,later
        w_RC[:, stop:] -= errors_BR.T.contiguous() @ u_CC[start:stop, stop:]
    return w_RC


def _composed(method: str, model: nn.Module, matrices: list[_Matrix], stats: dict[str, float]) -> Composed:
    """The plan with the pruned matrices, and the statistics. The share of zeros is counted in the pruned matrices."""
    tensors = {name: module.weight.detach().cpu() for name, _, module in matrices}
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
    scope = sum(tensor.numel() for tensor in tensors.values())
    return Composed(Plan(method, [], [], tensors, sparse=True), [], [],
                    {**stats, "zeros": zeros, "share_of_scope": zeros / scope,
                     "share_of_all": zeros / count_params(model)})


METHODS = (
    Method("magnitude", "weights of least magnitude set to zero, the baseline of Wanda and SparseGPT",
           "weights set to zero", no_layer, compose=magnitude),
    Method("wanda", "Sun et al. 2024, Wanda: weights set to zero by magnitude times the norm of their input",
           "weights set to zero", no_layer, compose=wanda),
    Method("sparsegpt", "Frantar and Alistarh 2023, SparseGPT: weights set to zero, the others changed to compensate",
           "weights set to zero", no_layer, compose=sparsegpt),
)
