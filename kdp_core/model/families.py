"""Model families: everything that the library must know of an architecture stands in one record of FAMILIES.

A family is named by transformers' model type, such as `llama`. Its record says where layers, embeddings and norms lie
in the module and in the state dict, what each part of a layer (attention, MLP) reads and writes, and how the entries of
the configuration are named. No other module names a model type.

This module imports neither torch nor transformers, so that sizes can be computed from a configuration file alone.
"""
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

PREFIX = "kdp_"
"""The model type of a folded model is this prefix and the model type of its family."""
HEADS, KV_HEADS, CHANNELS = "heads", "kv_heads", "intermediate"
"""What the rows of a reader are: query heads, key-value heads, or channels of the MLP."""
WRITER_BIAS = "writer_bias"
"""Entry of a layer's widths that is 1 if its writers have biases, whatever the configuration says of the family."""


class FamilyError(ValueError):
    """A model of a family that has no record."""


class Part(NamedTuple):
    """The attention or the MLP of a decoder layer; all names are paths below the layer."""
    module: str
    """The module whose output is added to the state, by way of `norm_after` where there is one."""
    norm: str
    """The norm through which the part reads the state."""
    readers: Mapping[str, tuple[str, ...]]
    """Linear maps that read the normed state -> kinds of their rows, in order; a fused map has several kinds."""
    writer: str
    """The linear map that writes what is added; its columns are the heads or channels of the part."""
    norm_after: str = ""
    """The norm between the module's output and the state; empty where the output is added as it is."""
    reader_bias: str | bool = False
    """Whether the readers have biases, or the entry of the configuration that says so."""
    writer_bias: str | bool = False

    @property
    def beside(self) -> tuple[str, ...]:
        """Submodules that are removed together with `module`: norms, and readers that lie outside it."""
        outside = [name for name in self.readers if not name.startswith(f"{self.module}.")]
        return (*filter(None, (self.norm, self.norm_after)), *outside)


class Family(NamedTuple):
    """One architecture."""
    name: str
    """transformers' model type."""
    config_class: str
    """Name of the class in transformers; it is imported where it is needed."""
    model_class: str
    parts: Mapping[str, Part]
    """The parts `attention` and `mlp`, in the order in which a layer runs them."""
    trunk: str = "model"
    """Path to the module that holds embeddings, decoder layers and final norm; it begins with the base model."""
    layers: str = "layers"
    """Name of the list of decoder layers below the trunk."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Embeddings below the trunk that are added up to state 0, the tokens' first."""
    final_norm: str = "norm"
    """Name of the norm after the last layer, below the trunk."""
    head: str = "lm_head"
    """Path to the output head."""
    norm: str = "rms"
    """How norms scale a state: `rms` (root mean square) or `layer` (mean-free layer norm)."""
    gain_offset: float = 0.0
    """What a norm adds to its weight before it multiplies by it; Gemma's norms multiply by 1 + weight."""
    gated: bool = True
    """Whether the MLP is down(act(gate x) * up x); otherwise it is out(act(in x))."""
    parallel: bool = False
    """Whether attention and MLP read the same state, so that there is no state between them."""
    head_norms: bool = False
    """Whether queries and keys pass a norm over each head."""
    names: Mapping[str, str] = {}
    """Entries of the configuration under another name than LLaMA's, by LLaMA's name."""
    defaults: Mapping[str, Any] = {}
    """Entries that a config.json may leave out, with the default of the configuration class, by LLaMA's name."""
    extra_positions: int | None = None
    """Rows of a learned embedding of positions beyond `max_position_embeddings`; None where there is no such table."""
    pre_norm: str = ""
    """Entry that is false where norms follow the sum, as in OPT-350M; empty where norms always come first."""
    embedding_width: str = ""
    """Entry that holds the width of the token embedding where it may differ from the states'."""
    lacks_final_norm: str = ""
    """Entry that is true where the final norm is missing; empty where it never is."""
    norm_affine: str = ""
    """Entry that is false where norms have neither gain nor bias."""
    project_out: str = ""
    """Name below the trunk of the map from the last state to the width of the embedding, where a model has one."""
    soft_cap: str = ""
    """Entry that holds the soft cap of the logits."""
    needs_bos: bool = False
    """Whether a sequence must begin with the token for that. Gemma 3 270M has a perplexity of 14 with it on a paragraph
    of news, and of 156 without it, the first eight tokens left out."""

    @property
    def prefix(self) -> str:
        """Where the decoder layers stand in a state dict, such as `model.layers.`."""
        return f"{self.trunk}.{self.layers}."

    @property
    def mean_free(self) -> bool:
        """Whether norms subtract the mean of a state, so that nothing reads it."""
        return self.norm == "layer"

    @property
    def norms_after(self) -> bool:
        """Whether a norm follows a part of a layer."""
        return any(part.norm_after for part in self.parts.values())

    def entry(self, config: Any, name: str) -> Any:
        """An entry of a configuration (object) by LLaMA's name."""
        return getattr(config, self.names.get(name, name))

    def norms_first(self, config: Any) -> bool:
        """Whether norms come before the parts, so that a state passes every part unchanged."""
        return not self.pre_norm or bool(getattr(config, self.pre_norm))

    def one_width(self, config: Any) -> bool:
        """Whether the embedding, every state and the head have one width, and a final norm stands before the head."""
        same = not self.embedding_width or getattr(config, self.embedding_width) == config.hidden_size
        return same and not (self.lacks_final_norm and getattr(config, self.lacks_final_norm))


def _attention(writer: str, norm: str, norm_after: str = "", bias: str | bool = False) -> Part:
    rows = {"self_attn.q_proj": (HEADS,), "self_attn.k_proj": (KV_HEADS,), "self_attn.v_proj": (KV_HEADS,)}
    return Part("self_attn", norm, rows, writer, norm_after, bias, bias)


def _gated(norm: str, norm_after: str = "", bias: str | bool = False) -> Part:
    rows = {"mlp.gate_proj": (CHANNELS,), "mlp.up_proj": (CHANNELS,)}
    return Part("mlp", norm, rows, "mlp.down_proj", norm_after, bias, bias)


_RECORDS = (
    Family("llama", "LlamaConfig", "LlamaForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", bias="attention_bias"),
            "mlp": _gated("post_attention_layernorm", bias="mlp_bias")},
           defaults={"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}),
    Family("mistral", "MistralConfig", "MistralForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm"), "mlp": _gated("post_attention_layernorm")},
           defaults={"tie_word_embeddings": False, "num_key_value_heads": 8}),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", bias="attention_bias"),
            "mlp": _gated("post_attention_layernorm")},
           head_norms=True,
           defaults={"tie_word_embeddings": False, "attention_bias": False, "num_key_value_heads": 32,
                     "head_dim": 128}),
    Family("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", "post_attention_layernorm",
                                    "attention_bias"),
            "mlp": _gated("pre_feedforward_layernorm", "post_feedforward_layernorm")},
           gain_offset=1.0, head_norms=True, soft_cap="final_logit_softcapping", needs_bos=True,
           names={"hidden_act": "hidden_activation"},
           defaults={"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 4, "head_dim": 256}),
    Family("opt", "OPTConfig", "OPTForCausalLM",
           {"attention": _attention("self_attn.out_proj", "self_attn_layer_norm", bias="enable_bias"),
            "mlp": Part("fc2", "final_layer_norm", {"fc1": (CHANNELS,)}, "fc2", "", "enable_bias", "enable_bias")},
           trunk="model.decoder", embeddings=("embed_tokens", "embed_positions"), final_norm="final_layer_norm",
           norm="layer", gated=False, names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
           extra_positions=2, pre_norm="do_layer_norm_before", embedding_width="word_embed_proj_dim",
           lacks_final_norm="_remove_final_layer_norm", norm_affine="layer_norm_elementwise_affine",
           project_out="project_out",
           defaults={"tie_word_embeddings": True, "enable_bias": True, "max_position_embeddings": 2048}),
)
FAMILIES: dict[str, Family] = {record.name: record for record in _RECORDS}
"""Every family that can be pruned, by transformers' model type."""


# The family of a model ------------------------------------------------------------------------------------------------

def type_of(model: Any) -> str:
    """transformers' model type of a model or of a configuration (object or mapping); a string is one itself."""
    if isinstance(model, str):
        return model
    if isinstance(model, Mapping):
        return str(model.get("model_type", ""))
    return getattr(model, "config", model).model_type


def is_known(model: Any) -> bool:
    """Whether a model (what `type_of` takes) is of a family that has a record, and is not folded."""
    return type_of(model) in FAMILIES


def family_of(model: Any) -> Family:
    """The record of the family of a dense or folded model (what `type_of` takes); FamilyError where it has none."""
    name = type_of(model).removeprefix(PREFIX)
    if name not in FAMILIES:
        raise FamilyError(f"family {name!r} is not supported; choose a model of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def first_token(model: Any) -> int | None:
    """The id that every sequence of a model (or configuration) begins with; None where a text's own comes first."""
    config = getattr(model, "config", model)
    return config.bos_token_id if family_of(config).needs_bos else None


# Where things lie in a model (a causal language model of transformers) ------------------------------------------------

def base_of(model: Any) -> Any:
    """The model without its output head."""
    return getattr(model, family_of(model).trunk.split(".")[0])


def trunk(model: Any) -> Any:
    """The module that holds embeddings, decoder layers and final norm."""
    return attrgetter(family_of(model).trunk)(model)


def decoder_layers(model: Any) -> Any:
    """The decoder layers, an nn.ModuleList."""
    return getattr(trunk(model), family_of(model).layers)


def final_norm(model: Any) -> Any:
    """The norm after the last layer; None where the model lacks it."""
    return getattr(trunk(model), family_of(model).final_norm)


def output_head(model: Any) -> Any:
    """The output head, an nn.Linear."""
    return attrgetter(family_of(model).head)(model)


def activation_of(model: Any) -> str:
    """Name of the activation of a model's MLPs, as transformers knows it."""
    return family_of(model).entry(model.config, "hidden_act")


def norm_of(layer: Any, family: Family, part: str) -> Any:
    """The norm through which a part of a decoder layer reads the state."""
    return layer.get_submodule(family.parts[part].norm)
