"""Errors of the pruned models' states by layer.

No paper has this figure. If a panel would have too many lines, the lines are split into bands by what their methods do.
Each band also shows the lines of the other bands, in pale grey. All numbers come from kdp_core.score.diagnose; this
module only draws the numbers.
"""
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kdp_core.base.measurements import Diagnosis
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    GREY,
    PAGE_IN,
    PALE,
    Drawn,
    FigureError,
    Line,
    Looks,
    banded,
    deal,
    labels_of,
    lines_of,
    plain_log,
    whole_numbers,
)


def error_by_layer(diagnoses: Mapping[tuple[str, int], Diagnosis], *, looks: Looks | None = None,
                   width: float = PAGE_IN, height: float = 2.2) -> Drawn:
    """Relative squared error of the states of each pruned model. The horizontal axis shows the numbers that the states
    have in the dense model.

    diagnoses: the diagnosis of each pruned model, by (variant, K max).
    A line has a gap where layers are removed. A line begins at its first error above 0. Before the first removed layer
    the error is 0, and a logarithmic axis cannot show 0. An error of 1 means that a state is no better than a constant
    prediction, the mean state.
    Raises FigureError if there is no diagnosis with an error above 0.
    """
    label = labels_of([(method, "", k_max) for method, k_max in diagnoses])
    data = [{"method": method, "k_max": k_max, "state": state, "error": error, "cosine": cosine, "masked": masked,
             "tokens": own.tokens}
            for (method, k_max), own in diagnoses.items()
            for state, error, cosine, masked in zip(own.states, own.error, own.cosine, own.masked, strict=True)]
    if not any(row["error"] > 0 for row in data):
        raise FigureError("no error of states above 0 to draw: give the diagnosis of at least one pruned model")
    frame, last = pd.DataFrame(data), max(row["state"] for row in data)
    lines = lines_of([(method, k_max, label((method, "", k_max))) for method, k_max in diagnoses], looks)

    def draw(axes: Sequence[Axes], title: str, shown: Sequence[Line]) -> None:
        axis, = axes
        axis.axhline(1, color=GREY, linestyle=":", linewidth=0.9)
        for line in lines:
            own = frame[(frame["method"] == line.variant) & (frame["k_max"] == line.key)]
            error = own.set_index("state")["error"].reindex(range(last + 1))
            # every point has a marker, because no line connects a state between two gaps
            axis.plot(error.index, error.where(error > 0), **(line.marks | {"markersize": 2.4} if line in shown else {
                "color": PALE, "linewidth": 0.6, "zorder": 1}))
        axis.set(yscale="log", xlim=(-0.5, last + 0.5), xlabel="State of the dense model", ylabel="Relative error",
                 title=title)
        whole_numbers(axis.xaxis, 12)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.1), max(high, 2))  # the range is wide enough for plain ticks and extends beyond 1
        plain_log(axis)

    mean = Line2D([], [], color=GREY, linestyle=":", label="constant mean")
    return Drawn(banded(deal(lines, looks), (1, 1), draw, width=width, height=height, beside=[mean]), frame)


FIGURES = (
    Entry("errors", "Error of states",
          "The relative squared error between the states of the pruned models and those of the dense model, on "
          "held-out windows.",
          error_by_layer, scope="ratio", place=70, differs="in no paper"),
)
