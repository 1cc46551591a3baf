"""Figures from records: quiet, for print, readable in grey, the same bytes each time; the style that all others share.

Follows Figures 1, 3 and 5 of the KDP paper (Ma et al., ICLR 2026), with held-out curves, which the paper leaves out.
Every function returns the drawing with the numbers in it; `save` writes PDF, PNG and CSV side by side. A row of methods
has one look in all figures (`look`): its colour and marker come from its place in the table of methods, not from who
else is drawn. Where more than MOST_LINES lines would share a panel they are dealt out to several, by what the methods
do (`deal`). Reads numbers, computes none.
"""
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kdp_core.base import store
from kdp_core.base.records import Composed, Inverse, KernelMap, Similarity

COLUMN_IN, PAGE_IN = 3.25, 6.75
"""Widths of a column and of the page in a two-column conference layout, in inches."""

# Okabe and Ito's palette without yellow (too faint on white), dark and light in turn
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
FILLS = ("none", "left", "bottom", "right", "top")
"""How markers of further rows on a method are filled; the first row's are full."""
GREY, PALE = "#666666", "#cccccc"
MOST_LINES = 12
"""More lines in one panel cannot be told apart."""

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


# Rows of methods ------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """What decides how a row of methods looks in every figure."""
    place: int
    """Of its method in the table of methods."""
    variant: int
    """0 for the row of that method itself, from 1 for further rows that stand on it."""
    group: str
    """What it does, such as `layers removed`: rows of one group are drawn together."""


class Line(NamedTuple):
    """One line of a figure of rows."""
    method: str
    variant: Any
    """What tells lines of one row apart, such as (calibration, K max)."""
    label: str
    look: dict[str, Any]


def look(row: Row) -> dict[str, Any]:
    """Colour, marker and its fill; the first 56 methods differ in colour or marker, rows on one method in fill."""
    shift = max(row.variant - 1, 0) // len(FILLS)
    made = {"color": COLORS[row.place % len(COLORS)], "marker": MARKERS[(row.place + shift) % len(MARKERS)]}
    return made | ({"fillstyle": FILLS[(row.variant - 1) % len(FILLS)]} if row.variant else {})


def rows_of(methods: Iterable[str], known: Mapping[str, Sequence[Any]] | None) -> dict[str, Row]:
    """The rows' looks as given, each (place, variant, group); without them in the order of the methods."""
    names = list(dict.fromkeys(methods))
    return {name: Row(*known[name]) if known else Row(place, 0, "") for place, name in enumerate(names)}


def lines_of(keys: Sequence[tuple[str, Any, str]], known: Mapping[str, Sequence[Any]] | None) -> list[Line]:
    """A line a (method, variant, label), in order; dashes tell variants, in the order in which they come."""
    rows, variants = rows_of([method for method, _, _ in keys], known), list(dict.fromkeys(key[1] for key in keys))
    return [Line(method, variant, label,
                 look(rows[method]) | {"linestyle": DASHES[variants.index(variant) % len(DASHES)]})
            for method, variant, label in keys]


def deal(lines: Sequence[Line], known: Mapping[str, Sequence[Any]] | None,
         most: int = MOST_LINES) -> list[tuple[str, list[Line]]]:
    """Titles and lines of the panels that so many lines need: one without a title, or one or more a group."""
    if len(lines) <= most:
        return [("", list(lines))]
    rows = rows_of([line.method for line in lines], known)
    together = {name: [line for line in lines if line.method == name] for name in rows}
    groups = {group: [together[name] for name, row in rows.items() if row.group == group]
              for group in dict.fromkeys(row.group for row in rows.values())}
    while len(groups) > 1:
        # the two smallest share a panel where they fit
        one, two = sorted(sorted(groups, key=lambda group: sum(map(len, groups[group])))[:2], key=list(groups).index)
        if sum(map(len, groups[one] + groups[two])) > most:
            break
        groups = {f"{one}; {two}" if group == one else group: own + groups[two] if group == one else own
                  for group, own in groups.items() if group != two}
    return [(f"{group} ({number} of {len(packs)})" if len(packs) > 1 else group, pack)
            for group, own in groups.items() for packs in [_packed(own, most)] for number, pack in enumerate(packs, 1)]


def _packed(own: Sequence[list[Line]], most: int) -> list[list[Line]]:
    """As few packs of at most `most` lines as will do, about as large as each other; a row's lines stay together."""
    total = sum(map(len, own))
    share = math.ceil(total / math.ceil(total / most))
    packs: list[list[Line]] = [[]]
    for together in own:
        if packs[-1] and len(packs[-1]) + len(together) > share:
            packs.append([])
        packs[-1] += together
    return packs


def handles_of(lines: Iterable[Line]) -> list[Line2D]:
    """Entries of a legend."""
    return [Line2D([], [], label=line.label, **line.look) for line in lines]


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
                              Line2D([], [], color=GREY, linestyle=DASHES[1], label="held out")], width=width)
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
        axes[1].set(title="Lift, less its mean", ylabel=r"$\|\varphi - \overline{\varphi}\|$")
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


def legend_rows(handles: Sequence[Any], width: float = PAGE_IN, columns: int = 6) -> int:
    """Lines of a legend of at most `columns` entries a line, fewer where the longest label needs the room."""
    # a character is about 0.05 in wide, a handle and the gap after an entry 0.5 in
    longest = max(len(handle.get_label()) for handle in handles)
    return math.ceil(len(handles) / min(columns, max(1, int(width / (0.5 + 0.05 * longest)))))


def legend_below(figure: Figure | SubFigure, handles: Sequence[Any], columns: int = 6, width: float = PAGE_IN) -> None:
    """One legend for all panels, in lines of at most `columns` entries."""
    rows = legend_rows(handles, width, columns)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=math.ceil(len(handles) / rows),
                  columnspacing=1.4)
