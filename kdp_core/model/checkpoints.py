"""Converts a dense model to plain Hugging Face safetensors, and loads dense and pruned models.

transformers is imported when a model, a tokenizer or a configuration is loaded, since its import takes seconds.
"""
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, pre_tokenizers

from kdp_core.base.provenance import without_place
from kdp_core.base.records import ModelFacts
from kdp_core.base.store import atomic
from kdp_core.model import gguf_file, shards
from kdp_core.model.assets import sha256_of
from kdp_core.model.families import decoder_layers, family_of, first_token, output_head, type_of
from kdp_core.model.gguf_once import parsed_once
from kdp_core.model.intake import (
    PICKLED,
    ModelError,
    check_config,
    check_folder,
    check_weight_files,
    is_pickled,
    licence_files,
    licence_of,
)
from kdp_core.model.sizes import count_macs, count_params

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
# torch raises this error for a file that contains more than tensors; this library does not import pickle
NOT_TENSORS = torch.serialization.pickle.UnpicklingError
MODEL = "AutoModelForCausalLM"
SPREAD = "balanced"
"""The device name that spreads the layers of a model over several devices; accelerate uses this name."""
JUNK = ("_model_name_or_path", "quantization_config")
"""Entries in the configuration of a converted GGUF file that are not true for the converted model."""
_REHEARSAL = ContextVar("rehearsal", default=False)


class Unread(Exception):
    """A rehearsal needs data that a rehearsal must not read: the weights of a model, a tokenizer, or stored states."""


@contextmanager
def rehearsal() -> Iterator[None]:
    """In a block `with rehearsal():`, `load_model` and `load_tokenizer` raise Unread. A function that is called in the
    block therefore checks its input, and stops when it loads a model or a tokenizer."""
    before = _REHEARSAL.set(True)
    try:
        yield
    finally:
        _REHEARSAL.reset(before)


def _unless_rehearsed() -> None:
    if _REHEARSAL.get():
        raise Unread


@parsed_once()
def convert(path: str | Path, out: str | Path, *, dtype: str, source: str,
            trust_remote_code: bool = False, shared: Path | None = None) -> ModelFacts:
    """Convert the checkpoint at `path` (GGUF file or checkpoint folder) to plain safetensors in the folder `out`.

    GGUF weights are dequantised. From pickled weights (pytorch_model*.bin) only the tensors are read. The returned
    facts contain `source`. If `source` is an absolute path, the facts contain only the last part of the path. Raises
    ModelError before the weights are loaded if the file format or the family cannot be used. Raises ModelError after
    loading if weights are missing or not finite. If the folder `shared` is given, each layer is written to a separate
    file. Pruned checkpoints share these files (shards.py).
    """
    path = Path(path)
    if path.is_dir():
        check_folder(path)
    where = _locate(path)
    where["trust_remote_code"] = trust_remote_code
    header = _header(path)
    config = _load(path, "AutoConfig", where)
    check_config(_entries(config, header), path)
    if header is not None:
        gguf_file.complete(header, config)
    tokenizer = _load(path, "AutoTokenizer", where)
    if header is not None:
        _repair_gguf(tokenizer, header)
    logger.info("loading %s as %s", path.name, dtype)
    model, info = _load(path, MODEL, where, config=config, dtype=torch_dtype(dtype), output_loading_info=True)
    _check_weights(path, model, info, header)
    _warn_of_vocabulary(path, model, tokenizer)
    _make_plain(model, tokenizer)
    begin_with(tokenizer, first_token(model))
    with atomic(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if shared is not None:
            shards.share(temporary, shared, family_of(model).prefix)
        for file in licence_files(path) if path.is_dir() else []:
            shutil.copy(file, temporary / file.name)
    licence = licence_of(path) if header is None else str(header.fields.get("general.license", ""))
    return facts(model, source=without_place(source), sha256=sha256_of(path), licence=licence)


def load_model(folder: str | Path, *, device: str = "cpu", dtype: str = "float32",
               trust_remote_code: bool = False) -> "PreTrainedModel":
    """The dense or pruned model of a safetensors folder, in eval mode. Weights are read directly to the device.

    `balanced` spreads the layers evenly over all GPUs of this machine. Layers that do not fit are stored in main
    memory, and the remaining layers stay in the checkpoint on disk. `balanced:0=70GiB,cpu=200GiB` limits the memory of
    the named places, GPU 0 and main memory. Then a GPU or main memory without a limit is not used.
    """
    _unless_rehearsed()
    place = resolve_device(device)
    more = {"dtype": torch_dtype(dtype), "trust_remote_code": trust_remote_code}
    if _is_spread(device):
        return _load_spread(Path(folder), device, more).eval()
    where = _locate(Path(folder))
    return _load(Path(folder), MODEL, where, device_map={"": place}, **more).eval()


def _is_spread(device: str) -> bool:
    return device.split(":")[0] == SPREAD


def _load_spread(folder: Path, device: str, more: dict[str, Any]) -> "PreTrainedModel":
    # weights that stay on disk are read from the checkpoint each time, so they need no other folder
    model = _load(folder, MODEL, _locate(folder), device_map=SPREAD, max_memory=_limits(device), **more)
    if model.get_input_embeddings().weight.is_meta:
        raise ModelError(f"{folder}: device {device!r} has no room for the embedding; raise the model's max_memory")
    logger.info("%s is spread over %s", folder, ", ".join(places(model)))
    return model


def places(model: "PreTrainedModel") -> list[str]:
    """The places of a model's weights, with the number of parts in each place: `cuda:0 (20)`, `cpu (2)`, `disk (4)`."""
    parts = getattr(model, "hf_device_map", {"": model.device})
    counts = Counter(f"cuda:{place}" if isinstance(place, int) else str(place) for place in parts.values())
    return [f"{place} ({count})" for place, count in counts.items()]


def _limits(device: str) -> dict[int | str, str] | None:
    """The argument `max_memory` of accelerate; None means all free memory."""
    given = device.partition(":")[2]
    pairs = [pair.split("=") for pair in given.split(",")] if given else []
    if any(len(pair) != 2 or not (pair[0] == "cpu" or pair[0].isdigit()) for pair in pairs):
        raise ModelError(f"device {device!r} is unknown; write balanced, or balanced:0=70GiB,cpu=200GiB")
    return {int(place) if place.isdigit() else place: size for place, size in pairs} or None


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder."""
    _unless_rehearsed()
    return _load(Path(folder), "AutoTokenizer", {"pretrained_model_name_or_path": folder},
                 trust_remote_code=trust_remote_code)


def begin_with(tokenizer: "PreTrainedTokenizerBase", start: int | None) -> None:
    """Make the tokenizer add the first token that the family needs, if the tokenizer does not add this token yet.

    The tokenizer then adds this token for lm-eval, `kdp generate` and users of the checkpoint too.
    """
    if start is not None and start == tokenizer.bos_token_id and tokenizer("a")["input_ids"][:1] != [start]:
        tokenizer.add_bos_token = True


def resolve_device(name: str) -> torch.device:
    """The torch device with the name `cpu`, `cuda`, `cuda:1` or `auto` (cuda if the machine has a GPU). Raises
    ModelError if this machine lacks the device.

    For `balanced` the result is the device of the first layers, which is cuda if the machine has a GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if _is_spread(name):
        if missing := [place for place in _limits(name) or {} if isinstance(place, int) and place >= count]:
            raise ModelError(f"device {name!r} names GPU {missing[0]}, which is not here (CUDA devices: {count}); "
                             "correct the model's max_memory")
        name = "auto"
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown; write cpu, cuda, cuda:N, auto or balanced") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ModelError(f"device {name!r} is not here (CUDA devices: {count}); write cpu, cuda, cuda:N, auto or "
                         "balanced")
    return device


def torch_dtype(name: str) -> torch.dtype:
    """torch's data type for the name `float32`, `bfloat16` or `float16`."""
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _auto(kind: str) -> Any:
    """Register the folded models in transformers, and return the class of transformers with the name `kind`.

    transformers is imported here, because the import takes seconds and most stages load no model.
    """
    import transformers

    from kdp_core.model import folded  # noqa: F401

    return getattr(transformers, kind)


def config_of(folder: str | Path) -> "PretrainedConfig":
    """The configuration of a checkpoint folder, dense or pruned."""
    return _auto("AutoConfig").from_pretrained(folder)


def on_meta(config: "PretrainedConfig") -> "PreTrainedModel":
    """The model of a configuration, without memory for its weights, so that the parameters of a model of any size can
    be counted."""
    with torch.device("meta"):
        return _auto(MODEL).from_config(config)


def facts(model: "PreTrainedModel", *, source: str, sha256: str, licence: str = "") -> ModelFacts:
    """The facts about a model that later stages need. A model on the meta device is enough, because its parameters are
    only counted."""
    layers = decoder_layers(model)
    return ModelFacts(
        family=type_of(model), layers=len(layers), width=model.config.hidden_size,
        vocabulary=model.get_input_embeddings().weight.shape[0], params_total=count_params(model),
        params_per_layer=[count_params(layer) for layer in layers], macs_per_token=count_macs(model),
        source=source, sha256=sha256, licence=licence)


def _locate(path: Path) -> dict[str, Any]:
    """The arguments by which transformers finds the checkpoint. Raises ModelError for a file format that cannot be
    used."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path} does not exist; correct the model's source")
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if not path.is_dir():
        raise ModelError(f"{path} is neither a checkpoint folder nor a .gguf file; correct the model's source")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; name the folder that holds config.json, weights and tokenizer")
    check_weight_files(path)
    return {"pretrained_model_name_or_path": path, "use_safetensors": not is_pickled(path), "weights_only": True}


def _header(path: Path) -> gguf_file.Header | None:
    """The checked header of a GGUF file; None for a folder."""
    if path.suffix != ".gguf":
        return None
    header = gguf_file.read(path)
    gguf_file.check(header)
    return header


def _entries(config: "PretrainedConfig", header: gguf_file.Header | None) -> dict[str, Any]:
    """A configuration's entries. For a GGUF file the entry about quantised weights is excluded, since these weights are
    dequantised."""
    return {key: value for key, value in config.to_dict().items() if header is None or key not in JUNK}


def _load(path: Path, kind: str, where: dict[str, Any], **more: Any) -> Any:
    """Call `from_pretrained` of the class `kind` of transformers. Errors are raised as ModelError, with a message of
    one sentence.

    `where` may contain arguments that the class does not accept; this function does not pass them to the class.
    """
    if kind != MODEL:
        where = {key: value for key, value in where.items() if key not in ("use_safetensors", "weights_only")}
    try:
        return _auto(kind).from_pretrained(**where, **more)
    except NOT_TENSORS as error:
        raise ModelError(f"{path}: {PICKLED} holds more than tensors, or is damaged, and nothing else is read; convert "
                         "it to safetensors, or use a revision with safetensors") from error
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}: {kind} cannot load it ({shorten(str(error), 300)}); get a complete copy "
                         "of the checkpoint, or choose another checkpoint") from error


def _check_weights(path: Path, model: "PreTrainedModel", info: dict[str, Any],
                   header: gguf_file.Header | None) -> None:
    missing = sorted(info["missing_keys"])  # transformers fills missing weights with random numbers and only warns
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} tensors, the first {missing[0]}; get a complete copy "
                         "of the checkpoint")
    if header is not None and (unused := gguf_file.unused_tensors(header, model)):
        raise ModelError(f"{path} holds {len(unused)} tensors that a {type_of(model)} model has no place for, the "
                         f"first {unused[0]}; use the original safetensors checkpoint")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: NaN or infinite weights in {name} (as {tensor.dtype}); get the "
                             "checkpoint again or choose a dtype of wider range")


def _warn_of_vocabulary(path: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Warn of tokenizer entries that have no row in the embedding, such as an added padding token. If a text contains
    the id of such a tokenizer entry, a later stage raises an error."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        first = min((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)[1]
        logger.warning("%s: the tokenizer has %d entries and the model %d embedding rows; texts that give an entry "
                       "beyond them, such as %s, will be refused", path, len(tokenizer), rows, first)


def _make_plain(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Remove the entries that refer to the original file, so that an ordinary full-precision checkpoint is saved."""
    model.hf_quantizer, model.is_quantized = None, False
    # after adapters are merged, the flag still says that the head is tied (huggingface/transformers#45127)
    model.config.tie_word_embeddings = output_head(model).weight is model.get_input_embeddings().weight
    for name in JUNK:
        model.config.__dict__.pop(name, None)
    for name in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
        tokenizer.init_kwargs.pop(name, None)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # LLaMA-2 was published with sampling options but without do_sample; transformers refuses to save such options
        model.generation_config.do_sample = True


def _repair_gguf(tokenizer: "PreTrainedTokenizerBase", header: gguf_file.Header) -> None:
    """Correct three errors that transformers 5 makes when it reads the tokenizer of a GGUF file.

    A tokenizer without an unknown token, such as LLaMA-3's, gets an entry <|endoftext|> beyond the vocabulary. SmolLM
    splits digits before its byte-level BPE. A GGUF file states this split of digits only by the name of the
    pre-tokenizer, which transformers does not read. If a file does not state whether a text begins with the token for
    the beginning of a text, the kind of its tokenizer decides.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < header.vocabulary]
    backend = Tokenizer.from_str(json.dumps(state))
    if header.fields.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                         backend.pre_tokenizer])
    tokenizer._tokenizer = backend
    if tokenizer.bos_token is not None:
        tokenizer.add_bos_token = gguf_file.adds_first_token(header)
