"""Model families: one record of FAMILIES contains everything that the library must know about an architecture.

A family is named by transformers' model type, such as `llama`. A family's record contains the paths of layers,
embeddings and norms in the module and in the state dict. A record also states which modules of a layer's parts
(attention, MLP) read the state, and which modules write to it. Another field maps LLaMA's names of configuration
entries to the family's names. The names of model types, such as `llama`, occur in no other module.

This module imports neither torch nor transformers, so that sizes can be computed from a configuration file alone.
"""
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

PREFIX = "kdp_"
"""The model type of a folded model is this prefix, followed by the model type of its family."""
HEADS, KV_HEADS, CHANNELS = "heads", "kv_heads", "intermediate"
"""The kinds of output rows of a reader matrix: query heads, key-value heads, or channels of the MLP."""
WRITER_BIAS = "writer_bias"
"""Entry in the widths of a layer. With the value 1, the layer's writer matrices have biases, even if the writers of the
family have no biases."""
TRIPLES = "triples"
"""Kind of the rows of a fused reader that are grouped by heads: query, key and value of the first head, then query, key
and value of the second head, and so on."""


class FamilyError(ValueError):
    """The model belongs to a family that has no record."""


class Part(NamedTuple):
    """The attention or the MLP of a decoder layer; all names are paths below the layer."""
    module: str
    """The module whose output is added to the state, after `norm_after` if the part has this norm."""
    norm: str
    """The norm through which the part reads the state; empty if the part reads the state directly."""
    readers: Mapping[str, tuple[str, ...]]
    """Linear maps that read the normed state -> kinds of the rows in the map's output, in order. The rows of a fused
    map have several kinds."""
    writer: str
    """The linear map whose output is added to the state. Each column of this map belongs to one head or to one channel
    of the part."""
    norm_after: str = ""
    """The norm between the module's output and the state; empty if there is no such norm."""
    reader_bias: str | bool = False
    """Whether the readers have biases; or the name of the entry of the configuration that states this."""
    writer_bias: str | bool = False

    @property
    def beside(self) -> tuple[str, ...]:
        """Submodules that are removed together with `module`: norms, and readers outside `module`."""
        outside = [name for name in self.readers if not name.startswith(f"{self.module}.")]
        return (*filter(None, (self.norm, self.norm_after)), *outside)


class Family(NamedTuple):
    """One architecture."""
    name: str
    """transformers' model type."""
    config_class: str
    """Name of the configuration class in transformers. The class is imported only when it is needed."""
    model_class: str
    parts: Mapping[str, Part]
    """The parts `attention` and `mlp`, in the order in which a layer runs them."""
    trunk: str = "model"
    """Path to the module that holds embeddings, decoder layers and final norm. The path begins with the base model."""
    layers: str = "layers"
    """Name of the list of decoder layers below the trunk."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Paths of embeddings below the trunk; the sum of their outputs is state 0. The embedding of tokens comes first."""
    final_norm: str = "norm"
    """Name of the norm after the last layer, below the trunk."""
    head: str = "lm_head"
    """Path to the output head."""
    norm: str = "rms"
    """How norms scale a state: `rms` (root mean square) or `layer` (mean-free layer norm)."""
    gain_offset: float = 0.0
    """Number that a norm adds to its weight before the norm multiplies the state. Gemma's norms multiply by 1 +
    weight."""
    gated: bool = True
    """Whether the MLP is gated: down(act(gate x) * up x). An MLP that is not gated is out(act(in x))."""
    parallel: bool = False
    """Whether attention and MLP read the same state, so that there is no state between them."""
    head_norms: str = ""
    """The norm of queries and keys: `each` normalises every head separately, `all` normalises all heads as one vector;
    empty if there is no such norm."""
    transposed: bool = False
    """Whether linear maps of the layers store their matrix as (inputs, outputs), as GPT-2's linear maps do."""
    names: Mapping[str, str] = {}
    """Names of configuration entries that differ from LLaMA's: LLaMA's name -> the family's name."""
    defaults: Mapping[str, Any] = {}
    """Defaults of the configuration class for entries that a config.json may omit, by LLaMA's name."""
    extra_positions: int | None = None
    """Number of rows of the position embedding beyond `max_position_embeddings`; None for a family without learned
    positions."""
    pre_norm: str = ""
    """Entry that is false if a norm is applied to the sum of the state and a part's output, as in OPT-350M. Empty for a
    family that never applies a norm to this sum."""
    embedding_width: str = ""
    """Entry that contains the width of the token embedding, if this width may differ from the width of the states."""
    lacks_final_norm: str = ""
    """Entry that is true if a model has no final norm; empty if every model of the family has a final norm."""
    norm_affine: str = ""
    """Entry that is false if the norms have no gain and no bias."""
    project_out: str = ""
    """Name, below the trunk, of the map from the last state to the width of the embedding; not every model of the
    family has this map."""
    soft_cap: str = ""
    """Entry that contains the soft cap of the logits."""
    needs_bos: bool = False
    """Whether a sequence must begin with the token for the beginning of a text. On a paragraph of news, Gemma 3 270M
    has a perplexity of 14 if the text begins with this token, and of 156 if it does not. Both perplexities exclude the
    first eight tokens."""
    per_layer: tuple[str, ...] = ("layer_types",)
    """Entries that are lists with a value for each layer. A list may be longer than the number of layers."""
    fixed_width: bool = False
    """Whether transformers' code assumes that the last state has the same width as the first."""
    only: Mapping[str, Any] = {}
    """Entries that must have a certain value -> this value. A model with another value cannot be pruned."""
    in_files: Mapping[str, str] = {}
    """Tensors whose names in checkpoint files differ from the names in the module: name in the file -> name in the
    module."""
    gguf: str = ""
    """llama.cpp's name of the architecture; empty if this library cannot write models of the family as GGUF files."""

    @property
    def prefix(self) -> str:
        """Prefix of the decoder layers' names in a state dict, such as `model.layers.`."""
        return f"{self.trunk}.{self.layers}."

    @property
    def mean_free(self) -> bool:
        """Whether the family's norms subtract the mean of a state. The parts then read states without their mean."""
        return self.norm == "layer"

    @property
    def reads(self) -> str:
        """The kind of the norm before an MLP: `rms`, `layer`, or `none` if no norm comes before the MLP."""
        return self.norm if self.parts["mlp"].norm else "none"

    @property
    def norms_after(self) -> bool:
        """Whether the family has norms after the parts of a layer."""
        return any(part.norm_after for part in self.parts.values())

    def entry(self, config: Any, name: str) -> Any:
        """An entry of a configuration (object) by LLaMA's name."""
        return getattr(config, self.names.get(name, name))

    def norms_first(self, config: Any) -> bool:
        """Whether norms come before the parts. If norms come before the parts, a part only adds its output to the
        state."""
        return not self.pre_norm or bool(getattr(config, self.pre_norm))

    def one_width(self, config: Any) -> bool:
        """Whether the embedding, every state and the head have the same width, and whether the model has a final
        norm."""
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
           gguf="llama", defaults={"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}),
    Family("mistral", "MistralConfig", "MistralForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm"), "mlp": _gated("post_attention_layernorm")},
           defaults={"tie_word_embeddings": False, "num_key_value_heads": 8}),
    Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", bias="attention_bias"),
            "mlp": _gated("post_attention_layernorm")},
           head_norms="each",
           defaults={"tie_word_embeddings": False, "attention_bias": False, "num_key_value_heads": 32,
                     "head_dim": 128}),
    Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm")._replace(reader_bias=True),
            "mlp": _gated("post_attention_layernorm")},
           defaults={"tie_word_embeddings": False, "num_key_value_heads": 32}),
    Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", bias="attention_bias"),
            "mlp": _gated("post_attention_layernorm", bias="mlp_bias")},
           per_layer=("layer_types", "no_rope_layers"),
           defaults={"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
                     "num_key_value_heads": 4}),
    Family("gemma2", "Gemma2Config", "Gemma2ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", "post_attention_layernorm",
                                    "attention_bias"),
            "mlp": _gated("pre_feedforward_layernorm", "post_feedforward_layernorm")},
           gain_offset=1.0, soft_cap="final_logit_softcapping", needs_bos=True,
           names={"hidden_act": "hidden_activation"},
           defaults={"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 4, "head_dim": 256}),
    Family("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "input_layernorm", "post_attention_layernorm",
                                    "attention_bias"),
            "mlp": _gated("pre_feedforward_layernorm", "post_feedforward_layernorm")},
           gain_offset=1.0, head_norms="each", soft_cap="final_logit_softcapping", needs_bos=True,
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
    Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM",
           {"attention": _attention("self_attn.o_proj", "", "post_attention_layernorm", "attention_bias"),
            "mlp": _gated("", "post_feedforward_layernorm")},
           head_norms="all", defaults={"tie_word_embeddings": False, "attention_bias": False}),
    Family("phi3", "Phi3Config", "Phi3ForCausalLM",
           {"attention": Part("self_attn", "input_layernorm", {"self_attn.qkv_proj": (HEADS, KV_HEADS, KV_HEADS)},
                              "self_attn.o_proj"),
            "mlp": Part("mlp", "post_attention_layernorm", {"mlp.gate_up_proj": (CHANNELS, CHANNELS)},
                        "mlp.down_proj")},
           defaults={"tie_word_embeddings": False}),
    Family("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM",
           {"attention": Part("attention", "input_layernorm", {"attention.query_key_value": (TRIPLES,)},
                              "attention.dense", "", "attention_bias", "attention_bias"),
            "mlp": Part("mlp", "post_attention_layernorm", {"mlp.dense_h_to_4h": (CHANNELS,)}, "mlp.dense_4h_to_h", "",
                        True, True)},
           trunk="gpt_neox", embeddings=("embed_in",), final_norm="final_layer_norm", norm="layer", gated=False,
           parallel=True, only={"use_parallel_residual": True}, in_files={"embed_out.weight": "lm_head.weight"},
           defaults={"tie_word_embeddings": False, "attention_bias": True}),
    Family("gpt2", "GPT2Config", "GPT2LMHeadModel",
           {"attention": Part("attn", "ln_1", {"attn.c_attn": (HEADS, KV_HEADS, KV_HEADS)}, "attn.c_proj", "", True,
                              True),
            "mlp": Part("mlp", "ln_2", {"mlp.c_fc": (CHANNELS,)}, "mlp.c_proj", "", True, True)},
           trunk="transformer", layers="h", embeddings=("wte", "wpe"), final_norm="ln_f", norm="layer", gated=False,
           transposed=True, extra_positions=0, fixed_width=True,
           # with other values a layer depends on its number, or also reads the output of an encoder
           only={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
           names={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                  "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
                  "hidden_act": "activation_function"},
           defaults={"tie_word_embeddings": True, "max_position_embeddings": 1024}),
)
FAMILIES: dict[str, Family] = {record.name: record for record in _RECORDS}
"""Every family that can be pruned, by transformers' model type."""


# The family of a model ------------------------------------------------------------------------------------------------

def type_of(model: Any) -> str:
    """transformers' model type of a model or of a configuration (object or mapping). A string is returned as it is."""
    if isinstance(model, str):
        return model
    if isinstance(model, Mapping):
        return str(model.get("model_type", ""))
    return getattr(model, "config", model).model_type


def is_known(model: Any) -> bool:
    """Whether a model is not folded and belongs to a family that has a record. `model` is any argument of `type_of`."""
    return type_of(model) in FAMILIES


def family_of(model: Any) -> Family:
    """The record of the family of a dense or folded model (any argument of `type_of`). Raises FamilyError if the family
    has no record."""
    name = type_of(model).removeprefix(PREFIX)
    if name not in FAMILIES:
        raise FamilyError(f"family {name!r} is not supported; choose a model of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def first_token(model: Any) -> int | None:
    """The token id with which every sequence of a model (or configuration) must begin; None if any token may be
    first."""
    config = getattr(model, "config", model)
    return config.bos_token_id if family_of(config).needs_bos else None


# Where modules are in a model (a causal language model of transformers) -----------------------------------------------

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
    """The norm after the last layer; None if the model has no such norm."""
    return getattr(trunk(model), family_of(model).final_norm)


def output_head(model: Any) -> Any:
    """The output head, an nn.Linear."""
    return attrgetter(family_of(model).head)(model)


def activation_of(model: Any) -> str:
    """Name of the activation function of a model's MLPs, as in transformers."""
    return family_of(model).entry(model.config, "hidden_act")


def norm_of(layer: Any, family: Family, part: str) -> Any:
    """The norm through which a part of a decoder layer reads the state; None if the part reads the state directly."""
    name = family.parts[part].norm
    return layer.get_submodule(name) if name else None


def entrance(layer: Any, family: Family, part: str) -> Any:
    """The module through which a part reads the state: the part's norm, or the attention or MLP itself if the part has
    no norm."""
    return layer.get_submodule(family.parts[part].norm or family.parts[part].module)


# Linear maps: nn.Linear, or transformers' Conv1D, which GPT-2 has and which holds its matrix transposed ---------------

def is_linear(module: Any) -> bool:
    """Whether a module is a linear map."""
    return hasattr(module, "in_features") or hasattr(module, "nx")


def matrix(linear: Any) -> Any:
    """The matrix (outputs, inputs) of a linear map, a view of its weight."""
    return linear.weight.T if hasattr(linear, "nx") else linear.weight


def as_weight(linear: Any, w_RC: Any) -> Any:
    """A matrix (outputs, inputs) in the layout in which this linear map stores its weight."""
    return w_RC.T.contiguous() if hasattr(linear, "nx") else w_RC
