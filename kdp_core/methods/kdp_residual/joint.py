"""Joint training of a pruned model's stand-ins to match the dense model's outputs. All weights of the model are frozen.

A local fit uses the states of one block only. A local fit does not measure how an error changes the outputs, or how the
errors of several blocks add up. This module trains all stand-ins together with Adam, starting from the stand-ins in
closed form (kdp_core.methods._outputs). The forward pass starts at the first stand-in. The layers before the first
stand-in are unchanged, so the input of this stand-in is a stored state of the dense model.
"""
from typing import Any

from torch import Tensor, nn

from kdp_core.base.records import Module, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.methods import _outputs
from kdp_core.model.passes import Passes, built, path_of
from kdp_core.states.hidden import HiddenStates


def train(passes: Passes, hidden: HiddenStates, tokens: Tokens, modules: list[Module], kept: Tensor, held: Tensor, *,
          epochs: int, lr: float, batch_sequences: int, positions: int, kl_weight: float,
          seed: int, resume: Resume = OFF) -> tuple[list[Module], list[dict[str, Any]]]:
    """Train the stand-ins on the sequences with the numbers `kept`. Returns the stand-ins of the epoch with the lowest
    loss on the sequences `held`, and one entry for each epoch."""
    stand_ins = nn.ModuleList(built(module) for module in modules).to(passes.device)
    passes.model.requires_grad_(False)
    path = path_of(modules, list(stand_ins), modules[0].block[0], len(passes.layers))
    data = _outputs.data_of(hidden, tokens, modules[0].block[0])
    curve = _outputs.train(passes, path, data, list(stand_ins.parameters()), kept, held, epochs=epochs, lr=lr,
                           batch_sequences=batch_sequences, positions=positions, kl_weight=kl_weight, seed=seed,
                           resume=resume)
    trained = [module._replace(tensors={name: tensor.detach().cpu().clone()
                                        for name, tensor in stand_in.state_dict().items()})
               for module, stand_in in zip(modules, stand_ins, strict=True)]
    return trained, curve
