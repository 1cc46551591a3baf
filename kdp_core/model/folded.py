"""Folded Hugging Face models: a causal language model in which stand-in modules replace some of the layers.

A stand-in belongs to the layer after it. A stand-in maps the hidden state before its layer reads this state
(`stand_in`). After the last layer, a stand-in maps the output of the last layer (`stand_in_after`). So layers stay
consecutively numbered, per-layer lists of the configuration stay valid, and the KV cache of the base class is used. A
stand-in acts on each token separately, so it needs no cache. The configuration lists the stand-ins:
`stand_ins: [{layer, after, kind, options}]`.
If the output head of a model is tied to the embedding, the model may contain a low-rank adapter before the head
(`head_adapter`: rank). A layer may have no attention or no MLP, and then it also lacks the norms of this part
(`dropped_parts: {attention: [...], mlp: [...]}`). A layer may also have other numbers of heads and MLP channels
(`widths`: heads, kv_heads and intermediate of every layer). The size of a head stays the same, and `writer_bias: 1`
gives a bias to the maps that write to the state.
The states of a model may be sliced to smaller widths. Each state then has its own basis and width
(`sliced: {attention: [...], mlp: [...], final}`: the widths).
The rows of rare tokens in a tied embedding may have low rank (`rare_tokens: {frequent, rank}`).

A folded checkpoint contains a Python file that defines these classes without kdp. The configuration names this file in
`auto_map`, so that users can load the checkpoint with `trust_remote_code=True`. The file is made from the modules
SOURCES. If kdp_core is installed, importing this module registers the classes, and `trust_remote_code` is not needed.
"""
import ast
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kdp_core.model.families import FAMILIES, PREFIX, Family
from kdp_core.model.sliced import slice_widths
from kdp_core.model.surgery import attach, attach_head_adapter, drop_parts, narrow, reduce_rare

FILE = "modeling_kdp.py"
"""Name of the file in a checkpoint that defines the classes."""
SOURCES = ("families", "stand_ins", "surgery", "sliced", "folded")
"""Modules of kdp_core.model from which the file is made. Each module imports only from modules that come before it in
this list."""


def source() -> str:
    """The text of the file that defines the classes of a checkpoint. If this module is itself such a file of a
    checkpoint, the module's own text is returned."""
    here = Path(__file__)
    if here.name == FILE:
        return here.read_text(encoding="utf-8")
    return joined([here.with_name(f"{name}.py").read_text(encoding="utf-8") for name in SOURCES])


def joined(texts: list[str]) -> str:
    """Join several modules into one text: the docstring of the last module, all imports except those from kdp_core, and
    all bodies."""
    imports, bodies, doc = [], [], ""
    for text in texts:
        lines, tree = text.splitlines(), ast.parse(text)
        head = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports += [ast.unparse(node) for node in head if not ast.unparse(node).startswith("from kdp_core")]
        doc = "\n".join(lines[:tree.body[0].end_lineno])
        bodies.append("\n".join(lines[head[-1].end_lineno:]).strip())
    return "\n".join([doc, *dict.fromkeys(imports), "\n", "\n\n\n".join(bodies), ""])


def class_entries(family: Family) -> dict[str, Any]:
    """The entries of a configuration that state the names of a family's folded classes."""
    config_class, model_class = FOLDED[family.name]
    stem = Path(FILE).stem
    return {"model_type": config_class.model_type, "architectures": [model_class.__name__],
            "auto_map": {"AutoConfig": f"{stem}.{config_class.__name__}",
                         "AutoModelForCausalLM": f"{stem}.{model_class.__name__}"}}


def _folded(family: Family) -> tuple[type, type]:
    """Configuration class and model class of a folded family. Both are subclasses of the family's own classes, so that
    all other behaviour is inherited."""
    config_class, model_class = getattr(transformers, family.config_class), getattr(transformers, family.model_class)
    name = model_class.__name__.removesuffix("ForCausalLM")

    def __init__(self: nn.Module, config: Any) -> None:
        model_class.__init__(self, config)
        if config.widths:
            narrow(self, config.widths)
        if config.sliced:
            slice_widths(self, config.sliced)
        if config.rare_tokens:
            reduce_rare(self, **config.rare_tokens)
        drop_parts(self, config.dropped_parts)
        attach(self, config.stand_ins)
        if config.head_adapter:
            attach_head_adapter(self, config.head_adapter)

    def save_pretrained(self: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        model_class.save_pretrained(self, save_directory, *args, **kwargs)
        # auto_map in the configuration names this file, so a checkpoint that is saved again needs the file too
        Path(save_directory, FILE).write_text(source(), encoding="utf-8")

    folded_config = type(f"Folded{name}Config", (config_class,), {
        "model_type": PREFIX + family.name, "stand_ins": [], "dropped_parts": {}, "widths": [], "sliced": {},
        "rare_tokens": {}, "head_adapter": 0, "__module__": __name__})
    folded_model = type(f"Folded{name}ForCausalLM", (model_class,), {
        "config_class": folded_config, "__init__": __init__, "save_pretrained": save_pretrained, "__module__": __name__,
        "__doc__": f"{name} changed as its configuration says: stand-ins in the place of layers, layers without "
                   "attention or MLP or of other sizes, an adapter before the head, states of reduced width, rows of "
                   "rare tokens of low rank."})
    return folded_config, folded_model


FOLDED: dict[str, tuple[type, type]] = {name: _folded(family) for name, family in FAMILIES.items()}
"""Model type of a family -> configuration class and model class of its folded models."""
for _config_class, _model_class in FOLDED.values():
    globals()[_config_class.__name__], globals()[_model_class.__name__] = _config_class, _model_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)
