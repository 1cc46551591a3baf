"""Compares the library that multiplies float32 matrices (kdp_core.base.products) with PyTorch's own choice, MKL.

A product alone, a forward pass, an update of a training, and a forward pass of one token are measured with both. If
`products.choose` does not choose oneDNN on this processor, both sides of a row are MKL.
"""
from collections.abc import Callable
from typing import Any

import torch

from kdp_core.base import products
from kdp_core.model.passes import Passes
from stage import shared
from stage.setup import Setup
from stage.timing import Row, in_turns


def measure(setup: Setup) -> list[Row]:
    """Measure each function with the chosen library and with MKL."""
    model, layers = setup.model.requires_grad_(False), list(range(setup.facts.layers))
    passes = Passes(model, setup.tokens.ids_ST.shape[1])
    start_BTD, final_BTD = (setup.hidden.state(k)[:shared.BATCH] for k in (0, len(layers)))
    writers = [layer.mlp.down_proj.weight for layer in passes.layers]
    trained = shared.bare(passes, layers, start_BTD, final_BTD)
    rows, columns = setup.size(1024, 16), setup.size(1536, 16)
    a_NC, b_CD = torch.rand(rows, columns), torch.rand(columns, setup.facts.width)

    def update() -> None:
        for weight in writers:
            weight.requires_grad_(True)
        trained()
        model.requires_grad_(False)

    return [compared(setup, f"a product of {rows} x {columns} by {columns} x {setup.facts.width}",
                     lambda: a_NC @ b_CD),
            compared(setup, f"a forward pass of {start_BTD.shape[:2].numel()} tokens",
                     lambda: passes.run(start_BTD, layers)),
            compared(setup, f"an update of all writers of MLPs, {start_BTD.shape[:2].numel()} tokens", update),
            compared(setup, "a forward pass of one token, with the output head",
                     lambda: model(setup.tokens.ids_ST[:1, :1], use_cache=False))]


def compared(setup: Setup, measure: str, run: Callable[[], Any]) -> Row:
    """A row: `run` with the chosen library beside `run` with MKL."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    products.choose()
    precisions = {"chosen": torch.get_float32_matmul_precision(), "plain": "highest"}

    def timed(name: str) -> Callable[[], None]:
        def with_precision() -> None:
            torch.set_float32_matmul_precision(precisions[name])
            run()

        return with_precision

    times = in_turns({name: timed(name) for name in precisions}, setup.repeats)
    torch.set_float32_matmul_precision(before)
    return times.row(measure, "chosen", "plain", against="MKL")
