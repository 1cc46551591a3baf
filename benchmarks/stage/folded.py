"""Measures the speed-up by a folded block and by pruned models, and compares it with the saved multiply-adds.

A folded block is compared with the two layers that it replaces. The folded block is measured with two hidden widths:
the default of 1,024, and the model's width of 576. The first matrix of the folded block already contains the product of
all operators, as in a checkpoint that `fold` writes. The two layers run as in the model, with a cache in decoding. In
the pruned models, folded blocks with random weights replace a fifth of the layers, because speed does not depend on the
weights. All ratios are the dense model's time or multiply-adds divided by the pruned model's.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_macs
from stage import made_up
from stage.setup import Setup
from stage.timing import Row, figure, in_turns

STEPS = 16
"""Number of tokens that are decoded in one timed run."""
HISTORY = 1024
"""Number of tokens of a long prompt. The multiply-adds of the attention over these tokens are not counted."""


@torch.inference_mode()
def measure(setup: Setup) -> list[Row]:
    """Measure the block alone and the whole model; further rows use a static cache and torch.compile."""
    rows = [row for hidden in (1024, setup.facts.width) for row in blocks(setup, hidden)]
    return [*rows, *models(setup), *([] if setup.quick else compiled(setup))]


def blocks(setup: Setup, hidden: int) -> list[Row]:
    """Compare one folded block with two layers, in prefill (8 sequences) and in the decoding of one token."""
    D, length = setup.facts.width, setup.tokens.ids_ST.shape[1]
    passes, stand = Passes(setup.model, length), made_up.stand_in(D, hidden)
    token = Passes(setup.model, 1)
    h_BTD, h_11D = torch.randn(8, length, D), torch.randn(1, 1, D)
    layers = list(range(*setup.block))
    times = in_turns({"folded": lambda: stand(h_BTD), "layers": lambda: passes.run(h_BTD, layers),
                      "folded 1": lambda: [stand(h_11D) for _ in range(STEPS)],
                      "layers 1": lambda: [token.run(h_11D, layers) for _ in range(STEPS)]}, setup.repeats)
    macs = sum(p.numel() for layer in decoder_layers(setup.model)[slice(*setup.block)] for p in layer.parameters()
               if p.ndim == 2) / stand.macs_per_token
    return [times.row(f"prefill, hidden width {hidden} ({macs:.1f} times fewer multiply-adds)", "folded", "layers",
                      target=6, against="two layers"),
            times.row(f"decoding without history, hidden width {hidden}", "folded 1", "layers 1", target=10,
                      against="two layers")]


def decoding(model: PreTrainedModel, ids_ST: Tensor, turns: int, static: bool = False) -> Callable[[], None]:
    """A run that decodes STEPS tokens after a prompt, with a cache. The prompt is processed before the timing starts.

    A static cache has space for the tokens of all timed runs. A cache that is not static is cut back to the prompt
    after each run.
    """
    room = StaticCache(config=model.config, max_cache_len=ids_ST.shape[1] + turns * STEPS) if static else None
    cache = model(ids_ST, past_key_values=room, use_cache=True).past_key_values

    def run() -> None:
        for _ in range(STEPS):
            model(ids_ST[:, :1], past_key_values=cache, use_cache=True)
        if not static:
            cache.crop(-STEPS)

    return run


def compiled(setup: Setup) -> list[Row]:
    """Compare the folded block with the two layers, both under torch.compile."""
    D, length = setup.facts.width, setup.tokens.ids_ST.shape[1]
    passes, layers, h_BTD = Passes(setup.model, length), list(range(*setup.block)), torch.randn(8, length, D)
    stand, two = torch.compile(made_up.stand_in(D, D)), torch.compile(lambda h_BTD: passes.run(h_BTD, layers))
    times = in_turns({"folded": lambda: stand(h_BTD), "layers": lambda: two(h_BTD)}, setup.repeats)
    return [times.row(f"prefill under torch.compile, hidden width {D}", "folded", "layers", target=6,
                      against="two layers")]


def models(setup: Setup) -> list[Row]:
    """Compare the dense with a pruned model: the ratio of their times, and the ratio of their multiply-adds."""
    dense = setup.model
    pruned = made_up.folded_like(dense.config, made_up.spread_blocks(setup.facts.layers), setup.facts.width)
    macs, ids_ST, turns = count_macs(dense) / count_macs(pruned), setup.tokens.ids_ST[:1], setup.repeats + 1
    long_ST = ids_ST.repeat(1, HISTORY // ids_ST.shape[1])
    times = in_turns({"dense": lambda: dense(ids_ST), "pruned": lambda: pruned(ids_ST),
                      "dense 1": decoding(dense, ids_ST, turns), "pruned 1": decoding(pruned, ids_ST, turns),
                      "dense long": decoding(dense, long_ST, turns), "pruned long": decoding(pruned, long_ST, turns),
                      "dense static": decoding(dense, ids_ST, turns, static=True),
                      "pruned static": decoding(pruned, ids_ST, turns, static=True)}, setup.repeats)
    return [figure(f"model, {what}: dense over pruned", times.ratio(f"dense{name}", f"pruned{name}"), "times",
                   "multiply-adds, dense over pruned", macs, target=target,
                   cpu=times.ratio(f"dense{name}", f"pruned{name}", field="cpu"))
            for what, name, target in (("prefill", "", 0.95), ("decoding", " 1", 1.0),
                                       (f"decoding after {long_ST.shape[1]} tokens", " long", 1.0),
                                       ("decoding in a static cache", " static", 1.0))]
