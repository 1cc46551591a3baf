"""The benchmark of planning: the size of its grids, and a table with a row for each."""
import pytest

from tests.benchmarks.command import load

grid_scale = load("grid_scale")


@pytest.mark.parametrize("jobs, points", [(100, 20), (1_000, 240), (10_000, 2_500)])
def test_grids_have_about_so_many_points(jobs, points):
    grid = grid_scale.config_of(jobs)["grid"]
    assert len(grid["methods"]) * len(grid["ratios"]) * len(grid["k_max"]) == pytest.approx(points, rel=0.05)


def test_the_table_has_a_row_for_each_grid():
    text = grid_scale.table([grid_scale.Planned(20, 100, 9.0, 2.5, 181.2),
                             grid_scale.Planned(2000, 8000, 60.0, 24.0, 4e3)])
    assert text.splitlines()[2:] == ["| 20 | 100 | 9.0 | 2.5 | 25.0 | 181 |",
                                     "| 2,000 | 8,000 | 60.0 | 24.0 | 3.0 | 4,000 |"]
