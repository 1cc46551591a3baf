"""Lets the authors' code run on a CPU with transformers 5. All shims are hooks and patches; no clone is changed.

Import: a clone is searched for modules only while it is imported, so that modules of two clones may have the same name.
    Packages that a clone imports but that its fit does not use may be stand-ins.
Output: what the code prints is suppressed. `gc.collect` does nothing, because it takes time and is no work of a fit.
GPU: GPU devices become the CPU, and the program does not wait for a GPU. The patch costs a few microseconds for each
    call of torch.
transformers 5: a decoder layer no longer computes the rotary tables itself, returns a tensor instead of a tuple, and
    its attention returns two results instead of three. Hooks pass the tables and restore the number of results.
"""
import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def importable(folder: Path, *, bare: Sequence[str] = (),
               absent: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[None]:
    """Search `folder` first for modules. Afterwards the modules of the folder are forgotten; functions of them that are
    in use still work.

    bare: packages of the folder whose `__init__.py` is not run, because it imports more than the fit needs.
    absent: stand-ins of packages: name -> the names in the package.
    """
    before = dict(sys.modules)
    made = {name: _package(name, folder) for name in bare}
    for name, contents in (absent or {}).items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(contents)
    sys.modules.update(made)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = {name: module for name, module in sys.modules.items() if name not in before}
        for name in [name for name, module in new.items() if name in made or _lies_in(module, folder)]:
            del sys.modules[name]
        sys.modules.update({name: before[name] for name in made if name in before})


def _package(name: str, folder: Path) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [str(folder.joinpath(*name.split(".")))]
    return package


def _lies_in(module: ModuleType, folder: Path) -> bool:
    # `vars`, because some modules of torch make any attribute up
    places = [vars(module).get("__file__"), *vars(module).get("__path__", [])]
    return any(place and Path(place).is_relative_to(folder) for place in places)


def imported(folder: Path, *names: str, **more: Any) -> list[ModuleType]:
    """The modules `names` of a folder; see `importable`."""
    with importable(folder, **more):
        return [importlib.import_module(name) for name in names]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the authors' code prints, and its calls of `gc.collect`, which are no work of a fit."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), \
            mock.patch.object(gc, "collect", lambda *_: 0):
        yield


class _OnCpu(TorchFunctionMode):
    """Replaces every GPU device in a call of torch by the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        return func(*map(_cpu, args), **{name: _cpu(value) for name, value in (kwargs or {}).items()})


def _cpu(value: Any) -> Any:
    is_gpu = isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda"
    return torch.device("cpu") if is_gpu else value


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Run code that is written for a GPU on the CPU."""
    with _OnCpu(), no_waiting():
        yield


def no_waiting() -> Any:
    """Make `torch.cuda.synchronize` do nothing."""
    return mock.patch.object(torch.cuda, "synchronize", lambda *_: None)


def with_positions(model: nn.Module, length: int) -> nn.Module:
    """Pass the rotary tables of `length` positions to every decoder layer that is called without them. The layers then
    return tuples, as in transformers 4, so the whole model can no longer run."""
    tables = rotary(model, length)
    for layer in model.model.layers:
        pass_tables(layer, tables)
        layer.register_forward_hook(lambda module, args, output: (output,))
    return model


@torch.no_grad()
def rotary(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """The rotary tables of positions 0 to length - 1."""
    return model.model.rotary_emb(model.model.embed_tokens.weight[:1], torch.arange(length)[None])


def pass_tables(layer: nn.Module, tables: tuple[Tensor, Tensor]) -> None:
    """Pass the rotary tables to a layer that is called without them."""
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"position_embeddings": tables, **kwargs}), with_kwargs=True)


def three_results(layers: Sequence[nn.Module]) -> None:
    """Let the attentions of the layers return a third result, the cache that transformers 4 returned."""
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: (*output, None))
