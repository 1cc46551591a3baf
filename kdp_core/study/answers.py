"""What the dense and the pruned models write after a prompt: each model continues the prompt with its most likely
tokens.

A score tells how much of the dense model was kept. A few lines of text show the reader what was kept. The texts are
greedy continuations, so chance has no effect on them. In greedy continuations a small model repeats itself, even if it
is not pruned. The texts are examples and not a measurement.
"""
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdp_core.base import options
from kdp_core.base.measurements import Answers
from kdp_core.base.options import Count
from kdp_core.model import checkpoints

logger = logging.getLogger(__name__)


class AnswerError(ValueError):
    """There is no prompt, or a prompt is empty."""


def answers(folders: Mapping[str, Path], *, prompts: list[str], tokens: Count = 40, device: str = "cpu",
            dtype: str = "float32") -> Answers:
    """The continuations of the prompts by each checkpoint in `folders`; the keys of `folders` are the names of the
    models.

    prompts: texts to continue.
    tokens: largest number of tokens in a continuation.
    Raises AnswerError if there is no prompt, or if a prompt is empty.
    """
    options.check(answers, locals())
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise AnswerError(f"prompts are {prompts!r}; give at least one, and at least one word in each")
    rows: list[dict[str, Any]] = []
    for name, folder in folders.items():
        rows.append({"name": name, "texts": continuations(folder, prompts, tokens, device, dtype)})
        logger.info("%s has answered %d prompts", name, len(prompts))
    return Answers(list(prompts), tokens, rows)


@torch.inference_mode()
def continuations(folder: Path, prompts: list[str], tokens: int, device: str, dtype: str) -> list[str]:
    """The greedy continuation of each prompt by one checkpoint, without the prompt itself."""
    model, reader = checkpoints.load_model(folder, device=device, dtype=dtype), checkpoints.load_tokenizer(folder)
    texts = []
    for prompt in prompts:
        ids_1T = reader(prompt, return_tensors="pt")["input_ids"].to(model.device)
        made_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens,
                                 do_sample=False, pad_token_id=reader.eos_token_id)
        texts.append(reader.decode(made_1T[0, ids_1T.shape[1]:], skip_special_tokens=True))
    return texts
