"""The model for the GPU table, with random weights, and the functions that time runs on its device."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdp_core.base.records import Block, Tokens
from kdp_core.states import hidden
from stage import made_up
from stage.timing import Times, in_turns, products, turns_of_products


class Shape(NamedTuple):
    """The sizes of a model and of its measurement."""
    config: dict[str, Any]
    sequences: int
    """Number of sequences over which all states are extracted; the blocks are fitted on these states."""
    length: int
    cka_tokens: int
    features: int
    hidden: int
    entries: int
    products: int
    """Number of rows of the square matrices whose products give the limit."""
    steps: int
    """Space of the static cache for tokens after the prompt; all timed runs together decode fewer tokens."""


SHAPES = {
    "llama2-7b": Shape(dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                            vocab_size=32000), 512, 128, 8192, 1024, 1600, 96, 8192, 32),
    "tiny": Shape(dict(hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
                       vocab_size=256), 16, 16, 64, 16, 16, 4, 64, 16),
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
BATCH = {"cuda": 32, "cpu": 4}


def blocks_of(config: LlamaConfig) -> list[Block]:
    """Blocks of two layers each; all blocks together contain a quarter of all layers.

    With these blocks folded, LLaMA-2-7B has 23 % fewer parameters; this number includes the parameters of the
    stand-ins.
    """
    layers = config.num_hidden_layers
    return made_up.spread_blocks(layers, count=layers // 8)


class Bench:
    """The model on its device, and the methods that time runs on this device."""

    def __init__(self, shape: Shape, device: str, folder: Path) -> None:
        self.shape, self.device, self.folder = shape, device, folder
        self.kind = torch.device(device).type
        self.dtype, self.batch = DTYPES[self.kind], BATCH[self.kind]
        self.config = LlamaConfig(**shape.config, max_position_embeddings=4096)
        with self.place():
            self.model = LlamaForCausalLM(self.config).eval()
        ids_ST = torch.randint(shape.config["vocab_size"], (shape.sequences, shape.length),
                               generator=torch.Generator().manual_seed(0))
        self.tokens = Tokens(ids_ST, ["made up"] * len(ids_ST), {})
        self.blocks = blocks_of(self.config)
        self.states: hidden.HiddenStates | None = None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Within the `with` block, new models are made on the device and in the precision of this device."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                yield
        finally:
            torch.set_default_dtype(before)

    def synced(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that calls `run` and returns only when the device has finished its work."""
        def whole() -> Any:
            found = run()
            if self.kind == "cuda":
                torch.cuda.synchronize()
            return found

        return whole

    def in_turns(self, runs: dict[str, Callable[[], Any]], repeats: int = 3) -> Times:
        """Time the runs as `stage.timing.in_turns` does. Each run ends only when the device has finished its work."""
        return in_turns({name: self.synced(run) for name, run in runs.items()}, repeats)

    def limit(self, dtype: torch.dtype | None = None) -> Callable[[], None]:
        """A run of products of square matrices, in the model's precision or in the given precision."""
        return products(dtype or self.dtype, size=self.shape.products, device=self.device)

    def turns(self, flops: float) -> float:
        """The number of runs of `limit` that together have this number of operations."""
        return turns_of_products(flops, self.shape.products)
