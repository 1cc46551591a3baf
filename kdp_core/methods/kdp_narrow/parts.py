"""Functions that run the attention or the MLP of a layer by itself. They compute the inputs of the part's writer, and
the state after the part.

A part reads the state `base` and computes the inputs f of its writer. The part then adds W f + b to the state. In some
families (Gemma) a norm is first applied to W f + b.
Axes: S sequences, B sequences of a batch, T tokens, D width, F inputs of the writer.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.model.families import as_weight, family_of, matrix
from kdp_core.model.passes import Passes

SMALLEST_GAIN = 1e-3
"""Limit for the gains of the norm after the writer, relative to the largest gain. If the gain of an output is below
this limit, the output keeps its old values."""


class _Reached(Exception):
    """Raised to end a layer before its writer runs."""


class Fed(NamedTuple):
    """The inputs of a part: the state to which the part adds, and the inputs of its writer."""
    base_STD: Tensor
    f_STF: Tensor


class Target(NamedTuple):
    """The target of a writer, and the square root of the weight that each token has in the regression."""
    u_NTD: Tensor
    root_NT1: Tensor


def writer_of(passes: Passes, layer: int, part: str) -> nn.Module:
    """The writer of a part, a linear map."""
    return passes.layers[layer].get_submodule(family_of(passes.model).parts[part].writer)


def norm_after(passes: Passes, layer: int, part: str) -> nn.Module | None:
    """The norm between the writer and the state, if the family has one."""
    name = family_of(passes.model).parts[part].norm_after
    return passes.layers[layer].get_submodule(name) if name else None


def gain_after(passes: Passes, layer: int, part: str) -> Tensor | None:
    """The factor of each output of the writer in the norm after the writer, float32 (D,)."""
    norm = norm_after(passes, layer, part)
    return None if norm is None else norm.weight.float() + family_of(passes.model).gain_offset


@torch.no_grad()
def fed(passes: Passes, layer: int, part: str, h_STD: Tensor, batch: int) -> Fed:
    """The inputs of a part if `h_STD` is the input of the part's layer; float32 on the CPU. The layer is run only until
    the writer of the part is reached."""
    found: list[Fed] = []
    inputs = matrix(writer_of(passes, layer, part)).shape[1]
    # a list of batches that is joined at the end would need twice the memory
    made = Fed(torch.empty(h_STD.shape), torch.empty(*h_STD.shape[:2], inputs))
    with _catching(passes, layer, part, found):
        for h_BTD, *made_B in zip(h_STD.split(batch), *(one.split(batch) for one in made), strict=True):
            try:
                passes.layer(layer, h_BTD.to(passes.device, passes.model.dtype))
            except _Reached:
                pass
            for target_BTX, one in zip(made_B, found.pop(), strict=True):
                # OPT flattens sequences and tokens inside a layer
                target_BTX.copy_(one.view(target_BTX.shape))
    return made


@contextmanager
def _catching(passes: Passes, layer: int, part: str, found: list[Fed]) -> Iterator[None]:
    record, module = family_of(passes.model).parts[part], passes.layers[layer]
    base: list[Tensor] = []

    def keep_base(_: nn.Module, args: tuple, kwargs: dict) -> None:
        base.append(args[0] if args else kwargs["hidden_states"])

    def stop(_: nn.Module, args: tuple) -> None:
        found.append(Fed(base.pop().float().cpu(), args[0].float().cpu()))
        raise _Reached

    hooks = [module.get_submodule(record.norm).register_forward_pre_hook(keep_base, with_kwargs=True),
             module.get_submodule(record.writer).register_forward_pre_hook(stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def after(passes: Passes, layer: int, part: str, given: Fed, batch: int, *, in_place: bool = False) -> Tensor:
    """The state after a part, float32 (S, T, D) on the CPU: base + norm(W f + b), or without the norm.

    in_place: whether the state is written over `given.base_STD`, which saves memory.
    """
    writer, norm = writer_of(passes, layer, part), norm_after(passes, layer, part)
    made_STD = given.base_STD if in_place else torch.empty_like(given.base_STD)
    for base_BTD, f_BTF, made_BTD in zip(*(one.split(batch) for one in (*given, made_STD)), strict=True):
        u_BTD = writer(f_BTF.to(passes.device, writer.weight.dtype))
        torch.add(base_BTD, (u_BTD if norm is None else norm(u_BTD)).float().cpu(), out=made_BTD)
    return made_STD


def target(passes: Passes, layer: int, part: str, given: Fed, y_STD: Tensor) -> Target:
    """The target of the writer, without the writer's bias. A writer that reaches the target makes the state after the
    part equal to y."""
    writer, gain_D = writer_of(passes, layer, part), gain_after(passes, layer, part)
    u_STD = (y_STD - given.base_STD).to(passes.device)
    # w_n = 1 / |y_n|^2: the fit minimises relative errors of the state
    root_ST1 = 1 / y_STD.norm(dim=-1, keepdim=True).clamp_min(1e-6).to(passes.device)
    if gain_D is not None:
        old_STD = writer(given.f_STF.to(passes.device, writer.weight.dtype)).float()
        rms_ST1 = old_STD.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
        # norm(u) = g u / rms(u), with the rms of the old output:  u = (y - base) rms / g
        wide_D = gain_D.abs() > SMALLEST_GAIN * gain_D.abs().max()
        u_STD = torch.where(wide_D, u_STD * rms_ST1 / torch.where(wide_D, gain_D, 1.0), old_STD)
        root_ST1 = root_ST1 / rms_ST1
    return Target(u_STD if writer.bias is None else u_STD - writer.bias.float(), root_ST1)


@torch.no_grad()
def products(passes: Passes, layer: int, part: str, given: Fed, y_STD: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """sum w f f' and sum w f u' over all tokens, float64."""
    gram, cross = 0.0, 0.0
    for base_BTD, f_BTF, y_BTD in zip(given.base_STD.split(batch), given.f_STF.split(batch), y_STD.split(batch),
                                      strict=True):
        u_BTD, root_BT1 = target(passes, layer, part, Fed(base_BTD, f_BTF), y_BTD)
        f_NF = (f_BTF.to(root_BT1.device) * root_BT1).flatten(0, 1)
        gram, cross = gram + (f_NF.T @ f_NF).double(), cross + (f_NF.T @ (u_BTD * root_BT1).flatten(0, 1)).double()
    return gram, cross


def weights_of(writer: nn.Module) -> Tensor:
    """w_FD of a writer, float64 copy."""
    return matrix(writer).detach().double().T.clone()


@torch.no_grad()
def put(writer: nn.Module, w_FD: Tensor, inputs: Tensor) -> None:
    """Set the matrix of a writer for these inputs. For all other inputs the matrix is zero, so that they have no
    effect."""
    made = torch.zeros_like(matrix(writer))
    made[:, inputs.to(made.device)] = w_FD.T.to(made.dtype)
    writer.weight.copy_(as_weight(writer, made))

