"""Compares the time of every stage of KDP with its lower limit, at LLaMA-2-7B's shape: `python benchmarks/gpu.py`.

The model has random weights, so nothing is downloaded; speed does not depend on weights. In addition to this
repository, the command needs torch, transformers, safetensors and zarr. The command prints each section as soon as the
section is measured, and starts no further section after --limit seconds. If a section fails, the failure is reported
and the next section begins. The sections are:

    extraction    hidden states to Zarr, beside the bare forward pass; also as a share of the limit of matrix products
    cka           linear CKA of all pairs of states, beside the limit and beside feature-space Gram matrices
    kdp           step 1 and step 2 of the blocks, beside the limit
    kdp_residual  closed form beside the limit, an update of joint training beside the bare passes
    models        dense, folded and removed models: prefill beside the limit, decoding (CUDA graph) beside the time to
                  read the weights, at batch 1 and 32

`--device cpu --shape tiny` runs all sections on a tiny random model, as the test does. The command has not run on a GPU
yet.
"""
import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alone import ROOT

# isort: split
import torch
from stage import made_up, shared
from stage.accelerator import SHAPES, Bench
from stage.timing import Row, kept, markdown, write
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from kdp_core.methods import _outputs
from kdp_core.methods.kdp import inverse, kernel
from kdp_core.methods.kdp_residual import closed_form, dictionaries
from kdp_core.model.families import base_of
from kdp_core.model.passes import Passes, built, path_of
from kdp_core.model.sizes import count_macs, count_params
from kdp_core.states import hidden, similarity

logger = logging.getLogger("gpu")


def extraction(bench: Bench) -> list[Row]:
    """Compare the extraction of all states with the bare forward pass. Later sections read the extracted states."""
    tokens, path = bench.tokens, bench.folder / "hidden.zarr"

    @torch.inference_mode()
    def bare() -> None:
        for ids_BT in tokens.ids_ST.split(bench.batch):
            base_of(bench.model)(ids_BT.to(bench.device), use_cache=False)

    # 33 states of 512 sequences of LLaMA-2-7B are 18 GB on disk
    needed = list(range(bench.config.num_hidden_layers + 1))
    times = bench.in_turns({"all": lambda: hidden.extract(bench.model, tokens, path, batch_sequences=bench.batch),
                            "bare": bare, "limit": bench.limit()}, 1)
    bench.states = hidden.read(path)
    count = tokens.ids_ST.numel()
    flops = 2 * count * sum(p.numel() for p in bench.model.model.layers.parameters())
    return [times.row(f"extraction of {len(needed)} states, {count} tokens", "all", "bare", target=0.95,
                      against="bare forward pass"),
            times.row("the bare forward pass", "bare", "limit", scale=bench.turns(flops),
                      against="limit of matrix products")]


def cka(bench: Bench) -> list[Row]:
    """Measure linear CKA of all pairs of layers on the device, from minibatches of 256 tokens."""
    L, D, batch = bench.config.num_hidden_layers + 1, bench.config.hidden_size, min(256, bench.shape.cka_tokens // 2)
    x_LND = torch.randn(L, bench.shape.cka_tokens, D, device=bench.device)

    def minibatches(dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: sum(similarity.hsic_pairs(x_LBD.to(dtype) @ x_LBD.to(dtype).mT)
                           for x_LBD in x_LND.split(batch, dim=1))

    def features() -> None:
        for i in range(L):
            for j in range(i, L):
                (x_LND[i].T @ x_LND[j]).square().sum()

    times = bench.in_turns({"double": minibatches(torch.float64), "single": minibatches(torch.float32),
                            "features": features, "limit": bench.limit(torch.float64)})
    flops = 2 * x_LND.shape[1] * batch * L * (D + L)
    what = f"linear CKA, {L} states, {x_LND.shape[1]} tokens"
    return [times.row(f"{what}, float64 as in the stage", "double", "features", target=10,
                      against="feature-space Gram matrices, float32"),
            times.row(f"{what}, float64 as in the stage", "double", "limit", scale=bench.turns(flops),
                      against="limit of matrix products, float64"),
            times.row(f"{what}, float32", "single", "features", against="feature-space Gram matrices, float32")]


def kdp(bench: Bench) -> list[Row]:
    """Measure one epoch of each step, summed over all blocks, and compare the time with the limit in float32."""
    F, D, N = bench.shape.features, bench.config.hidden_size, bench.tokens.ids_ST.numel()
    fitted: list[Any] = []

    def step_1() -> None:
        fitted[:] = [kernel.fit(bench.states, block, features=F, epochs=1, heldout=0.2, collapse_variance=0.0,
                                device=bench.device) for block in bench.blocks]

    def step_2() -> None:
        for one in fitted:
            inverse.fit(bench.states, one, width=bench.shape.hidden, epochs=1, batch=4096, heldout=0.2, start="ridge",
                        device=bench.device)

    times = bench.in_turns({"step 1": step_1, "step 2": step_2, "limit": bench.limit(torch.float32)}, 1)
    layers = bench.blocks[0][1] - bench.blocks[0][0]
    # lift and gradient to Omega; Gram, cross, prediction and its gradient, in training and in the last solve
    first = 0.8 * N * len(bench.blocks) * ((layers + 1) * 3 * D * F + layers * 12 * F ** 2)
    second = 0.8 * N * len(bench.blocks) * 6 * bench.shape.hidden * (F + D)
    return [times.row(f"{step}, {len(bench.blocks)} blocks, 1 epoch, with reading{more}", step, "limit",
                      scale=bench.turns(flops), against="limit of matrix products, float32")
            for step, flops, more in (("step 1", first, ""), ("step 2", second, " and its closed form"))]


def kdp_residual(bench: Bench) -> list[Row]:
    """Measure the closed form of one stand-in, and one update of joint training over all stand-ins."""
    block, few = bench.blocks[len(bench.blocks) // 2], min(128, bench.shape.sequences)
    h_STD, y_STD = (bench.states.state(k)[:few] for k in block)
    fit = dictionaries.closed_form_options(bench.model, bench.states, dictionary="neurons",
                                           entries=bench.shape.entries, seed=0)
    entries = dictionaries.candidates(bench.model, block, h_STD, y_STD, fit)
    keep_ST, _ = dictionaries.counted(h_STD, y_STD, fit.massive_factor)
    flops = shared.operations(int(keep_ST.sum()), bench.config.hidden_size, entries)
    times = bench.in_turns({"limit": bench.limit(torch.float32),
                            "products": lambda: closed_form._statistics(entries, h_STD, y_STD, keep_ST, fit),
                            "whole": lambda: closed_form.fit_stand_in(block, entries, h_STD, y_STD, fit)}, 1)
    scale = bench.turns(flops)
    return [times.row(f"Gram products of {entries.entries} candidates", "products", "limit", target=0.6, scale=scale,
                      against="limit of matrix products, float32"),
            times.row("the whole closed form", "whole", "limit", scale=scale, against="limit of the same products"),
            joint(bench)]


def joint(bench: Bench) -> Row:
    """Compare one update of joint training with the bare forward and backward pass."""
    first, last = bench.blocks[0][0], bench.config.num_hidden_layers
    modules = shared.linear_stand_ins(bench.config.hidden_size, bench.blocks)
    passes = Passes(bench.model, bench.shape.length)
    bench.model.requires_grad_(False)
    stand_ins = torch.nn.ModuleList(built(module) for module in modules).to(bench.device)
    path, which = path_of(modules, list(stand_ins), first, last), torch.arange(shared.BATCH)
    # the last state is used for the state before the first block, because the speed is the same
    data = _outputs.Data(bench.states.reader(first), bench.states.reader(last), bench.tokens.ids_ST[:8])
    adam, generator = torch.optim.Adam(stand_ins.parameters(), lr=1e-6), torch.Generator().manual_seed(0)
    start_BTD, final_BTD = (read(which).to(bench.device, bench.dtype) for read in data[:2])
    times = bench.in_turns({
        "update": lambda: _outputs._update(passes, path, data, which, adam, shared.POSITIONS, 0.5, generator),
        "bare": shared.bare(passes, path, start_BTD, final_BTD)})
    return times.row("an update of joint training", "update", "bare", target=0.85,
                     against="bare forward and backward pass")


def models(bench: Bench) -> list[Row]:
    """Measure three models at batch 1 and 32: dense, with folded blocks, and with the blocks only removed."""
    with bench.place():
        made = {"dense": bench.model,
                "folded": made_up.folded_like(bench.config, bench.blocks, bench.shape.hidden),
                "removed": made_up.folded_like(bench.config, bench.blocks, None)}
    rows = []
    for batch in (1, 32):
        with torch.inference_mode():
            rows += passes_of(bench, made, batch)
    return rows


def passes_of(bench: Bench, made: dict[str, PreTrainedModel], batch: int) -> list[Row]:
    """Measure prefill and decoding of all three models at one batch size."""
    ids_BT = torch.zeros(batch, bench.shape.length, dtype=torch.int64, device=bench.device)
    source = torch.empty(max(1, count_params(bench.model) // 2), dtype=bench.dtype, device=bench.device)
    target = torch.empty_like(source)
    steps = {name: decoding(bench, model, ids_BT) for name, model in made.items()}
    prefill = bench.in_turns({"limit": bench.limit(), **{name: lambda model=model: model(ids_BT, use_cache=False)
                                                         for name, model in made.items()}})
    # a copy of half of the weights reads and writes as many bytes as one token of the dense model reads
    decode = bench.in_turns({"copy": lambda: target.copy_(source), **steps})
    rows = []
    for name, model in made.items():
        removed = 1 - count_params(model) / count_params(bench.model)
        what = f"{name} ({100 * removed:.1f} % removed), batch {batch}"
        rows += [prefill.row(f"prefill, {what}", name, "limit", against="limit of matrix products",
                             scale=bench.turns(2 * ids_BT.numel() * count_macs(model))),
                 decode.row(f"decoding of a token, {what}", name, "copy", scale=1 - removed,
                            against="reading the weights")]
        if name != "dense":
            macs = count_macs(bench.model) / count_macs(model)
            rows += [prefill.row(f"prefill, {what}", name, "dense", target=0.95 * macs, against="dense"),
                     decode.row(f"decoding, {what}", name, "dense", target=1.3 if name == "folded" else None,
                                against="dense")]
    return rows


def decoding(bench: Bench, model: PreTrainedModel, ids_BT: Tensor) -> Callable[[], Any]:
    """A function that decodes one token with a static cache; on a GPU, as a CUDA graph if that is possible."""
    room = bench.shape.length + bench.shape.steps
    cache = StaticCache(config=model.config, max_cache_len=room)
    model(ids_BT, past_key_values=cache, use_cache=True)
    one_B1 = ids_BT[:, :1].clone()
    position = torch.full_like(one_B1, bench.shape.length)
    mask = torch.zeros(len(ids_BT), 1, 1, room, dtype=bench.dtype, device=bench.device)

    def step() -> Any:
        return model(one_B1, past_key_values=cache, use_cache=True, position_ids=position, attention_mask=mask).logits

    if bench.kind != "cuda":
        return step
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    except RuntimeError as error:
        logger.warning("no CUDA graph (%s); decoding is timed without it", str(error).splitlines()[0])
        return step


SECTIONS: dict[str, Callable[[Bench], list[Row]]] = {
    "extraction": extraction, "cka": cka, "kdp": kdp, "kdp_residual": kdp_residual, "models": models}


def measure(bench: Bench, names: Sequence[str], limit: float, began: float) -> list[Row]:
    """Measure the sections within the time limit and print each section. Return the rows of all measured sections."""
    rows: list[Row] = []
    for name in names:
        if time.perf_counter() - began > limit:
            logger.warning("%s is not measured: the limit of %.0f s is over", name, limit)
            continue
        try:
            found, took = kept(lambda name=name: SECTIONS[name](bench))
        except (RuntimeError, OSError, TypeError, ValueError, AttributeError, LookupError) as error:
            logger.exception("%s failed: %s", name, error)
            continue
        print(f"\n## {name} ({took.wall:.0f} s)\n\n{markdown(found)}", flush=True)
        rows += found
    return rows


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (cuda)")
    parser.add_argument("--shape", default="llama2-7b", choices=list(SHAPES), help="model and sizes (llama2-7b)")
    parser.add_argument("--limit", type=float, default=450, help="seconds after which no further section starts (450)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/gpu.csv", help="the table as CSV")
    options = parser.parse_args(given)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name!r}; choose from {', '.join(SECTIONS)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here; give --device cpu --shape tiny to try the "
                     "command")
    return options


def main(given: Sequence[str] | None = None) -> list[Row]:
    """Measure all sections and write the table."""
    began, options = time.perf_counter(), arguments(given)
    name = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else options.device
    print(f"{name}, torch {torch.__version__}, {options.shape} with random weights", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Bench(SHAPES[options.shape], options.device, Path(folder)), options.sections or list(SECTIONS),
                       options.limit, began)
    write(rows, options.out)
    print(f"\n{time.perf_counter() - began:.0f} s in all; written to {options.out}")
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s", stream=sys.stderr)
    main()
