"""A stock checkpoint is written as a GGUF file, and the reader of such files gives its logits and tokens back."""
import json

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints
from kdp_core.model.gguf_export import SPLITS, ExportError, export
from kdp_core.prune.fold import fold
from tests import pico

IDS_ST = torch.arange(2, 26).view(2, 12)
TEXT = "The council met 12 times; rain's here, won't stop."
LINEAR = {"rope_theta": 5e4, "rope_type": "linear", "factor": 2.0}
META = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}


def saved(folder, family="llama", split=None, dtype=torch.float32, **entries):
    """A pico checkpoint with other entries in its configuration, and another way to split text."""
    model, reader = pico.model(family, layers=6), pico.tokenizer()
    if entries:
        config = type(model.config)(**{**model.config.to_dict(), **entries})
        torch.manual_seed(0)
        model = type(model)(config)
    if split is not None:
        reader._tokenizer.pre_tokenizer = split
    pico.lively(model).to(dtype).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def logits(folder, dtype="float32"):
    with torch.no_grad():
        return checkpoints.load_model(folder, dtype=dtype)(IDS_ST).logits


@pytest.mark.parametrize("entries", [{}, {"tie_word_embeddings": False}, {"rope_parameters": LINEAR},
                                     {"rope_parameters": META}, {"head_dim": 16}, {"attention_bias": True},
                                     {"mlp_bias": True}], ids=lambda entries: next(iter(entries.values()), "plain"))
def test_what_is_written_is_read_back(tmp_path, entries):
    dense = saved(tmp_path / "dense", **entries)
    fold(Plan("m", [(2, "whole"), (3, "whole")], [], {}), dense, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "pruned.gguf")
    checkpoints.convert(tmp_path / "pruned.gguf", tmp_path / "back", dtype="float32", source="made")
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "pruned"))
    one, other = (checkpoints.load_tokenizer(tmp_path / name) for name in ("pruned", "back"))
    assert one(TEXT)["input_ids"] == other(TEXT)["input_ids"] and one.eos_token_id == other.eos_token_id


def test_the_precision_of_the_checkpoint_is_kept(tmp_path):
    dense = saved(tmp_path / "dense", dtype=torch.bfloat16)
    export(dense, tmp_path / "dense.gguf")
    full = saved(tmp_path / "full")
    export(full, tmp_path / "full.gguf")
    assert (tmp_path / "dense.gguf").stat().st_size < 0.6 * (tmp_path / "full.gguf").stat().st_size
    checkpoints.convert(tmp_path / "dense.gguf", tmp_path / "back", dtype="bfloat16", source="made")
    assert torch.equal(logits(tmp_path / "back"), logits(dense))


@pytest.mark.parametrize("split", [
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                             pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    *(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]) for words in SPLITS),
], ids=["smollm", *SPLITS.values()])
def test_a_tokenizer_splits_text_as_before(tmp_path, split):
    dense = saved(tmp_path / "dense", split=split)
    export(dense, tmp_path / "dense.gguf")
    checkpoints.convert(tmp_path / "dense.gguf", tmp_path / "back", dtype="float32", source="made")
    one, other = (checkpoints.load_tokenizer(folder) for folder in (dense, tmp_path / "back"))
    assert one(TEXT)["input_ids"] == other(TEXT)["input_ids"]


@pytest.mark.parametrize("change, words", [
    (lambda folder: saved(folder, "qwen3"), "is a qwen3 model, whose GGUF form is not written here"),
    (lambda folder: saved(folder, split=pre_tokenizers.Whitespace()), r"splits text \(Whitespace\)"),
    (lambda folder: saved(folder, rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}),
     "scales its positions by dynamic"),
])
def test_what_cannot_be_carried_is_refused_with_a_remedy(tmp_path, change, words):
    folder = change(tmp_path / "dense")
    with pytest.raises(ExportError, match=words) as error:
        export(folder, tmp_path / "out.gguf")
    assert "convert_hf_to_gguf.py" in str(error.value) and not (tmp_path / "out.gguf").exists()


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    dense = saved(tmp_path / "dense")
    stand_in = Module((2, 4), "affine", {"width": 32, "bypass_above": None},
                      {"map.weight": torch.eye(32), "map.bias": torch.zeros(32)})
    fold(Plan("m", [(2, "whole"), (3, "whole")], [stand_in], {}), dense, tmp_path / "pruned")
    assert "auto_map" in json.loads((tmp_path / "pruned/config.json").read_text())
    with pytest.raises(ExportError, match=r"llama\.cpp knows no such model"):
        export(tmp_path / "pruned", tmp_path / "out.gguf")
