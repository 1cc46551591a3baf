"""Low-rank changes of a pruned model that fine-tuning trains: of the output head, or of all linear layers.

LoRA (Hu et al. 2021) changes a matrix by a product of two narrow ones, W -> W + s B A with s = alpha / r. B starts at
zero, so the training starts at the unchanged pruned model. peft computes the changes.

`head` is KDP (Ma et al., ICLR 2026), appendix B: only the output head changes. The states that enter the head therefore
never change, and they are computed once. If the head has its own weight, the change is added to this weight. If the
head is tied to the embedding, adding the change to the weight would change the inputs as well. For a tied head the
change is therefore applied before the head, h -> h + s B A h (the paper's "logit adapter"), and it stays in the model.

`linear` changes every linear layer of attentions, MLPs and stand-ins, as the released codes of LLM-Pruner (Ma et al.
2023) and SliceGPT (Ashkboos et al. 2024) do after pruning. Every update runs the whole pruned model. All changes are
added to the weights, so the model gets no parameters.
"""
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdp_core.model.distil import Head, Losses, distillation_loss, final_states, head_of
from kdp_core.model.families import base_of, decoder_layers
from kdp_core.prune.tuning import Options, Student


class Lesson(NamedTuple):
    """What the student learns from."""
    ids_ST: Tensor
    teacher_STD: Tensor
    """The states that enter the output head of the dense model."""
    teacher: Head

    def losses(self, student_STD: Tensor, head: Head, which_S: Tensor, options: Options) -> Losses:
        """The losses on the sequences which_S. student_STD has the states of these sequences alone."""
        return distillation_loss(student_STD, self.teacher_STD[which_S], head, self.teacher, self.ids_ST[which_S],
                                 kl_weight=options.kl_weight, temperature=options.temperature)


def of_head(h_STD: Tensor, head: Head, tied: bool, lesson: Lesson, options: Options) -> Student:
    """A student whose head changes. h_STD: the pruned model's states that enter the head, for all sequences."""
    if tied:
        width = head.linear.weight.shape[1]
        head.adapter = nn.Linear(width, width, bias=False, device=head.linear.weight.device).requires_grad_(False)
        nn.init.eye_(head.adapter.weight)
    name = "adapter" if tied else "linear"
    layer = _with_lora(head, [name], options)[name]

    def change() -> dict[str, Tensor]:
        a_RD, b_OR = (part["default"].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        if tied:
            # h -> h + (s B) (A h)
            return {"head_adapter.a.weight": a_RD, "head_adapter.b.weight": layer.scaling["default"] * b_OR}
        # W -> W + s B A
        return {"lm_head.weight": head.linear.weight.float().cpu() + layer.scaling["default"] * b_OR @ a_RD}

    return Student(head, _trained(head), lambda which_S: lesson.losses(h_STD[which_S], head, which_S, options), change)


def of_linear_layers(model: nn.Module, lesson: Lesson, options: Options) -> Student:
    """A student in which every linear layer of the decoder layers changes."""
    layers, head = _with_lora(model, linear_layers(model), options), head_of(model)

    def losses(which_S: Tensor) -> Losses:
        ids_ST = lesson.ids_ST[which_S]
        if torch.is_grad_enabled():
            h_STD = base_of(model)(ids_ST.to(model.device), use_cache=False).last_hidden_state
        else:
            h_STD = final_states(model, ids_ST, batch_sequences=options.batch_sequences)
        return lesson.losses(h_STD, head, which_S, options)

    def change() -> dict[str, Tensor]:
        # W -> W + s B A; peft transposes the product where the weight is stored transposed
        return {f"{name}.weight": (layer.base_layer.weight.float() + layer.get_delta_weight("default")).detach().cpu()
                for name, layer in layers.items()}

    # the model's own dropout stays off
    return Student(nn.ModuleList(layers.values()), _trained(model), losses, change)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the decoder layers, stand-ins included."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()
              if isinstance(module, nn.Linear | Conv1D)}
    return [name for name, module in model.named_modules() if id(module) in inside]


def _with_lora(module: nn.Module, names: list[str], options: Options) -> dict[str, nn.Module]:
    """Add peft's LoRA to the layers with these names, and return them by name. The new weights are float32; A is random
    and B is zero."""
    from peft import LoraConfig, inject_adapter_in_model  # imported here, because the import takes seconds

    with warnings.catch_warnings():
        # peft finds out by itself which weights are stored transposed, and warns about it
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
                                           target_modules=names), module)
    layers = {name: module.get_submodule(name) for name in names}
    for layer in layers.values():
        for weight in layer.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return layers


def _trained(module: nn.Module) -> list[Tensor]:
    return [weight for weight in module.parameters() if weight.requires_grad]
