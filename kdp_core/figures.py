"""Figures from records and summaries: quiet, for print, readable in grey, the same bytes each time.

Follows Figures 1, 3, 5 and 6 of the KDP paper (Ma et al., ICLR 2026), with held-out curves, error bars and the actual
share of removed parameters, which the paper leaves out, and adds a strip chart of the replaced layers. Every function
returns the drawing with the numbers in it; `save` writes PDF, PNG and CSV side by side. Reads numbers, computes none.
"""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from kdp_core import store
from kdp_core.records import Composed, Diagnosis, Inverse, KernelMap, Similarity
from kdp_core.tables import COLUMNS, DENSE, Point, heading, span

COLUMN_IN, PAGE_IN = 3.25, 6.75
"""Widths of a column and of the page in a two-column conference layout, in inches."""

# Okabe and Ito's palette without yellow (too faint on white), dark and light in turn
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
GREY = "#666666"

STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7, "axes.titlesize": 7.5,
    "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "legend.fontsize": 6.5,
    "figure.titlesize": 8, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5,
    "lines.linewidth": 1.1, "lines.markersize": 3.2, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5,
    "axes.axisbelow": True, "legend.frameon": False, "legend.handlelength": 2.6, "pdf.fonttype": 42,
    "figure.facecolor": "white", "savefig.facecolor": "white", "figure.constrained_layout.use": True,
}


class FigureError(ValueError):
    """There is nothing to draw, or not what was asked for."""


class Drawn(NamedTuple):
    """A figure and the numbers in it."""
    figure: Figure
    data: pd.DataFrame


@contextmanager
def quiet() -> Iterator[None]:
    """The style of all figures, whatever the user's matplotlibrc says; restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save(drawn: Drawn, stem: str | Path, *, dpi: int = 200) -> list[Path]:
    """Write <stem>.pdf, <stem>.png and <stem>.csv atomically; no dates or versions in them, so equal input gives equal
    files.
    """
    stem = Path(stem)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".pdf", ".png", ".csv")]
    plain: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None},
                                        "png": {"Software": None}}
    with quiet():
        for path, (format, metadata) in zip(paths, plain.items(), strict=False):
            with store.atomic(path) as temporary:
                drawn.figure.savefig(temporary, format=format, dpi=dpi, metadata=metadata)
    store.write_text(paths[2], drawn.data.to_csv(index=False, lineterminator="\n"))
    return paths


# Similarity of states -------------------------------------------------------------------------------------------------

MAPS = {"cosine": "Cosine", "cka_linear": "CKA, linear", "cka_rbf": "CKA, RBF", "angular": "Angular distance"}
TREATMENTS = {"mask": "left out", "normalise": "scaled to the norm of the others", "raw": "kept as they are"}


def similarity_maps(similarity: Similarity, *, colormap: str = "viridis", width: float = PAGE_IN) -> Drawn:
    """Figure 1: cosine, linear and RBF CKA of all pairs of states on one colour scale, and angular distance on its own.

    Axes are state indices: state k is the input of layer k. The line above says how massive-activation tokens were
    treated, as every such map hangs on it.
    """
    layers = similarity.layers
    matrices = {name: getattr(similarity, f"{name}_LL") for name in MAPS}
    similar = [float(matrices[name].min()) for name in MAPS if name != "angular"]
    bottom = math.floor(10 * min(similar)) / 10
    limits = {name: (bottom, 1.0) for name in MAPS} | {"angular": (0.0, max(float(matrices["angular"].max()), 1e-3))}
    with quiet():
        figure = Figure(figsize=(width, width / 4 + 0.75))
        axes = figure.subplots(1, 4, sharey=True)
        for axis, (name, title) in zip(axes, MAPS.items(), strict=True):
            image = axis.imshow(matrices[name].numpy(), cmap=f"{colormap}_r" if name == "angular" else colormap,
                                vmin=limits[name][0], vmax=limits[name][1], origin="lower", interpolation="nearest")
            _state_axis(axis, layers)
            axis.set(title=title, xlabel="State")
            if name in ("cka_rbf", "angular"):
                beside = [axis] if name == "angular" else list(axes[:3])
                figure.colorbar(image, ax=beside, location="bottom", shrink=0.9 if name == "angular" else 0.5,
                                aspect=18 if name == "angular" else 30, pad=0.03,
                                label="Angle / π" if name == "angular" else "Similarity")
        axes[0].set_ylabel("State")
        figure.suptitle(_treatment(similarity), x=0.01, ha="left", fontsize=7, color=GREY)
    return Drawn(figure, _pairs(layers, matrices))


def _state_axis(axis: Axes, layers: Sequence[int]) -> None:
    step = max(1, math.ceil(len(layers) / 6))
    places = list(range(0, len(layers), step))
    axis.set_xticks(places, [str(layers[place]) for place in places])
    axis.set_yticks(places, [str(layers[place]) for place in places])
    axis.grid(False)


def _treatment(similarity: Similarity) -> str:
    how = TREATMENTS.get(similarity.treatment, similarity.treatment)
    count = f" ({similarity.masked:,} of {similarity.tokens + similarity.masked:,})" if similarity.masked else ""
    return f"Massive-activation tokens {how}{count}; {similarity.tokens:,} tokens"


def _pairs(layers: Sequence[int], matrices: Mapping[str, Any]) -> pd.DataFrame:
    pairs = [(i, j) for i in range(len(layers)) for j in range(len(layers))]
    return pd.DataFrame({"state_a": [layers[i] for i, _ in pairs], "state_b": [layers[j] for _, j in pairs],
                         **{name: matrix.flatten().tolist() for name, matrix in matrices.items()}})


# Training -------------------------------------------------------------------------------------------------------------

class Panel(NamedTuple):
    """One panel of training curves."""
    step: str
    field: str
    """Of the curve's rows; the held-out field is the same with `heldout_` before it."""
    title: str
    ylabel: str
    log: bool


PANELS = (Panel("kernel", "loss", "Step 1: loss", "Loss", True),
          Panel("kernel", "cos", "Step 1: cosine", "Cosine similarity", False),
          Panel("inverse", "loss", "Step 2: loss", "Loss", True))


def training_curves(kernels: Mapping[str, KernelMap], inverses: Mapping[str, Inverse], *,
                    width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """Figure 3: step 1 loss and cosine and step 2 loss by epoch, a colour a block; held-out values dashed.

    The keys are the labels, such as `5-7`. Raises FigureError if no record holds a curve.
    """
    frame = pd.concat([_curves("kernel", kernels), _curves("inverse", inverses)], ignore_index=True)
    if frame.empty:
        raise FigureError("no training curves to draw: neither step has an epoch on record")
    labels = sorted({*kernels, *inverses}, key=_start)
    with quiet():
        figure = Figure(figsize=(width, height))
        for axis, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
            part = frame[frame["step"] == panel.step]
            _curve_panel(axis, part, panel, labels)
        handles = [_handle(place, label) for place, label in enumerate(labels)]
        handles += [Line2D([], [], color=GREY, label="training"),
                    Line2D([], [], color=GREY, linestyle=DASHES[1], label="held out")]
        legend_below(figure, handles)
    return Drawn(figure, frame)


def _curve_panel(axis: Axes, part: pd.DataFrame, panel: Panel, labels: Sequence[str]) -> None:
    for field, dashes in ((panel.field, DASHES[0]), (f"heldout_{panel.field}", DASHES[1])):
        for place, label in enumerate(labels):
            rows = part[part["block"] == label]
            if field in rows and rows[field].notna().any():
                axis.plot(rows["epoch"], rows[field].astype(float), linestyle=dashes, **_look(place, len(rows)))
    positive = all((line.get_ydata() > 0).all() for line in axis.get_lines())
    if panel.log and axis.get_lines() and positive:
        axis.set_yscale("log")
        plain_log(axis)
    _epochs(axis)
    axis.set(title=panel.title, ylabel=panel.ylabel)


DIVERGENCE = Panel("compose", "kl", "Joint training", "KL (nats per token)", False)


def joint_training(composed: Mapping[str, Composed], *, width: float = COLUMN_IN, height: float = 2.3) -> Drawn:
    """Divergence of the outputs from the dense model's by epoch of joint training, a colour a grid point.

    The keys are the labels, such as `ratio 0.2, K max 3`; held-out values dashed, from epoch 0, the closed form. Raises
    FigureError if no record holds a curve.
    """
    frame = _curves("compose", composed)
    if frame.empty:
        raise FigureError("no joint training to draw: compose has no epoch on record")
    with quiet():
        figure = Figure(figsize=(width, height))
        _curve_panel(figure.subplots(), frame, DIVERGENCE, list(composed))
        handles = [Line2D([], [], label=label, **_look(place, 1) | {"markevery": None})
                   for place, label in enumerate(composed)]
        legend_below(figure, [*handles, Line2D([], [], color=GREY, label="training"),
                              Line2D([], [], color=GREY, linestyle=DASHES[1], label="held out")])
    return Drawn(figure, frame.rename(columns={"block": "point"}))


def operator_norms(kernels: Mapping[str, KernelMap], *, width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """Figure 5: operator norm of every A_i and norm of phi by epoch; a colour a block, a line style a step i.

    Raises FigureError if no record holds norms.
    """
    rows = [{"block": label, "epoch": row["epoch"], "quantity": quantity, "step": step, "value": value}
            for label, record in kernels.items() for row in record.curve
            for quantity, step, value in [("phi_norm", 0, row.get("phi_norm")),
                                          *(("operator_norm", i + 1, v) for i, v in
                                            enumerate(row.get("operator_norm") or []))] if value is not None]
    if not rows:
        raise FigureError("no operator norms to draw: step 1 has no epoch on record")
    frame, labels = pd.DataFrame(rows), sorted(kernels, key=_start)
    with quiet():
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, 2)
        for (place, label), axis in ((item, axis) for item in enumerate(labels) for axis in axes):
            quantity = "operator_norm" if axis is axes[0] else "phi_norm"
            own = frame[(frame["block"] == label) & (frame["quantity"] == quantity)]
            for step, part in own.groupby("step", sort=True):
                dashes = DASHES[(max(step, 1) - 1) % len(DASHES)]
                axis.plot(part["epoch"], part["value"], linestyle=dashes, **_look(place, len(part)))
        axes[0].set(title="Step operators", ylabel=r"$\|A_i\|_{\mathrm{op}}$")
        axes[1].set(title="Lift", ylabel=r"$\|\varphi\|$")
        for axis in axes:
            _epochs(axis)
        steps = sorted(frame.loc[frame["step"] > 0, "step"].unique())
        legend_below(figure, [*(_handle(place, label) for place, label in enumerate(labels)),
                               *(Line2D([], [], color=GREY, linestyle=DASHES[(i - 1) % len(DASHES)], label=f"$A_{i}$")
                                 for i in steps)])
    return Drawn(figure, frame)


def _curves(step: str, fitted: Mapping[str, KernelMap | Inverse | Composed]) -> pd.DataFrame:
    """A row an epoch and block, scalar columns only."""
    return pd.DataFrame([{"step": step, "block": label,
                          **{name: value for name, value in row.items() if not isinstance(value, list)}}
                         for label, record in fitted.items() for row in record.curve])


def _start(label: str) -> tuple[int, str]:
    """Order of block labels: by first layer, names that are none at the end."""
    head = label.split("-")[0]
    return (int(head) if head.isdigit() else 10**6, label)


def _look(place: int, points: int) -> dict[str, Any]:
    """Colour and marker of the place-th line; a few markers along it, shifted so that lines do not hide each other."""
    every = max(1, points // 6)
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)],
            "markevery": (place * every // 3 % every, every)}


def _handle(place: int, label: str) -> Line2D:
    return Line2D([], [], label=f"block {label}", **_look(place, 1) | {"markevery": None})


def _epochs(axis: Axes) -> None:
    axis.set_xlabel("Epoch")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def plain_log(axis: Axes) -> None:
    """Plain numbers on a log axis, and some between the decades where it spans less than two."""
    low, high = axis.get_ylim()
    spread = high / low
    subs = ((1.0,) if spread > 100 else (1.0, 2.0, 5.0) if spread > 4 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
            if spread > 2 else tuple(1 + i / 4 for i in range(36)))
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, handles: Sequence[Any], columns: int = 6) -> None:
    """One legend for all panels, in rows of at most `columns` entries."""
    rows = math.ceil(len(handles) / columns)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=math.ceil(len(handles) / rows),
                  columnspacing=1.4)


# Scores ---------------------------------------------------------------------------------------------------------------

def score_against_ratio(summary: pd.DataFrame, *, metrics: Sequence[str] = ("acc", "ppl"),
                        width: float = PAGE_IN, height: float = 2.2) -> Drawn:
    """Figure 6: scores against the share of parameters really removed, a line a method (and calib, k_max), with one
    standard error; the dense model is the point at 0 and the dotted line. Perplexities stand on a log axis.

    `summary` as from tables.summarise; a row of panels a model. Raises FigureError for an unknown metric or a summary
    without pruned models.
    """
    unknown = [name for name in metrics if name not in COLUMNS or name not in summary]
    if unknown:
        raise FigureError(f"unknown metric {unknown[0]!r}; choose among {', '.join(COLUMNS)}")
    pruned = summary[summary["method"] != DENSE]
    if pruned.empty:
        raise FigureError("no pruned model in the summary; there is nothing to draw against the ratio")
    lines, models = _line_names(pruned), sorted(summary["model"].unique())
    looks = _line_looks(pruned, lines)
    with quiet():
        figure = Figure(figsize=(width, height * len(models) + 0.14 * math.ceil((len(looks) + 1) / 5)))
        grid = figure.subplots(len(models), len(metrics), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            for axis, metric in zip(axes, metrics, strict=True):
                own = pruned[pruned["model"] == model]
                _dense_line(axis, summary[(summary["model"] == model) & (summary["method"] == DENSE)], metric)
                for name, look in looks.items():
                    _score_line(axis, own[lines[own.index] == name], metric, look)
                _score_axis(axis, metric, model)
        handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
        legend_below(figure, [*handles, Line2D([], [], color=GREY, linestyle=":", label="dense")], columns=5)
    kept = [*summary.columns[:5], "params_removed",
            *(column for name in metrics for column in (name, COLUMNS[name].stderr) if column)]
    return Drawn(figure, summary[kept].reset_index(drop=True))


def _line_names(pruned: pd.DataFrame) -> pd.Series:
    """For each row the name of its line: the method, and calib and k_max where they vary."""
    calibs, k_maxes = pruned["calib"].nunique() > 1, pruned["k_max"].nunique() > 1
    return pd.Series([row["method"] + (f", {row['calib']}" if calibs else "")
                      + (f", k {row['k_max']}" if k_maxes else "") for _, row in pruned.iterrows()], index=pruned.index)


def _line_looks(pruned: pd.DataFrame, lines: pd.Series) -> dict[str, dict[str, Any]]:
    """Colour and marker tell the method, the dashes calib and k_max; in the order of the summary."""
    methods = list(dict.fromkeys(pruned["method"]))
    variants = list(dict.fromkeys(zip(pruned["calib"], pruned["k_max"], strict=True)))
    looks = {}
    for name, (_, row) in zip(lines, pruned.iterrows(), strict=True):
        place, variant = methods.index(row["method"]), variants.index((row["calib"], row["k_max"]))
        looks[name] = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)],
                       "linestyle": DASHES[variant % len(DASHES)]}
    return looks


def _score_line(axis: Axes, rows: pd.DataFrame, metric: str, look: Mapping[str, Any]) -> None:
    rows = rows[rows[metric].notna()].sort_values("params_removed")
    if rows.empty:
        return
    column = COLUMNS[metric]
    errors = rows[column.stderr].fillna(0) * column.scale if column.stderr else None
    x, y = 100 * rows["params_removed"], rows[metric] * column.scale
    # bars paler than the lines, or many methods hide each other
    axis.errorbar(x, y, yerr=errors, fmt="none", ecolor=look["color"], elinewidth=0.7, capsize=1.5, capthick=0.7,
                  alpha=0.45)
    axis.plot(x, y, **look)


def _dense_line(axis: Axes, rows: pd.DataFrame, metric: str) -> None:
    column = COLUMNS[metric]
    for _, row in rows[rows[metric].notna()].iterrows():
        value = row[metric] * column.scale
        error = row[column.stderr] * column.scale if column.stderr and not pd.isna(row[column.stderr]) else None
        axis.axhline(value, color=GREY, linestyle=":", linewidth=0.9)
        axis.errorbar([0], [value], yerr=error, color=GREY, marker="o", linestyle="none", elinewidth=0.7, capsize=1.5)


def _score_axis(axis: Axes, metric: str, model: str) -> None:
    axis.set(title=model, xlabel="Parameters removed", ylabel=heading(COLUMNS[metric]))
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    if metric in ("ppl", "ppl_ratio"):
        axis.set_yscale("log")
        plain_log(axis)


# Which layers ---------------------------------------------------------------------------------------------------------

def pruned_layers(points: Sequence[Point], *, width: float = PAGE_IN, row_height: float = 0.13) -> Drawn:
    """Strip chart: the layers that each pruned model replaces, a row a grid point, a panel a model, a colour a method.

    Neighbouring blocks are set apart by a gap. Raises FigureError if no point is a pruned model.
    """
    pruned = [point for point in points if point.facts is not None]
    if not pruned:
        raise FigureError("no pruned model among the points; there are no layers to show")
    methods = list(dict.fromkeys(point.method for point in pruned))
    models = {model: sorted((p for p in pruned if p.model == model), key=_strip_order(methods))
              for model in sorted({point.model for point in pruned})}
    label = _strip_label(pruned)
    with quiet():
        heights = [len(rows) * row_height + 0.45 for rows in models.values()]
        figure = Figure(figsize=(width, sum(heights) + 0.15))
        for axis, (model, rows) in zip(figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0],
                                       models.items(), strict=True):
            _strips(axis, rows, [label(point) for point in rows], methods)
            axis.set(title=model, xlabel="Layer")
    data = [{**dict(zip(Point._fields[:5], point[:5], strict=True)), "start": start, "stop": stop,
             "block": span((start, stop)), "layers": point.facts.layers_before}
            for rows in models.values() for point in rows if point.facts for start, stop in point.facts.blocks]
    return Drawn(figure, pd.DataFrame(data, columns=[*Point._fields[:5], "start", "stop", "block", "layers"]))


def _strips(axis: Axes, rows: Sequence[Point], labels: Sequence[str], methods: Sequence[str]) -> None:
    layers = max(point.facts.layers_before for point in rows if point.facts)
    for place, point in enumerate(rows):
        blocks = point.facts.blocks if point.facts else []
        axis.broken_barh([(-0.5, layers)], (place - 0.32, 0.64), facecolors="#eeeeee")
        axis.broken_barh([(start - 0.42, stop - start - 0.16) for start, stop in blocks], (place - 0.32, 0.64),
                         facecolors=COLORS[methods.index(point.method) % len(COLORS)])
    axis.set_yticks(range(len(rows)), labels)
    axis.set(xlim=(-0.5, layers - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def _strip_order(methods: Sequence[str]) -> Callable[[Point], tuple[Any, ...]]:
    return lambda point: (methods.index(point.method), point.calib, point.k_max, point.ratio)


def _strip_label(pruned: Sequence[Point]) -> Callable[[Point], str]:
    calibs, k_maxes = len({p.calib for p in pruned}) > 1, len({p.k_max for p in pruned}) > 1
    return lambda point: (f"{point.method}{f', {point.calib}' if calibs else ''}"
                          f"{f', k {point.k_max}' if k_maxes else ''}, {100 * point.ratio:g} %")


# What pruning did to the states ---------------------------------------------------------------------------------------

def error_by_layer(diagnoses: Mapping[str, Diagnosis], *, width: float = PAGE_IN, height: float = 2.4) -> Drawn:
    """Relative squared error of the pruned models' states against the dense model's state number, a line a label.

    Not in the paper. A line has a gap where layers are gone and starts at its first error above 0: before the first
    dropped layer states are equal, which a log axis cannot show. At 1 a state is no better than the constant mean.
    Raises FigureError if there is no diagnosis, or none with an error above 0.
    """
    rows = [{"label": label, "state": state, "error": error, "cosine": cosine, "masked": masked, "tokens": own.tokens}
            for label, own in diagnoses.items()
            for state, error, cosine, masked in zip(own.states, own.error, own.cosine, own.masked, strict=True)]
    if not any(row["error"] > 0 for row in rows):
        raise FigureError("no error of states above 0 to draw: give the diagnosis of at least one pruned model")
    frame, last = pd.DataFrame(rows), max(row["state"] for row in rows)
    with quiet():
        figure = Figure(figsize=(width, height + 0.14 * math.ceil((len(diagnoses) + 1) / 5)))
        axis = figure.subplots()
        axis.axhline(1, color=GREY, linestyle=":", linewidth=0.9)
        looks = {label: _error_look(place) for place, label in enumerate(diagnoses)}
        for label, look in looks.items():
            error = frame[frame["label"] == label].set_index("state")["error"].reindex(range(last + 1))
            axis.plot(error.index, error.where(error > 0), **look)
        axis.set(yscale="log", xlim=(-0.5, last + 0.5), xlabel="State of the dense model", ylabel="Relative error")
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.1), max(high, 2))  # wide enough for plain ticks, with room about 1
        plain_log(axis)
        legend_below(figure, [*(Line2D([], [], label=label, **look) for label, look in looks.items()),
                               Line2D([], [], color=GREY, linestyle=":", label="constant mean")], columns=5)
    return Drawn(figure, frame)


def _error_look(place: int) -> dict[str, Any]:
    """A marker on every point, as a state between two gaps has no line; dashes tell a second round of colours."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 2.4,
            "linestyle": DASHES[place // len(COLORS) % len(DASHES)]}
