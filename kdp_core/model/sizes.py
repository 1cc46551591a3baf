"""The size of a model: its numbers of parameters and multiply-adds, counted in a module or computed from a
configuration alone.

Tied parameters count once; the KDP paper (ICLR 2026) does not say how it counts tied parameters. The paper's "FLOPs"
(Table 10) are the multiply-adds of the linear layers for 128 tokens. The output head is included; embeddings and
attention scores are excluded. These counts agree with the paper's counts for dense models in every digit: LLaMA-2-7B
845.71 G, 13B 1645.01 G.

This module imports torch only to count a module. So a workflow can call `params_of` without waiting for the import of
torch.
"""
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdp_core.model.families import CHANNELS, HEADS, KV_HEADS, TRIPLES, Family, Part, family_of, is_linear

if TYPE_CHECKING:
    from torch import nn


def count_params(module: "nn.Module") -> int:
    """All parameters of a module. Tied parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def part_params(layer: "nn.Module", family: Family, part: str) -> int:
    """Number of parameters that are removed with the attention or the MLP of a layer, including the norms of this
    part."""
    own = family.parts[part]
    return sum(count_params(layer.get_submodule(name)) for name in (*own.beside, own.module))


def count_macs(module: "nn.Module") -> int:
    """Multiply-adds for one token: the sum of in * out over all linear maps. A tied output head is included.

    If a module has an attribute `macs_per_token`, the value of this attribute is used, and the submodules are not
    counted.
    """
    own = getattr(module, "macs_per_token", None)
    if own is not None:
        return int(own)
    if is_linear(module):
        return module.weight.numel()
    return sum(count_macs(child) for child in module.children())


def params_of(config: Mapping[str, Any]) -> int:
    """Number of parameters of the dense model that a config.json describes, computed by arithmetic. Tied parameters
    count once.

    `count_params` gives the same number for the model of this configuration. For a missing entry the default of the
    family is used. Raises FamilyError for a family without a record, and KeyError if a size is missing.
    """
    config = {**config, **config.get("text_config", {})}
    family = family_of(config)
    D, V = _width(config, family), config["vocab_size"]
    # if the embedding is narrower than the states, one projection follows the embedding and one comes before the head
    W = config.get(family.embedding_width) or D
    projections = 0 if W == D else 2 * W * D
    positions = 0 if family.extra_positions is None else \
        (_entry(config, family, "max_position_embeddings") + family.extra_positions) * D
    head = 0 if _entry(config, family, "tie_word_embeddings") else V * W
    return (V * W + projections + positions + _size(config, family, "num_hidden_layers") * _layer_params(config, family)
            + _final_norm_params(config, family) + head)


def shape_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the states and number of layers of the model that a config.json describes."""
    config = {**config, **config.get("text_config", {})}
    family = family_of(config)
    return _width(config, family), _size(config, family, "num_hidden_layers")


def positions_of(config: Mapping[str, Any]) -> int:
    """Largest number of tokens that the model of a config.json can read; 0 if the file does not state this number."""
    config = {**config, **config.get("text_config", {})}
    return _entry(config, family_of(config), "max_position_embeddings") or 0


def learns_positions(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json has a table of learned positions. A model with such a table cannot read
    positions beyond the table."""
    return family_of({**config, **config.get("text_config", {})}).extra_positions is not None


def _entry(config: Mapping[str, Any], family: Family, name: str) -> Any:
    """An entry by LLaMA's name, or the family's default if the entry is missing."""
    return config.get(family.names.get(name, name), family.defaults.get(name))


def _size(config: Mapping[str, Any], family: Family, name: str) -> int:
    """A size that every configuration must state, by LLaMA's name. Raises KeyError if the size is missing."""
    return config[family.names.get(name, name)]


def _width(config: Mapping[str, Any], family: Family) -> int:
    return _size(config, family, "hidden_size")


def _layer_params(config: Mapping[str, Any], family: Family) -> int:
    """Parameters of one decoder layer."""
    heads, D = _size(config, family, "num_attention_heads"), _width(config, family)
    length = _entry(config, family, "head_dim") or D // heads
    kv_heads = _entry(config, family, "num_key_value_heads") or heads
    # in GPT-2 this entry may be empty, which means four times the width
    inner = _entry(config, family, "intermediate_size") or 4 * D
    rows = {HEADS: heads * length, KV_HEADS: kv_heads * length, TRIPLES: 3 * heads * length, CHANNELS: inner}
    parts = sum(_part_params(config, family, part, rows) for part in family.parts.values())
    # queries and keys have one norm each, with the size of one head (shared by all heads) or of all heads together
    return parts + {"": 0, "each": 2 * length, "all": (heads + kv_heads) * length}[family.head_norms]


def _part_params(config: Mapping[str, Any], family: Family, part: Part, rows: dict[str, int]) -> int:
    """Number of parameters of the attention or the MLP of a layer, with the norms of this part."""
    D = _width(config, family)
    read = sum(rows[kind] for kinds in part.readers.values() for kind in kinds)
    columns = rows[HEADS if part is family.parts["attention"] else CHANNELS]
    norms = sum(_norm_params(config, family) for name in (part.norm, part.norm_after) if name)
    return (read * (D + _flag(config, family, part.reader_bias)) + columns * D
            + D * _flag(config, family, part.writer_bias) + norms)


def _flag(config: Mapping[str, Any], family: Family, flag: str | bool) -> bool:
    """Whether a bias exists. `flag` is the answer itself, or the name of the configuration entry that contains the
    answer."""
    return flag if isinstance(flag, bool) else bool(_entry(config, family, flag))


def _norm_params(config: Mapping[str, Any], family: Family) -> int:
    """Number of parameters of a norm over the states: the gain, and in a layer norm also the bias."""
    affine = not family.norm_affine or config.get(family.norm_affine, True)
    return _width(config, family) * (2 if family.mean_free else 1) if affine else 0


def _final_norm_params(config: Mapping[str, Any], family: Family) -> int:
    missing = bool(family.lacks_final_norm and config.get(family.lacks_final_norm))
    follows = bool(family.pre_norm and not config.get(family.pre_norm, True))
    return 0 if missing or follows else _norm_params(config, family)
