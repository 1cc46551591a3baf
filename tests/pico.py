"""Pico models of every family with their own tokenizer, made on the spot. Real models run through the same code."""
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdp_core.model import families

WORDS = ("the council met on monday and said that rain would reach the coast by night while farmers in the north "
         "asked for more water the minister told reporters she had seen the plan and would answer before winter"
         ).split()
_GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 64, "init_std": 0.2},
    "qwen3": {**_GATED, "head_dim": 8, "tie_word_embeddings": False},
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen2": {**_GATED, "tie_word_embeddings": False},
    "smollm3": {**_GATED, "no_rope_layers": [1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1]},
    "gemma2": {**_GATED, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0,
               "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GATED, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "olmo2": {**_GATED},
    "phi3": {**_GATED, "sliding_window": 8, "rms_norm_eps": 1e-6},
    "gpt_neox": {"intermediate_size": 64},
    "gpt2": {"n_inner": 64},
}
"""What the configuration of each family has beside the entries that all share. Mistral, Phi-3 and Gemma attend to a
window of 8 tokens, Gemma 2 in every second layer, Gemma 3 in five layers of six. Four layers of SmolLM3 know no
positions."""
EVERY = tuple(CONFIGS)
"""All families."""
FAMILIES = EVERY[:3]
"""Families for tests that take long: tied and untied heads, root-mean-square and layer norms, gated and plain MLPs."""
DIFFERENT = ("llama", "opt", "qwen3", "mistral", "gemma3_text")
"""Families for tests that write a model's parts out by name. The others differ from these in names, biases and how
matrices are fused and transposed, which tests of the records and the battery of the methods run for every family."""


def documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Reproducible pseudo-news: `count` one-line documents of `words` words with sentences of five to twelve."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        picks = [WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist()]
        text, start = [], 0
        while start < words:
            stop = start + int(torch.randint(5, 13, (1,), generator=generator))
            text.append(" ".join(picks[start:stop]).capitalize() + ".")
            start = stop
        made.append(" ".join(text))
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 entries, trained on the pico documents."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(documents(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def model(family: str, layers: int = 10, width: int = 32, seed: int = 0) -> torch.nn.Module:
    """An untrained model of `layers` decoder layers, float32, in eval mode; the same seed gives the same bits."""
    common = dict(vocab_size=384, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                  max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2)
    if family not in CONFIGS:
        raise ValueError(f"no pico model of family {family!r}; choose one of {', '.join(EVERY)}")
    record = families.FAMILIES[family]
    config = getattr(transformers, record.config_class)(**common, **CONFIGS[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, record.model_class)(config)
    return made.float().eval()


def save(folder: Path, family: str = "llama", **shape: int) -> Path:
    """A pico checkpoint folder (safetensors and tokenizer), as a user would have it locally."""
    model(family, **shape).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lively(made: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with norms and biases moved off their untrained 1 and 0, so that nothing passes by ignoring them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made
