"""Makes a pruned checkpoint from a plan and the dense checkpoint: layers are removed, stand-ins added, and tensors
replaced.

The module reads the files of the dense checkpoint one tensor at a time, and never builds the dense model. The kept
layers are renumbered without gaps. If the configuration has a list with one entry for each layer (`layer_types`, ...),
the entries of removed layers are deleted from it. If a plan only removes whole layers and replaces tensors, the
checkpoint has the model's own class. If a plan adds stand-ins, removes the attention or MLP of some layers, or changes
shapes, the checkpoint has a class of kdp_core.model.folded. The file that defines the class is written into the
checkpoint.
"""
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from kdp_core.base import provenance, store
from kdp_core.base.records import Plan, PrunedFacts
from kdp_core.model import checkpoints, folded, shards
from kdp_core.model.families import FAMILIES, Family, family_of, is_known, type_of
from kdp_core.model.sizes import count_params

LEFT_BEHIND = ("config.json", shards.INDEX, *provenance.ABOUT)
"""Files of the dense folder that are not copied, because `fold` writes new ones or because they describe only the dense
model."""


class FoldError(ValueError):
    """The plan does not fit the model."""


def fold(plan: Plan, dense: Path, out: Path, *, shard_size: str = "5GB",
         about: Mapping[str, Any] | None = None, shared: Path | None = None) -> PrunedFacts:
    """Write the pruned checkpoint to the folder `out` (atomic), load it once, and count its parameters.

    about: facts about how the checkpoint was made, which are written to the checkpoint's file kdp.json. Without `about`
        no kdp.json is written.
    shared: a folder through which checkpoints share equal layers (kdp_core.model.shards). Without `shared` each
        checkpoint has its own files.
    """
    dense, out = Path(dense), Path(out)
    config = checkpoints.config_of(dense)
    keep = _kept_layers(plan, config)
    with store.atomic(out) as temporary:
        temporary.mkdir()
        tensors, made = _tensors(plan, dense, family_of(config), keep), _config(plan, config, keep)
        if plan.shape:
            tensors = _of_shape(plan, tensors, made, keep)
        if shared is None:
            shards.write(tensors, temporary, shard_size)
        else:
            shards.write_shared(tensors, temporary, shared, family_of(config).prefix)
        made.save_pretrained(temporary)
        for path in sorted(dense.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name not in LEFT_BEHIND:
                shutil.copy(path, temporary / path.name)
        if _own_class(plan):
            (temporary / folded.FILE).write_text(folded.source(), encoding="utf-8")
        facts = _count(plan, config, keep, temporary, _zeroed(plan, dense))
        if about is not None:
            store.write_json(temporary / provenance.MADE, {**about, "pruned": facts._asdict()})
    return facts


def _kept_layers(plan: Plan, config: Any) -> list[int]:
    count, touched = config.num_hidden_layers, sorted(layer for layer, _ in plan.drop)
    dropped = sorted(layer for layer, part in plan.drop if part == "whole")
    if unknown := sorted({part for _, part in plan.drop} - {"whole", "attention", "mlp"}):
        raise FoldError(f"plan of {plan.method} removes {unknown[0]!r} of a layer; a part is whole, attention or mlp")
    if len(set(touched)) != len(touched) or any(not 0 <= layer < count for layer in touched):
        raise FoldError(f"plan of {plan.method} drops layers {touched}; "
                        f"the model has layers 0 to {count - 1}, each once (both parts of a layer: drop it whole)")
    if len(dropped) == count:
        raise FoldError(f"plan of {plan.method} drops all {count} layers; at least one must stay")
    if not is_known(config):
        raise FoldError(f"method {plan.method} cannot fold a {type_of(config)} model; choose a model of "
                        f"{', '.join(FAMILIES)}")
    if plan.shape and plan.modules:
        raise FoldError(f"plan of {plan.method} changes widths and also has stand-ins; a plan may do only one of these")
    if _parts(plan) and not family_of(config).norms_first(config):
        raise FoldError(f"method {plan.method} cannot drop attention or MLP of this {type_of(config)} model: its "
                        "norms follow the sum, so nothing passes unchanged; use a method that drops whole layers")
    for module in plan.modules:
        start, stop = module.block
        if not set(range(start, stop)) <= set(dropped):
            raise FoldError(f"stand-in of block {start}-{stop}: the plan does not drop all of its layers")
    for one, other in itertools.pairwise(sorted(module.block for module in plan.modules)):
        if other[0] < one[1]:
            raise FoldError(f"stand-ins of blocks {one[0]}-{one[1]} and {other[0]}-{other[1]} have layers in common")
    return [layer for layer in range(count) if layer not in set(dropped)]


def _parts(plan: Plan) -> list[tuple[int, str]]:
    """The attentions and MLPs that are removed from kept layers."""
    return sorted((layer, part) for layer, part in plan.drop if part != "whole")


def _own_class(plan: Plan) -> bool:
    """Whether the pruned model needs a folded class, because the family's own class cannot represent it."""
    return bool(plan.modules or _parts(plan) or plan.shape)


def _place(stop: int, keep: list[int]) -> tuple[int, bool]:
    """The place of a stand-in whose block ends before layer `stop` of the dense model: (number of a layer of the pruned
    model, whether the stand-in is after that layer)."""
    later = [new for new, old in enumerate(keep) if old >= stop]
    return (later[0], False) if later else (len(keep) - 1, True)


def _stand_ins(plan: Plan, keep: list[int]) -> list[tuple[dict[str, Any], str, dict[str, Tensor]]]:
    """For each stand-in: its entry in the configuration, its path below the layer list, and its tensors."""
    seen: dict[tuple[int, bool], int] = {}
    found = []
    for module in sorted(plan.modules, key=lambda module: module.block):
        layer, after = place = _place(module.block[1], keep)
        seen[place] = seen.get(place, -1) + 1
        entry = {"layer": layer, "after": after, "kind": module.kind, "options": module.options}
        found.append((entry, f"{layer}.{'stand_in_after' if after else 'stand_in'}.{seen[place]}.", module.tensors))
    return found


def _config(plan: Plan, config: PretrainedConfig, keep: list[int]) -> PretrainedConfig:
    """The configuration of the pruned model, with the per-layer lists of the kept layers, the class and the
    stand-ins."""
    count, config_class = config.num_hidden_layers, type(config)
    per_layer = family_of(config).per_layer
    cut = {key: [value[layer] for layer in keep] if key in per_layer and isinstance(value, list) else value
           for key, value in config.to_dict().items()}
    cut[family_of(config).names.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    # windows start at a layer number, which changes when layers are removed; layer_types lists the layers with a window
    if isinstance(cut.get("max_window_layers"), int):
        cut["max_window_layers"] = sum(layer < config.max_window_layers for layer in keep)
    if _own_class(plan):
        config_class, _ = folded.FOLDED[type_of(config)]
        cut |= {**folded.class_entries(family_of(config)),
                "stand_ins": [entry for entry, _, _ in _stand_ins(plan, keep)],
                "dropped_parts": {which: [keep.index(layer) for layer, part in _parts(plan) if part == which]
                                  for which in ("attention", "mlp")},
                **{key: [value[layer] for layer in keep] if isinstance(value, list) and len(value) == count else value
                   for key, value in (plan.shape or {}).items()}}
    return config_class.from_dict({key: value for key, value in cut.items() if key != "_name_or_path"})


def _tensors(plan: Plan, dense: Path, family: Family, keep: list[int]) -> dict[str, Tensor]:
    """The state dict of the pruned model: kept tensors under their new names, replaced tensors, and tensors of
    stand-ins."""
    prefix, number = family.prefix, {old: new for new, old in enumerate(keep)}
    removed = _part_prefixes(plan, prefix, family)
    made, replaced = {}, set()
    for path in sorted(dense.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name_in_file in sorted(file.keys()):
                name = family.in_files.get(name_in_file, name_in_file)
                new = _renamed(name, prefix, number)
                if new is not None and not name.startswith(removed):
                    made[new] = file.get_tensor(name_in_file)
                    if name in plan.tensors:
                        made[new] = _replacement(plan, name, made[new])
                        replaced.add(name)
    dtype = next(iter(made.values())).dtype
    if plan.shape:
        made |= {_renamed(name, prefix, number): tensor.to(dtype) if tensor.is_floating_point() else tensor
                 for name, tensor in sorted(plan.tensors.items()) if name not in replaced}
    elif unknown := sorted(set(plan.tensors) - replaced):
        raise FoldError(f"plan of {plan.method} replaces tensors that the pruned model lacks: {', '.join(unknown[:5])}")
    for _, path, tensors in _stand_ins(plan, keep):
        made |= {f"{prefix}{path}{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    return made


def _of_shape(plan: Plan, tensors: dict[str, Tensor], config: PretrainedConfig,
              keep: list[int]) -> dict[str, Tensor]:
    """The tensors that a model of the configuration `config` has. Dense tensors that the model of `config` does not
    have are removed."""
    shapes = {name: tensor.shape for name, tensor in checkpoints.on_meta(config).state_dict().items()}
    tied = {f"{family_of(config).head}.weight"} if config.tie_word_embeddings else set()
    if wrong := sorted(name for name, tensor in tensors.items() if shapes.get(name, tensor.shape) != tensor.shape):
        raise FoldError(f"plan of {plan.method} gives {wrong[0]} the shape {list(tensors[wrong[0]].shape)}; its model "
                        f"has {list(shapes[wrong[0]])}")
    prefix, number = family_of(config).prefix, {old: new for new, old in enumerate(keep)}
    if unknown := sorted(name for name in plan.tensors if _renamed(name, prefix, number) not in shapes):
        raise FoldError(f"plan of {plan.method} holds tensors that its model lacks: {', '.join(unknown[:5])}")
    if missing := sorted(set(shapes) - set(tensors) - tied):
        raise FoldError(f"plan of {plan.method} lacks tensors of its model: {', '.join(missing[:5])}")
    return {name: tensor for name, tensor in tensors.items() if name in shapes}


def _part_prefixes(plan: Plan, prefix: str, family: Family) -> tuple[str, ...]:
    """Prefixes of the names of all tensors that belong to removed parts."""
    return tuple(f"{prefix}{layer}.{name}." for layer, part in _parts(plan)
                 for name in (*family.parts[part].beside, family.parts[part].module))


def _replacement(plan: Plan, name: str, before: Tensor) -> Tensor:
    """The tensor with which the plan replaces a dense tensor, in the checkpoint's precision."""
    tensor = plan.tensors[name]
    if tensor.shape != before.shape and not plan.shape:
        raise FoldError(f"plan replaces {name}, of shape {list(before.shape)}, by one of shape {list(tensor.shape)}")
    return tensor.to(before.dtype)


def _renamed(name: str, prefix: str, number: dict[int, int]) -> str | None:
    """A tensor's name after renumbering; None for a tensor of a removed layer."""
    if not name.startswith(prefix):
        return name
    old, rest = name[len(prefix):].split(".", 1)
    return f"{prefix}{number[int(old)]}.{rest}" if int(old) in number else None


def _zeroed(plan: Plan, dense: Path) -> int:
    """Number of weights that are zero in the tensors of a sparse plan but not zero in the dense checkpoint."""
    found = 0
    for path in sorted(dense.glob("*.safetensors")) if plan.sparse else []:
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(plan.tensors) & set(file.keys())):
                found += int(((plan.tensors[name] == 0) & (file.get_tensor(name) != 0)).sum())
    return found


def _count(plan: Plan, config: Any, keep: list[int], folder: Path, zeroed: int) -> PrunedFacts:
    """Load the new checkpoint in the same way as users do, and count its parameters."""
    pruned = checkpoints.load_model(folder)
    before = count_params(checkpoints.on_meta(config))
    after = count_params(pruned)
    added = sum(parameter.numel() for name, parameter in pruned.named_parameters() if ".stand_in" in name)
    broken = [name for name, tensor in pruned.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise FoldError(f"{plan.method}: the folded model holds values that are not finite in {broken[0]}")
    blocks = [module.block for module in plan.modules] or _runs(
        sorted(layer for layer, part in plan.drop if part == "whole"))
    layers = config.num_hidden_layers
    return PrunedFacts(plan.method, layers, layers - len(keep), before, after, added, 1 - (after - zeroed) / before,
                       blocks, _parts(plan), zeroed)


def _runs(layers: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive layers as half-open pairs (start, stop)."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    stops = [layer + 1 for layer in layers if layer + 1 not in layers]
    return list(zip(starts, stops, strict=True))
