"""Compares learned kernels with linear maps and random features, layer by layer: `python benchmarks/dictionaries.py`.

In each measurement, a stand-in with a skip path replaces one layer of the embedded model. The stand-in is fitted in
closed form on the dense model's states. Each stand-in is the sum of a linear part and a dictionary. The stand-ins
differ only in the dictionary:
    none                 the linear part alone
    rff                  random Fourier features, at several kernel widths
    rff learned          the same, with frequencies and phases learned against the held-out decode error
    neurons              neurons of the layer's own MLP, chosen by the optimal brain surgeon
    neurons at random    neurons drawn from the same MLP
The form of the stand-in in the KDP paper (ICLR 2026), "KDP's own form", serves as a reference. KDP's own form has 2m
features, no skip path and no linear part. A ridge regression must therefore decode the whole state from the features.
The frequencies of the features are random (`kdp, epochs 0`) or learned by equation 5.

The table has these columns:
    error         relative squared error of the layer's last state on held-out sequences, massive tokens left out
                  (1 is as good as the constant mean)
    of_linear     that error divided by the error of the linear part on the same sequences
    missed        share of the layer's step that the stand-in misses on held-out tokens, weighted as in the fit
    kl_nats       with --divergence: KL(dense || model with this one layer replaced), in nats per token
Standard errors are computed over sequences. The standard errors of `of_linear` are paired, because both errors come
from the same sequences. The figure shows random features at the kernel width with the lowest error on the held-out
sequences. The choice of this width uses held-out data, so the errors in the figure are optimistic. The neurons are
chosen in rounds, and each round chooses from the neurons of the previous, larger set. The command writes
dictionaries.csv, .png and .pdf to results/benchmarks after each layer. The estimated time is half an hour on one core.
"""
import argparse
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import embedded
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from kdp_core.base.records import Module
from kdp_core.figures import style
from kdp_core.methods.kdp import kernel
from kdp_core.methods.kdp_residual import closed_form, dictionaries
from kdp_core.model import checkpoints, distil
from kdp_core.model.passes import Passes, built
from kdp_core.states import block, hidden

logger = logging.getLogger("dictionaries")
RUN = embedded.ROOT / "results/smollm2-135m"
"""The folder in which `make demo` stores the dense model and the states of 128 sequences of news."""
COLUMNS = ["layer", "dictionary", "entries", "bandwidth_scale", "params", "error", "error_stderr", "of_linear",
           "of_linear_stderr", "missed", "kl_nats", "kl_nats_stderr", "seconds"]
KINDS = {"none": "linear part alone", "rff": "random features, best width", "rff learned": "learned features",
         "neurons": "neurons, chosen", "neurons at random": "neurons, at random"}


class Layer(NamedTuple):
    """One layer: its number, its states, and the settings with which its stand-ins are fitted and judged."""
    number: int
    passes: Passes
    h_STD: Tensor
    y_STD: Tensor
    final_STD: Tensor | None
    """The dense model's last states (before the final norm) for the first held-out sequences; None if outputs are not
    compared."""
    train: Tensor
    heldout: Tensor
    options: argparse.Namespace
    fit: dictionaries.Fit

    @property
    def block(self) -> tuple[int, int]:
        """The layer as a block."""
        return self.number, self.number + 1

    def closed_form(self, dictionary: dictionaries.Dictionary | None, entries: int) -> Module:
        """Fit the stand-in in closed form; the stand-in contains `entries` entries of this dictionary."""
        return closed_form.fit_stand_in(self.block, dictionary, self.h_STD[self.train], self.y_STD[self.train],
                                        self.fit._replace(entries=entries))

    def features(self, kind: str, entries: int, scale: float) -> dictionaries.Dictionary | None:
        """A dictionary of random features.

        If `kind` is `rff_learned`, the features are trained. If `kind` is `rff`, the features stay random.
        """
        fit = self.fit._replace(dictionary=kind, entries=entries, bandwidth_scale=scale)
        return dictionaries.candidates(self.passes.model, self.block, self.h_STD[self.train], self.y_STD[self.train],
                                       fit)


class Judged(NamedTuple):
    """For each sequence: sums of squared norms over its held-out tokens, and its divergence."""
    missed_S: Tensor
    """Sum of |predicted state - true state|^2 after the layer."""
    spread_S: Tensor
    """Sum of |true state - mean state of all held-out tokens|^2 after the layer."""
    weighted_S: Tensor
    """As `missed_S`, but each term is divided by the squared norm of the token's true state after the layer."""
    step_S: Tensor
    """Sum of |state after the layer - state before the layer|^2, each term divided as in `weighted_S`."""
    kl_S: Tensor
    """Divergence in nats per token; empty if outputs are not compared."""


def stand_ins(layer: Layer) -> Iterator[tuple[str, int, float, Module]]:
    """Fit the stand-ins one after the other.

    For each stand-in, yield four values: the name of the dictionary, the number of entries, the kernel width as a
    multiple of the median distance, and the stand-in.
    """
    options = layer.options
    yield "none", 0, math.nan, layer.closed_form(None, 0)
    for name, kind, scales in (("rff", "rff", options.scales), ("rff learned", "rff_learned", options.learned_scales)):
        for entries in options.features:
            for scale in scales:
                yield name, entries, scale, layer.closed_form(layer.features(kind, entries, scale), entries)
    whole = left = dictionaries.neurons(layer.passes.model, layer.block)
    for entries in sorted({size for size in options.neurons if size < whole.entries} | {whole.entries}, reverse=True):
        module = layer.closed_form(left, entries)
        left = left._replace(v_RD=module.tensors["inner.weight"], c_R=module.tensors["inner.bias"])
        yield "neurons", entries, math.nan, module
    order = torch.randperm(whole.entries, generator=torch.Generator().manual_seed(options.seed))
    for entries in sorted(size for size in options.random_neurons if size < whole.entries):
        chosen = order[:entries].sort().values
        yield "neurons at random", entries, math.nan, layer.closed_form(whole.only(chosen), entries)


@torch.no_grad()
def judge(layer: Layer, module: Module) -> Judged:
    """Judge a stand-in on the held-out sequences."""
    keep_ST, _ = dictionaries.counted(layer.h_STD, layer.y_STD, layer.fit.massive_factor)
    keep_ST, h_STD, y_STD = keep_ST[layer.heldout], layer.h_STD[layer.heldout], layer.y_STD[layer.heldout]
    run = built(module)
    made_STD = torch.cat([run(h_BTD) for h_BTD in h_STD.split(8)])
    sums = []
    for of_STD in (made_STD - y_STD, y_STD - y_STD[keep_ST].mean(dim=0), y_STD - h_STD):
        square_ST = of_STD.square().sum(dim=-1) * keep_ST
        sums.append((square_ST.sum(dim=1), (square_ST / y_STD.square().sum(dim=-1)).sum(dim=1)))
    (missed_S, weighted_S), (spread_S, _), (_, step_S) = sums
    return Judged(missed_S, spread_S, weighted_S, step_S, divergence(layer, made_STD))


def divergence(layer: Layer, made_STD: Tensor) -> Tensor:
    """KL(dense || model with this layer replaced) of each of the first held-out sequences, in nats per token, kl_S."""
    if layer.final_STD is None:
        return torch.empty(0)
    passes, found = layer.passes, []
    path = list(range(layer.block[1], len(passes.layers)))
    for h_TD, final_TD in zip(made_STD, layer.final_STD, strict=False):
        student_TD, teacher_TD = (passes.to_head(h_BTD)[0] for h_BTD in (passes.run(h_TD[None], path), final_TD[None]))
        losses = distil.token_losses(student_TD, teacher_TD, torch.zeros(len(final_TD), dtype=torch.int64),
                                     passes.head, passes.head, kl_weight=1.0)
        found.append(losses.kl_nats)
    return torch.stack(found)


def ratio(part_S: Tensor, whole_S: Tensor) -> tuple[float, float]:
    """sum(part) / sum(whole) over the same sequences, and its standard error over sequences, to first order."""
    value, count = part_S.sum() / whole_S.sum(), len(part_S)
    if count < 2:
        return value.item(), math.nan
    # se = sqrt(S / (S - 1) sum (part - ratio * whole)^2) / sum whole
    residue_S = part_S - value * whole_S
    return value.item(), (math.sqrt(count / (count - 1)) * residue_S.norm() / whole_S.sum()).item()


def _ratio(name: str, part_S: Tensor, whole_S: Tensor) -> dict[str, float]:
    return dict(zip((name, f"{name}_stderr"), ratio(part_S, whole_S), strict=True))


def measure(layer: Layer) -> list[dict[str, Any]]:
    """Fit and judge the stand-ins of one layer; the table has a row for each of them."""
    rows, linear, began = [], None, time.perf_counter()
    for name, entries, scale, module in stand_ins(layer):
        seconds, found = time.perf_counter() - began, judge(layer, module)
        linear = linear or found
        params = sum(tensor.numel() for tensor in module.tensors.values())
        rows.append({"layer": layer.number, "dictionary": name, "entries": entries, "bandwidth_scale": scale,
                     "params": params, **_ratio("error", found.missed_S, found.spread_S),
                     **_ratio("of_linear", found.missed_S, linear.missed_S),
                     "missed": ratio(found.weighted_S, found.step_S)[0], "seconds": seconds})
        if len(found.kl_S):
            rows[-1] |= _ratio("kl_nats", found.kl_S, torch.ones_like(found.kl_S))
        logger.info("layer %d, %s of %d: error %.4f", layer.number, name, entries, rows[-1]["error"])
        began = time.perf_counter()
    return rows


def own_form(states_of: hidden.HiddenStates, number: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for the features of KDP's step 1: with random frequencies, and after --kernel-epochs epochs of training.

    In both rows, a ridge regression decodes the states from the features.
    """
    rows, D = [], states_of.width
    for epochs in sorted({0, options.kernel_epochs}):
        began = time.perf_counter()
        stats = kernel.fit(states_of, (number, number + 1), features=options.kernel_features, epochs=epochs,
                           seed=options.seed).stats
        # frequencies and phases, then one matrix and a bias: the product of the operator and the ridge solution
        params = options.kernel_features // 2 * (D + 1) + (options.kernel_features + 1) * D
        rows.append({"layer": number, "dictionary": f"kdp, epochs {epochs}", "entries": options.kernel_features,
                     "bandwidth_scale": 3.0, "params": params, "error": stats["decode_error"],
                     "seconds": time.perf_counter() - began})
    return rows


def panels(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the figure shows.

    For random and learned features, the figure shows only the row whose kernel width has the lowest error.
    """
    drawn = table[table["dictionary"].isin(KINDS)]
    return drawn.loc[sorted(drawn.groupby(["layer", "dictionary", "entries"], sort=False)["error"].idxmin())]


def draw(table: pd.DataFrame) -> style.Drawn:
    """Draw a panel for each layer, with log axes.

    The vertical axis of a panel is the error of a stand-in divided by the error of the linear part. The horizontal axis
    is the number of parameters of the stand-in. The error of KDP's own form is far above all other errors, so the panel
    shows this error only as a number.
    """
    drawn = panels(table)
    layers = list(dict.fromkeys(drawn["layer"]))
    columns, lines = min(3, len(layers)), math.ceil(len(layers) / 3)
    with style.quiet():
        figure = Figure(figsize=(style.PAGE_IN, 1.9 * lines + 0.5))
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axis in axes[len(layers):]:
            axis.set_visible(False)
        for axis, layer in zip(axes, layers, strict=False):
            own = drawn[drawn["layer"] == layer]
            for place, kind in enumerate(KINDS):
                if not (of_kind := own[own["dictionary"] == kind].sort_values("params")).empty:
                    _curve(axis, of_kind, kind, place)
            linear, of_kdp = (table.loc[(table["layer"] == layer) & table["dictionary"].str.startswith(name), "error"]
                              for name in ("none", "kdp"))
            axis.set(title=f"Layer {layer}", xscale="log", yscale="log", xlabel="Parameters put in, millions")
            axis.text(0.04, 0.05, f"error of the linear part {linear.iloc[0]:.3g}\nof KDP's form {of_kdp.min():.3g}",
                      transform=axis.transAxes, fontsize=6, color=style.GREY)
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            style.plain_log(axis)
        for axis in axes[::columns]:
            axis.set_ylabel("Held-out error / linear's")
        style.legend_below(figure, axes[0].get_legend_handles_labels()[0], columns=3)
    return style.Drawn(figure, table)


def _curve(axis: Any, own: pd.DataFrame, kind: str, place: int) -> None:
    lined = kind in ("rff", "rff learned", "neurons")
    axis.errorbar(own["params"], own["of_linear"], yerr=own["of_linear_stderr"], label=KINDS[kind],
                  color=style.COLORS[place], marker=style.MARKERS[place], elinewidth=0.7,
                  linestyle=style.DASHES[place % len(style.DASHES)] if lined else "none")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=Path, default=RUN / "news/hidden.zarr", help="stored states of all layers (of `make demo`)")
    add("--dense", type=Path, default=RUN / "dense", help="converted checkpoint (of `make demo`)")
    add("--layers", type=int, nargs="+", default=[3, 7, 12, 14, 18, 23], help="layers; one layer is replaced at a time")
    add("--features", type=int, nargs="*", default=[149, 512, 1024], help="numbers of random and of learned features")
    add("--scales", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="kernel widths in median distances")
    add("--learned-scales", type=float, nargs="+", default=[3.0], help="kernel widths at which learning starts")
    add("--theta-steps", type=int, default=30, help="updates of the learned features (30)")
    add("--theta-lr", type=float, default=0.2, help="learning rate of the learned features (0.2)")
    add("--neurons", type=int, nargs="*", default=[32, 96, 128, 256, 512], help="numbers of chosen neurons; also all")
    add("--random-neurons", type=int, nargs="*", default=[96], help="numbers of neurons drawn at random")
    add("--kernel-features", type=int, default=1024, help="features of KDP's own form, 2m (1024)")
    add("--kernel-epochs", type=int, default=5, help="epochs of step 1 of KDP's own form (5)")
    add("--divergence", type=int, default=0, metavar="SEQUENCES", help="held-out sequences with compared outputs (0)")
    add("--heldout", type=float, default=0.1, help="share of the sequences that are held out (0.1)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--seed", type=int, default=0, help="seed of the split and of all random choices (0)")
    add("--out", type=Path, default=embedded.ROOT / "results/benchmarks", help="folder (results/benchmarks)")
    options = parser.parse_args(given)
    if min([options.threads, *options.features, *options.neurons, *options.random_neurons]) < 1:
        parser.error("--threads, --features, --neurons and --random-neurons: give 1 or more")
    for path in (options.hidden, options.dense):
        if not path.exists():
            parser.error(f"{path} does not exist; run `make demo`, or give --hidden and --dense")
    return options


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure all stand-ins of all layers, write the table and the figure, print the table."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    states_of = hidden.read(options.hidden)
    passes = Passes(checkpoints.load_model(options.dense, device="cpu", dtype="float32"), states_of.tokens)
    known = range(len(passes.layers))
    if not set(options.layers) <= set(known):
        raise SystemExit(f"--layers {options.layers}: the model has layers 0 to {known[-1]}")
    # this split equals the split in kernel.fit, so that KDP's own form is judged on the same sequences
    heldout, train = block.split(states_of.sequences, options.heldout, options.seed)
    fit = dictionaries.closed_form_options(passes.model, states_of, dictionary="neurons", entries=1, seed=options.seed)
    fit = fit._replace(theta_steps=options.theta_steps, theta_lr=options.theta_lr)
    final_STD = states_of.state(len(known))[heldout[:options.divergence]] if options.divergence else None
    rows = []
    for number in options.layers:
        layer = Layer(number, passes, states_of.state(number), states_of.state(number + 1), final_STD, train, heldout,
                      options, fit)
        rows += measure(layer) + own_form(states_of, number, options)
        table = pd.DataFrame(rows).reindex(columns=COLUMNS)
        style.save(draw(table), options.out / "dictionaries")
    print(table.to_string(index=False, float_format="%.4g", na_rep=""))
    print(f"\n{len(train)} sequences fitted, {len(heldout)} judged, {states_of.tokens} tokens each; see {options.out}")
    return table


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
