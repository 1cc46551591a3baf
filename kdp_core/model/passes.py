"""Runs parts of a dense model alone: single layers on stored states, and the final norm and head on last states.

Searches and fits run many combinations of the same layers and stand-ins. If a layer runs on stored states, the layers
before this layer need not run again. Besides states, a layer needs other arguments: positions, masks and rotary tables.
These arguments differ by family and depend only on the shape of the batch. `Passes` records these arguments once and
then reuses them. The arguments come from the model's own forward pass over one sequence of the given length without
padding. A path is a list of layer numbers and stand-ins, in order.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdp_core.base.records import Module
from kdp_core.model.distil import Head, head_of, to_head
from kdp_core.model.families import base_of, decoder_layers
from kdp_core.model.stand_ins import MODULES

Step = int | Callable[[Tensor], Tensor]
"""A decoder layer by its number, or a stand-in."""


class Passes:
    """The parts of a causal language model, which can run on states of sequences of `length` tokens."""

    def __init__(self, model: nn.Module, length: int) -> None:
        self.model, self.layers, self.device = model, decoder_layers(model), model.device
        self.head: Head = head_of(model)
        self.context = self._captured(length)
        """The arguments of each layer except its states, (positional, keyword)."""

    @torch.no_grad()
    def _captured(self, length: int) -> list[tuple[tuple, dict[str, Any]]]:
        """Record the arguments of each layer except its states. Only the first layer runs; the others return their
        input states, on which the arguments do not depend."""
        found: list[tuple[tuple, dict[str, Any]]] = []
        form: list[type] = []

        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

        def unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
            return (hidden_states,) if form[0] is tuple else hidden_states

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[0].register_forward_hook(lambda _, args, output: form.append(type(output))))
        own = [vars(layer).get("forward") for layer in self.layers[1:]]
        for layer in self.layers[1:]:
            layer.forward = unchanged
        try:
            base_of(self.model)(torch.zeros(1, length, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
            for layer, forward in zip(self.layers[1:], own, strict=True):
                # accelerate gives the layers of a spread model a `forward` of their own
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
        return found

    def layer(self, number: int, h_BTD: Tensor) -> Tensor:
        """Run layer `number` on its input states; returns its output states."""
        args, kwargs = self.context[number]
        output = self.layers[number](h_BTD, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run(self, h_BTD: Tensor, path: Sequence[Step]) -> Tensor:
        """Run a path of layers and stand-ins on states; returns the states at the end of the path."""
        for step in path:
            # stand-ins are float32, whatever the model's precision is
            h_BTD = self.layer(step, h_BTD) if isinstance(step, int) else step(h_BTD.float()).to(h_BTD.dtype)
        return h_BTD

    @torch.no_grad()
    def run_batches(self, h_STD: Tensor, path: Sequence[Step], batch_sequences: int) -> Tensor:
        """Run a path as `run` does, but without gradients, and on a few sequences at a time. The result is on the
        CPU."""
        return torch.cat([self.run(h_BTD.to(self.device, self.model.dtype), path).float().cpu()
                          for h_BTD in h_STD.split(batch_sequences)])

    def to_head(self, h_BTD: Tensor) -> Tensor:
        """The input of the output head, computed from states after the last layer."""
        return to_head(self.model, h_BTD)


def built(module: Module) -> nn.Module:
    """The stand-in of a record as a module in eval mode, with copies of the record's weights."""
    # on the meta device no weights are drawn at random, so the state of torch's generator does not change
    with torch.device("meta"):
        made = MODULES[module.kind](**module.options)
    made.load_state_dict({name: tensor.clone() for name, tensor in module.tensors.items()}, assign=True)
    return made.eval()


def path_of(modules: Sequence[Module], stand_ins: Sequence[nn.Module], start: int, layers: int) -> list[Step]:
    """The path from state `start` to the last state. In this path, stand-ins replace their blocks."""
    at, path = start, []
    for module, stand_in in zip(modules, stand_ins, strict=True):
        path += [*range(at, module.block[0]), stand_in]
        at = module.block[1]
    return [*path, *range(at, layers)]
