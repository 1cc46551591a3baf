"""Folded Hugging Face models: a causal language model some of whose layers gave way to stand-in modules.

A stand-in belongs to the layer that follows it: it maps the hidden state before that layer reads it (`stand_in`), or,
after the last layer, what that layer returns (`stand_in_after`). So layers stay consecutively numbered, every
per-layer list of the configuration fits, the KV cache is the base class's own, and a stand-in, which acts on each
token by itself, needs no cache. Stand-ins are named in the configuration: `stand_ins: [{layer, after, kind, options}]`.
A model whose output head is tied to its embedding may hold a low-rank adapter before the head (`head_adapter`: rank).
A layer may lack its attention or its MLP, norms included (`dropped_parts: {attention: [...], mlp: [...]}`), or have
them in sizes of its own (`widths`: heads, kv_heads and intermediate of every layer; the size of a head stays).
The states may be sliced, each in a basis of its own (`sliced: {attention: [...], mlp: [...], final}`: their widths).

This file imports torch and transformers only: fold copies it into a checkpoint, where `auto_map` lets users without
kdp load it (`trust_remote_code=True`); with kdp_core imported the classes are registered and no such trust is needed.
"""
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

PREFIX = "kdp_"
FILE = "modeling_kdp.py"
"""Name of this file in a checkpoint."""
FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
}


class StandIn(nn.Module):
    """What takes the place of a block: a map of each token's state, which massive-activation tokens may bypass."""

    def __init__(self, bypass_above: float | None) -> None:
        super().__init__()
        self.bypass_above = bypass_above

    def forward(self, h: Tensor) -> Tensor:
        mapped = self.map(h)
        if self.bypass_above is None:
            return mapped
        return torch.where(h.float().norm(dim=-1, keepdim=True) > self.bypass_above, h, mapped)


class RffMlp(StandIn):
    """KDP's folded block: random Fourier features, linear, activation, linear.

    h -> W2 act(W1 (cos(Omega' x + b), sin(Omega' x + b)) + b1) + b2, x the lift's input made of h. The operators
    A_k .. A_1 and 1/sqrt(m) are multiplied into W1, alpha into W2 and b2 (kdp_core.methods.kdp.inverse.to_module).
    """

    def __init__(self, width: int, frequencies: int, hidden: int, activation: str, lift_input: str,
                 bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.lift_input = lift_input
        self.omega = nn.Parameter(torch.zeros(frequencies, width))
        self.phase = nn.Parameter(torch.zeros(frequencies))
        self.w1 = nn.Linear(2 * frequencies, hidden)
        self.w2 = nn.Linear(hidden, width)
        self.act = ACT2FN[activation]
        self.macs_per_token = width * frequencies + 2 * frequencies * hidden + hidden * width

    def map(self, h: Tensor) -> Tensor:
        # phases are angles of many turns: float32 whatever the model's precision
        x = rms_scale(h.float()) if self.lift_input == "rms" else h.float()
        angle = functional.linear(x, self.omega.float(), self.phase.float())
        z = torch.cat((angle.cos(), angle.sin()), dim=-1).to(h.dtype)
        return self.w2(self.act(self.w1(z)))


class Affine(StandIn):
    """h -> W h + b, for linear maps in the original space."""

    def __init__(self, width: int, bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.map = nn.Linear(width, width)
        self.macs_per_token = width * width


class Residual(StandIn):
    """h -> h + W x + b + O f(V x + c), x the state normalised token by token: a linear part, a dictionary, a skip path.

    The dictionary f decides what V holds: `glu`, gated neurons act(V_1 x) * (V_2 x); `mlp`, plain neurons act(V x);
    `rff`, random Fourier features cos(V x + c). Without entries only the linear part is left.
    """

    def __init__(self, width: int, entries: int, dictionary: str, activation: str, norm: str,
                 bypass_above: float | None = None) -> None:
        super().__init__(bypass_above)
        self.dictionary, self.norm, self.entries = dictionary, norm, entries
        self.linear = nn.Linear(width, width)
        self.act = ACT2FN[activation]
        rows = entries * (2 if dictionary == "glu" else 1)
        if entries:
            self.inner = nn.Linear(width, rows)
            self.outer = nn.Linear(entries, width, bias=False)
        self.macs_per_token = width * (width + rows + entries)

    def map(self, h: Tensor) -> Tensor:
        x = normalised(h.float(), self.norm).to(h.dtype)
        step = self.linear(x)
        return h + (step + self.outer(self.features(x)) if self.entries else step)

    def features(self, x: Tensor) -> Tensor:
        """The dictionary's entries, (..., entries), of normalised states."""
        inner = self.inner(x)
        if self.dictionary == "rff":
            return inner.cos()
        if self.dictionary == "mlp":
            return self.act(inner)
        gate, up = inner.chunk(2, dim=-1)
        return self.act(gate) * up


class LowRank(nn.Module):
    """h -> h + B A h: a change of the logits that leaves a tied embedding alone; 2 r D parameters."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, rank, bias=False)
        self.b = nn.Linear(rank, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.b(self.a(h))

    def before(self, head: nn.Module, args: tuple) -> tuple:
        """Hook of the output head; a bound method, so that a copied model runs its own copy."""
        return (self(args[0]), *args[1:])


class NoAttention(nn.Module):
    """In the place of a dropped attention: nothing is added to the state.

    The cache gets one number a token in the place of keys and values, so that its lengths, from which positions and
    masks are made, hold whichever layer they are asked of.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None,
                **kwargs: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            token_B1T1 = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(token_B1T1, token_B1T1, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """In the place of a dropped MLP: nothing is added to the state."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


_PARTS = {"attention": (("input_layernorm",), "self_attn"), "mlp": (("post_attention_layernorm",), "mlp")}
PARTS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "llama": _PARTS, "mistral": _PARTS, "qwen3": _PARTS,
    "gemma3_text": {"attention": (("input_layernorm", "post_attention_layernorm"), "self_attn"),
                    "mlp": (("pre_feedforward_layernorm", "post_feedforward_layernorm"), "mlp")},
    "opt": {"attention": (("self_attn_layer_norm",), "self_attn"), "mlp": (("final_layer_norm", "fc1"), "fc2")},
}
"""Family -> part -> (submodules of a layer that go with it, the one whose output is added to the state)."""

_COUPLED = {"attention": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
            "mlp": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")}
COUPLED: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3_text"), _COUPLED),
    "opt": {"attention": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
            "mlp": (("fc1",), "fc2")},
}
"""Family -> part -> (linear maps of a layer whose rows are its heads or channels, the one whose columns are)."""

MODULES: dict[str, type[nn.Module]] = {"rff_mlp": RffMlp, "affine": Affine, "residual": Residual}


def rms_scale(h: Tensor) -> Tensor:
    """h divided by its root mean square over the last axis, float32 in and out; a zero state stays zero."""
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True).clamp_min(1e-12))


def normalised(h: Tensor, norm: str) -> Tensor:
    """States as the family's norm leaves them, before its gain and bias: `rms` or `layer` (mean-free), float32."""
    return rms_scale(h - h.mean(dim=-1, keepdim=True) if norm == "layer" else h)


def trunk(model: nn.Module) -> nn.Module:
    """What holds embedding, decoder layers and final norm of a causal language model."""
    base = model.model
    return base.decoder if hasattr(base, "decoder") else base


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever the family calls their container."""
    return trunk(model).layers


def layers_prefix(family: str) -> str:
    """Where the decoder layers stand in a state dict of this family, such as `model.layers.`."""
    return "model.decoder.layers." if family.removeprefix(PREFIX) == "opt" else "model.layers."


def _before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (layer.stand_in(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": layer.stand_in(kwargs["hidden_states"])}


def _after(layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):
        return (layer.stand_in_after(output[0]), *output[1:])
    return layer.stand_in_after(output)


def attach(model: nn.Module, stand_ins: list[dict[str, Any]]) -> None:
    """Give layers their stand-ins, as configurations name them; weights are left for the checkpoint to fill.

    Stand-ins of one place follow each other in the order given: neighbouring blocks may both have been folded.
    """
    layers = decoder_layers(model)
    for entry in stand_ins:
        layer, name = layers[entry["layer"]], "stand_in_after" if entry["after"] else "stand_in"
        if not hasattr(layer, name):
            setattr(layer, name, nn.Sequential())
            if entry["after"]:
                layer.register_forward_hook(_after)
            else:
                layer.register_forward_pre_hook(_before, with_kwargs=True)
        getattr(layer, name).append(MODULES[entry["kind"]](**entry["options"]))


def drop_parts(model: nn.Module, family: str, dropped: dict[str, list[int]]) -> None:
    """Take attention or MLP out of layers, as configurations name them; the residual stream passes unchanged."""
    layers = decoder_layers(model)
    for part, numbers in dropped.items():
        beside, adding = PARTS[family][part]
        for number in numbers:
            for name in beside:
                setattr(layers[number], name, nn.Identity())
            setattr(layers[number], adding, NoAttention(number) if part == "attention" else NoMlp())


def narrow(model: nn.Module, family: str, widths: list[dict[str, int]]) -> None:
    """Give every layer the heads and MLP channels that configurations name; weights are left for the checkpoint."""
    for layer, sizes in zip(decoder_layers(model), widths, strict=True):
        attention, heads, kv_heads = layer.self_attn, sizes["heads"], sizes["kv_heads"]
        for part, (inner, outer) in COUPLED[family].items():
            size = heads * attention.head_dim if part == "attention" else sizes["intermediate"]
            for name in inner:
                shared = name.endswith(("k_proj", "v_proj"))
                _resize(layer, name, rows=kv_heads * attention.head_dim if shared else size)
            _resize(layer, outer, columns=size)
        # what the families call their counts: OPT the first, the others the second
        for name, count in (("num_heads", heads), ("num_key_value_groups", heads // kv_heads)):
            if hasattr(attention, name):
                setattr(attention, name, count)


def _resize(layer: nn.Module, name: str, rows: int | None = None, columns: int | None = None) -> None:
    """Another linear map in the place of one, the same but for its size."""
    old = layer.get_submodule(name)
    layer.set_submodule(name, nn.Linear(columns or old.in_features, rows or old.out_features, old.bias is not None,
                                        device=old.weight.device, dtype=old.weight.dtype))


def attach_head_adapter(model: nn.Module, rank: int) -> None:
    """Put an adapter of this rank before the output head; weights are left for the checkpoint to fill."""
    model.head_adapter = LowRank(model.lm_head.in_features, rank)
    model.lm_head.register_forward_pre_hook(model.head_adapter.before)


# States of reduced width (SliceGPT) -----------------------------------------------------------------------------------

class SlicedNorm(nn.Module):
    """h over its root mean square, the mean over the width before slicing; its gain is in the matrices that read it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, h: Tensor) -> Tensor:
        x = h.float()
        return (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / self.width + self.eps)).to(h.dtype)


class SlicedLayer:
    """Over a family's decoder layer: before a part adds to the state, the state goes over to the basis it writes in."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states
        for part in ("attention", "mlp"):
            added = part_output(self, self.family, part, h, **kwargs)
            added = functional.dropout(added, getattr(self, "dropout", 0.0), self.training)
            h = getattr(self, f"{part}_shortcut")(h) + added
        return h


def norm_of(layer: nn.Module, family: str, part: str) -> nn.Module:
    """The norm through which a part reads the state."""
    return getattr(layer, PARTS[family][part][0][0])


def part_output(layer: nn.Module, family: str, part: str, h: Tensor, **kwargs: Any) -> Tensor:
    """What the attention or the MLP of a pre-norm layer adds to the state; `kwargs` are the layer's own."""
    x = norm_of(layer, family, part)(h)
    if part == "attention":
        return layer.self_attn(hidden_states=x, **kwargs)[0]
    return layer.fc2(layer.activation_fn(layer.fc1(x))) if family == "opt" else layer.mlp(x)


def final_norm(model: nn.Module) -> str:
    """Name of the last norm in the trunk."""
    return "final_layer_norm" if hasattr(trunk(model), "final_layer_norm") else "norm"


def slice_widths(model: nn.Module, family: str, sliced: dict[str, Any]) -> None:
    """Build the model with states of these widths: those that the parts of each layer read, and the final one."""
    base, width = trunk(model), model.config.hidden_size
    states = [*sliced["attention"], sliced["final"]]
    for layer, into, middle, out in zip(base.layers, states[:-1], sliced["mlp"], states[1:], strict=True):
        for part, reads, writes in (("attention", into, middle), ("mlp", middle, out)):
            readers, writer = COUPLED[family][part]
            for name in readers:
                _of_width(layer.get_submodule(name), columns=reads, bias=_biased(norm_of(layer, family, part)))
            _of_width(layer.get_submodule(writer), rows=writes)
            _without_gain(layer, PARTS[family][part][0][0], width)
            setattr(layer, f"{part}_shortcut", nn.Linear(reads, writes, bias=False))
        # still one of its family by class and name: transformers records its states and never splits it over devices
        layer.__class__, layer.family = type(type(layer).__name__, (SlicedLayer, type(layer)), {}), family
    for name in ("embed_tokens", "embed_positions"):
        if hasattr(base, name):
            _of_width(getattr(base, name), columns=states[0])
    _of_width(model.lm_head, columns=states[-1], bias=_biased(getattr(base, final_norm(model))))
    _without_gain(base, final_norm(model), width)


def _biased(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def _without_gain(owner: nn.Module, name: str, width: int) -> None:
    norm = getattr(owner, name)
    setattr(owner, name, SlicedNorm(width, norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon))


def _of_width(module: nn.Linear | nn.Embedding, rows: int | None = None, columns: int | None = None,
            bias: bool = False) -> None:
    """Other widths, all weights zero until the checkpoint fills them."""
    shape = (rows or module.weight.shape[0], columns or module.weight.shape[1])
    module.weight = nn.Parameter(module.weight.new_zeros(shape))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
        return
    module.out_features, module.in_features = shape
    if bias or module.bias is not None:
        module.bias = nn.Parameter(module.weight.new_zeros(shape[0]))


def names_of(family: str) -> dict[str, Any]:
    """What the configuration of a folded model says of its class; `family` with or without the prefix."""
    config_class, model_class = FOLDED[family.removeprefix(PREFIX)]
    return {"model_type": config_class.model_type, "architectures": [model_class.__name__],
            "auto_map": {"AutoConfig": f"{Path(FILE).stem}.{config_class.__name__}",
                         "AutoModelForCausalLM": f"{Path(FILE).stem}.{model_class.__name__}"}}


def _folded(family: str, config_class: type, model_class: type) -> tuple[type, type]:
    """Configuration and model class of a folded family; ordinary subclasses, so everything else is inherited."""
    name = model_class.__name__.removesuffix("ForCausalLM")

    def __init__(self: nn.Module, config: Any) -> None:
        model_class.__init__(self, config)
        if config.widths:
            narrow(self, family, config.widths)
        if config.sliced:
            slice_widths(self, family, config.sliced)
        drop_parts(self, family, config.dropped_parts)
        attach(self, config.stand_ins)
        if config.head_adapter:
            attach_head_adapter(self, config.head_adapter)

    def save_pretrained(self: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        model_class.save_pretrained(self, save_directory, *args, **kwargs)
        # the configuration's auto_map names this file, so a checkpoint saved anew needs it too
        shutil.copy(__file__, Path(save_directory) / FILE)

    folded_config = type(f"Folded{name}Config", (config_class,), {
        "model_type": PREFIX + family, "stand_ins": [], "dropped_parts": {}, "widths": [], "sliced": {},
        "head_adapter": 0, "__module__": __name__})
    folded_model = type(f"Folded{name}ForCausalLM", (model_class,), {
        "config_class": folded_config, "__init__": __init__, "save_pretrained": save_pretrained, "__module__": __name__,
        "__doc__": f"{name} with stand-ins for dropped layers, layers without attention or MLP or in other sizes, an "
                   "adapter before its head, states of reduced width: as its configuration says."})
    return folded_config, folded_model


FOLDED: dict[str, tuple[type, type]] = {family: _folded(family, *classes) for family, classes in FAMILIES.items()}
for _config_class, _model_class in FOLDED.values():
    globals()[_config_class.__name__], globals()[_model_class.__name__] = _config_class, _model_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)
