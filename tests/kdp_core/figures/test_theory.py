"""Figure of Theorems 1 and 2: what is drawn equals the record."""
import pytest

from kdp_core.base.measurements import Theory
from kdp_core.figures import style
from kdp_core.figures import theory as theory_figures
from kdp_core.figures.style import FigureError

ERRORS = {"accumulation": 1.0, "train_rms": 0.1, "rms": 0.11, "p99": 0.3, "largest": 0.5, "bound_products": 0.12,
          "bound_steps": 0.13, "bound_erm": 0.14, "bound": 1.5, "bound_equation_9": 9.0, "trivial": 2.0,
          "constant": 0.4, "beyond": 0.2, "samples_needed": 1e6, "vacuous": False, "vacuous_erm": False,
          "uninformative": True}


def horizon(start, k, **changed):
    return ERRORS | {"start": start, "horizon": k, "rms": 0.11 * k} | changed


def risk(space, features, scale, tokens, gap=2, error=0.2, stderr=0.01):
    return {"gap": gap, "space": space, "features": features, "bandwidth_scale": scale, "share": tokens / 1000,
            "tokens": tokens, "risk": 0.01, "train_risk": 0.009, "relative_risk": 0.05, "state_error": error,
            "state_error_stderr": stderr, "state_median": 0.04, "direct_error": 0.15,
            "operator_norm": 1.1, "state_excess": 0.1, "state_excess_stderr": stderr}


def record():
    risks = [risk("identity", 6, None, 1000, error=0.1), risk("identity", 6, None, 500, error=0.3),
             risk("random", 32, 3.0, 1000), risk("random", 32, 3.0, 500, error=0.4), risk("random", 64, 3.0, 1000,
             error=0.12, stderr=None), risk("random", 32, 30.0, 1000, error=0.25), risk("learned", 32, None, 1000)]
    conditions = [{"gap": 2, "space": "random", "features": 32, "bandwidth_scale": 3.0, "tokens": 1000, "risk": 0.01,
                   "identity_risk": 40.0, "margin": 39.99, "b_a": 1.2, "r_h": 90.0, "samples_printed": 0.0,
                   "samples_proof": 3e9, "holds": True, "holds_without_fit": True, "better_state": False,
                   "state_excess": 0.1, "state_excess_stderr": 0.02}]
    horizons = [horizon(5, 1), horizon(5, 2, vacuous=True, bound=3.0), horizon(6, 1, rms=0.9)]
    ridges = [{"ridge": 1e-2, "l_erm": 0.02, "b_a": 1.0, "train_rms": 0.2, "rms": 0.3, "accumulation": 2.0,
               "bound_erm": 0.28, "bound": 4.0, "trivial": 2.0, "constant": 0.4, "vacuous": True, "vacuous_erm": False}]
    return Theory((5, 7), 32, "raw", 0.05, 1000, 40, 120, 0.01, [0.01, 0.008], 1.01, [1.01, 0.99], 1.0, 2.0, 9.0,
                  horizons, ridges, [risk("identity", 6, None, 1000, gap=1), risk("random", 32, 3.0, 1000, gap=1),
                                     *risks], conditions, {})


def lines(axis):
    """Points of every line by its label."""
    handles, labels = axis.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        found[label] = list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
    return found


def test_panels_show_the_record():
    drawn = theory_figures.theorems(record())
    first, second, third, fourth = drawn.figure.axes
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in drawn.figure.axes)
    assert [axis.get_yscale() for axis in drawn.figure.axes] == ["log", "linear", "linear", "log"]
    found = lines(first)
    assert list(found) == [label for label, *_ in theory_figures.BOUNDS.values()]
    # from the run's first state only
    assert found["held-out root mean square"] == [(1, 0.11), (2, 0.22)]
    assert found["bound, C = 1"] == [(1, 1.5), (2, 3.0)]
    # the longest gap only, one change at a time
    assert lines(second)["random features"] == [(32, 0.2), (64, 0.12)]
    assert {y for _, y in lines(second)["linear map of states"]} == {0.1}
    assert lines(third)["random features"] == [(500, 0.4), (1000, 0.2)]
    assert lines(third)["linear map of states"] == [(500, 0.3), (1000, 0.1)]
    assert lines(fourth)["error of the decoded state"] == [(3, 0.2), (30, 0.25)]
    assert [axis.get_title(loc="left") for axis in (first, second)] == [
        "Theorem 1, from state 5", "Theorem 2, state 5 to 7, by dimension"]
    assert len(drawn.data) == 3 + 9 and set(drawn.data["theorem"]) == {1, 2}


def test_the_same_bytes_twice(tmp_path):
    for name in ("a", "b"):
        style.save(theory_figures.theorems(record()), tmp_path / name, dpi=60)
    assert all((tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()
               for form in ("png", "pdf", "csv"))


def test_a_record_without_rows_is_refused():
    with pytest.raises(FigureError, match="run the stage again"):
        theory_figures.theorems(record()._replace(horizons=[]))
