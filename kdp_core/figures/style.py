"""The style of all figures: colours, sizes, the look of a variant, legends, bands of panels, and the saved files.

The style is plain and made for print, and the figures can be read in grey. If a figure is drawn twice from the same
records, the two files have the same bytes. Every function that draws returns the drawing with the numbers in it. `save`
writes the drawing as PDF and PNG, and the numbers as CSV. A variant looks the same in all figures (`marks`). Its colour
and marker depend on the position of its method in the list of methods, not on the other variants in the figure. If a
panel would have more than MOST_LINES lines, the lines are distributed over several panels, by what the methods do
(`deal`).
"""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

COLUMN_IN, PAGE_IN = 3.25, 6.75
"""Widths of a column and of the page in a two-column conference layout, in inches."""

# Okabe and Ito's palette without yellow (too faint on white), dark and light in turn
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
FILLS = ("none", "left", "bottom", "right", "top")
"""Fill styles of the markers, for the second and all further variants of a method. The markers of the first variant are
full."""
GREY, PALE = "#666666", "#cccccc"
MOST_LINES = 12
"""Largest number of lines that a reader can distinguish in one panel."""
LEGEND_LINE = 0.14
"""Height of a line of a legend, in inches."""

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
    """There is nothing to draw, or requested data are missing."""


class Drawn(NamedTuple):
    """A figure and the numbers in it."""
    figure: Figure
    data: pd.DataFrame


@contextmanager
def quiet() -> Iterator[None]:
    """Set the style of all figures, independent of the user's matplotlibrc, and restore the settings afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def save(drawn: Drawn, stem: str | Path, *, dpi: int = 200) -> list[Path]:
    """Write <stem>.pdf, <stem>.png and <stem>.csv atomically.

    The files contain no dates and no versions, so that equal input gives equal bytes.
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


# Looks of variants ----------------------------------------------------------------------------------------------------

Looks = Mapping[str, Sequence[Any]]
"""For each variant: its Look as a plain sequence. The workflow passes looks in this form."""


class Look(NamedTuple):
    """The facts that determine the look of a variant in every figure."""
    place: int
    """Position of the variant's method among the methods of the run, in the order of the list of methods."""
    number: int
    """0 for the variant that has the name of its method; 1, 2, ... for further variants of this method."""
    group: str
    """What the variant's method does, such as `layers removed`; variants of one group are drawn together."""
    own: bool = False
    """Whether the method was developed in this project. The lines of such a method are thicker, and the legend adds
    `ours`."""


class Line(NamedTuple):
    """One line of a figure that compares variants."""
    variant: str
    key: Any
    """What distinguishes the lines of one variant, such as (calibration set, K max)."""
    label: str
    marks: dict[str, Any]


def marks(look: Look) -> dict[str, Any]:
    """Colour, marker, fill of the marker, and the sizes by which this project's own methods are emphasised.

    The first 56 methods differ in colour or marker; variants of one method differ in the fill of the marker.
    """
    shift = max(look.number - 1, 0) // len(FILLS)
    made = {"color": COLORS[look.place % len(COLORS)], "marker": MARKERS[(look.place + shift) % len(MARKERS)]}
    made |= {"linewidth": 1.9, "markersize": 4.4} if look.own else {}
    return made | ({"fillstyle": FILLS[(look.number - 1) % len(FILLS)]} if look.number else {})


def looks_of(variants: Iterable[str], looks: Looks | None) -> dict[str, Look]:
    """The look of each variant. If `looks` is not given, the look depends on the order of the variants."""
    names = list(dict.fromkeys(variants))
    return {name: Look(*looks[name]) if looks else Look(place, 0, "") for place, name in enumerate(names)}


def lines_of(keys: Sequence[tuple[str, Any, str]], looks: Looks | None) -> list[Line]:
    """One line for each (variant, key, label), in the given order. Dashes distinguish the keys."""
    known, apart = looks_of([name for name, _, _ in keys], looks), list(dict.fromkeys(key for _, key, _ in keys))
    return [Line(name, key, f"{label} (ours)" if known[name].own else label,
                 marks(known[name]) | {"linestyle": DASHES[apart.index(key) % len(DASHES)]})
            for name, key, label in keys]


def labels_of(keys: Sequence[tuple[str, str, int]]) -> Callable[[tuple[str, str, int]], str]:
    """A function that labels lines (variant, calibration set, K max). A label names the variant, and also the
    calibration set or K max if the lines differ in it."""
    calibs, k_maxes = len({key[1] for key in keys}) > 1, len({key[2] for key in keys}) > 1
    return lambda key: key[0] + (f", {key[1]}" if calibs else "") + (f", K max {key[2]}" if k_maxes else "")


def deal(lines: Sequence[Line], looks: Looks | None, most: int = MOST_LINES) -> list[tuple[str, list[Line]]]:
    """The title and the lines of each panel.

    If all lines fit into one panel, this panel has no title. Otherwise each group has one or more panels, and small
    groups share a panel.
    """
    if len(lines) <= most:
        return [("", list(lines))]
    known = looks_of([line.variant for line in lines], looks)
    together = {name: [line for line in lines if line.variant == name] for name in known}
    groups = {group: [together[name] for name, look in known.items() if look.group == group]
              for group in dict.fromkeys(look.group for look in known.values())}
    while len(groups) > 1:
        # the two smallest groups share a panel if both fit into one panel
        one, two = sorted(sorted(groups, key=lambda group: sum(map(len, groups[group])))[:2], key=list(groups).index)
        if sum(map(len, groups[one] + groups[two])) > most:
            break
        groups = {f"{one}; {two}" if group == one else group: own + groups[two] if group == one else own
                  for group, own in groups.items() if group != two}
    return [(f"{group} ({number} of {len(packs)})" if len(packs) > 1 else group, pack)
            for group, own in groups.items() for packs in [_packed(own, most)] for number, pack in enumerate(packs, 1)]


def _packed(own: Sequence[list[Line]], most: int) -> list[list[Line]]:
    """The lines, distributed over as few packs as possible, with at most `most` lines in a pack. The packs are about
    equally large, and the lines of one variant stay together."""
    total = sum(map(len, own))
    share = math.ceil(total / math.ceil(total / most))
    packs: list[list[Line]] = [[]]
    for together in own:
        if packs[-1] and len(packs[-1]) + len(together) > share:
            packs.append([])
        packs[-1] += together
    return packs


def handles_of(lines: Iterable[Line]) -> list[Line2D]:
    """The legend entries of the lines."""
    return [Line2D([], [], label=line.label, **line.marks) for line in lines]


def banded(bands: Sequence[tuple[str, list[Line]]], shape: tuple[int, int],
           draw: Callable[[Sequence[Axes], str, Sequence[Line]], None], *, width: float, height: float,
           beside: Sequence[Line2D] = ()) -> Figure:
    """A figure of bands.

    Each band is a grid of panels that `draw` fills. The legend of a band lists the lines of the band and the handles in
    `beside`.
    """
    with quiet():
        handles = [[*handles_of(shown), *beside] for _, shown in bands]
        heights = [shape[0] * height + LEGEND_LINE * (legend_lines(own, width, 5) + 1) for own in handles]
        figure = Figure(figsize=(width, sum(heights)))
        parts: Sequence[Figure | SubFigure] = [figure] if len(bands) == 1 else list(
            figure.subfigures(len(bands), 1, squeeze=False, height_ratios=heights)[:, 0])
        for part, (title, shown), own in zip(parts, bands, handles, strict=True):
            draw(part.subplots(*shape, squeeze=False).ravel(), title, shown)
            legend_below(part, own, columns=5, width=width)
    return figure


# Axes and legends -----------------------------------------------------------------------------------------------------

def whole_numbers(axis: Any, most: int = 6) -> None:
    """Set about `most` ticks on an axis, all at whole numbers."""
    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))


def plain_log(axis: Axes) -> None:
    """Print plain numbers on a logarithmic y axis. If the axis covers at most a factor of 100, it also has ticks
    between the powers of ten."""
    low, high = axis.get_ylim()
    spread = high / low
    subs = ((1.0,) if spread > 100 else (1.0, 2.0, 5.0) if spread > 4 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
            if spread > 2 else tuple(1 + i / 4 for i in range(36)))
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend_lines(handles: Sequence[Any], width: float = PAGE_IN, columns: int = 6) -> int:
    """Number of text lines of a legend with at most `columns` entries in each text line.

    Long labels reduce the number of entries in a text line.
    """
    # in inches: a character is about 0.05 wide, and a handle with the gap after an entry is 0.5 wide
    longest = max(len(handle.get_label()) for handle in handles)
    return math.ceil(len(handles) / min(columns, max(1, int(width / (0.5 + 0.05 * longest)))))


def legend_below(figure: Figure | SubFigure, handles: Sequence[Any], columns: int = 6, width: float = PAGE_IN) -> None:
    """One legend for all panels, with at most `columns` entries in each text line."""
    lines = legend_lines(handles, width, columns)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=math.ceil(len(handles) / lines),
                  columnspacing=1.4)
