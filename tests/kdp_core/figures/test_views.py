"""Heat maps and paths: what is drawn equals what was given, on the ranges that are promised, the same bytes twice."""
import numpy as np
import pytest
import torch

from kdp_core.base.measurements import KernelView, Trajectories
from kdp_core.figures import style
from kdp_core.figures import views as views_figures
from kdp_core.figures.style import FigureError
from kdp_core.study import views


def view(positions=(0, 25, 50), features=32, seed=0, mean=True):
    generator = torch.Generator().manual_seed(seed)
    true_PF = torch.randn(len(positions), features, generator=generator)
    predicted_PF = true_PF + 0.1 * torch.randn(true_PF.shape, generator=generator)
    errors = [0.01 * (place + 1) for place in range(len(positions))]
    return KernelView((5, 7), 13, list(positions), predicted_PF, true_PF, torch.full((features,), float(mean)), errors,
                      [error / 10 for error in errors], 0.02, 0.3, 0.95)


def trajectories(samples=4, layers=12, own_neighbour=0.5):
    generator = torch.Generator().manual_seed(0)
    h_SLD = torch.randn(samples, layers, 5, generator=generator).cumsum(1)
    walk_SLD = views.unrelated_walk(h_SLD, generator)
    found = views.Paths(list(range(layers)), list(range(samples)), [9] * samples, h_SLD, h_SLD[..., :2].clone(),
                        walk_SLD, walk_SLD[..., :2].clone())
    return Trajectories(*found[:3], found.xz_SL2, views.straightness_table(found), own_neighbour)


def images(drawn):
    return [axis.images[0] for axis in drawn.figure.axes if axis.images]


def test_every_panel_holds_its_features_on_the_promised_range():
    own = view()
    drawn = views_figures.heat_maps({"5-7": own})
    found = images(drawn)
    assert len(found) == 9
    for place in range(3):
        predicted, true, difference = found[3 * place:3 * place + 3]
        np.testing.assert_allclose(predicted.get_array().ravel(), own.predicted_PF[place])
        np.testing.assert_allclose(true.get_array().ravel(), own.true_PF[place])
        np.testing.assert_allclose(difference.get_array().ravel(), own.predicted_PF[place] - own.true_PF[place])
        assert predicted.get_clim() == true.get_clim() == found[0].get_clim()
        low, high = difference.get_clim()
        assert low == -high and high == pytest.approx(float((own.predicted_PF - own.true_PF).abs().max()))
    assert found[0].get_array().shape == (4, 8)
    low, high = found[0].get_clim()
    assert low <= min(own.true_PF.min(), own.predicted_PF.min()) and high >= own.true_PF.max()


def test_every_position_says_its_error_and_every_band_its_block():
    drawn = views_figures.heat_maps({"5-7": view(), "8-9": view((1, 25), seed=1)})
    titles = [axis.get_title(loc="left") for axis in drawn.figure.axes if "position" in axis.get_title(loc="left")]
    assert titles == ["position 0: error 0.010", "position 25: error 0.020", "position 50: error 0.030",
                      "position 1: error 0.010", "position 25: error 0.020"]
    bands = [band.get_suptitle() for band in drawn.figure.subfigs]
    assert bands[0].startswith("Block 5-7: error over all held-out tokens 0.020, 0.300 if") and "95%" in bands[0]
    assert "less their mean" in drawn.figure.get_suptitle() and "sequence 13" in drawn.figure.get_suptitle()
    plain = views_figures.heat_maps({"5-7": view(mean=False)})
    assert "as they are" in plain.figure.get_suptitle()


def test_data_repeats_every_feature_with_its_errors():
    own = view()
    rows = views_figures.heat_maps({"5-7": own}).data
    assert len(rows) == 3 * 32
    last = rows[(rows["position"] == 50) & (rows["feature"] == 31)].iloc[0]
    assert last["predicted"] == float(own.predicted_PF[2, 31]) and last["true"] == float(own.true_PF[2, 31])
    assert (last["block"], last["sequence"], last["error"], last["error_raw"]) == ("5-7", 13, 0.03, 0.003)


@pytest.mark.parametrize("features, shape", [(1024, (32, 32)), (512, (16, 32)), (256, (16, 16)), (2048, (32, 64)),
                                             (2, (1, 2)), (18, (3, 6)), (26, (2, 13))])
def test_squarest_grid(features, shape):
    assert views_figures.grid_of(features) == shape


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_positions(count, tmp_path):
    drawn = views_figures.heat_maps({"5-7": view(range(count))})
    assert len(images(drawn)) == 3 * count
    style.save(drawn, tmp_path / "few", dpi=40)


def test_paths_are_drawn_as_given():
    found = trajectories(own_neighbour=0.875)
    drawn = views_figures.paths(found)
    space, chord, turn = drawn.figure.axes
    assert len(space.get_lines()) == 4
    x_L, y_L, z_L = space.get_lines()[2].get_data_3d()
    np.testing.assert_allclose(x_L, found.xz_SL2[2, :, 0])
    assert list(y_L) == found.layers
    np.testing.assert_allclose(z_L, found.xz_SL2[2, :, 1])
    assert space.get_ylabel() == "State" and "88%" in drawn.figure.get_suptitle()
    table = {(row["space"], row["run"]): row for row in found.straightness}
    runs = ["3 steps", "4 steps", "5 steps", "6 steps", "inner", "all"]
    for axis, field in ((chord, "chord"), (turn, "turn")):
        drawn_lines = [line.get_ydata().tolist() for line in axis.get_lines()]
        assert drawn_lines == [[table[space, run][field + suffix] for run in runs]
                               for space in ("states", "t-SNE") for suffix in ("", "_unrelated")]
    assert [text.get_text() for text in turn.get_xticklabels()][-2:] == ["1-10", "0-11"]
    assert len(drawn.figure.legends[0].get_texts()) == 4
    assert len(drawn.data) == 48 and drawn.data.iloc[13].to_dict() == {
        "sequence": 1, "token": 9, "layer": 1, "x": float(found.xz_SL2[1, 1, 0]), "z": float(found.xz_SL2[1, 1, 1])}


def test_nothing_to_draw():
    with pytest.raises(FigureError, match="no trained block"):
        views_figures.heat_maps({})
    with pytest.raises(FigureError, match="no measures"):
        views_figures.paths(trajectories()._replace(straightness=[]))


def test_same_bytes_twice(tmp_path):
    found = trajectories()
    for name in ("one", "two"):
        style.save(views_figures.heat_maps({"5-7": view()}), tmp_path / f"heat-{name}", dpi=50)
        style.save(views_figures.paths(found), tmp_path / f"way-{name}", dpi=50)
    for kind in ("heat", "way"):
        for suffix in ("png", "pdf", "csv"):
            one, two = ((tmp_path / f"{kind}-{name}.{suffix}").read_bytes() for name in ("one", "two"))
            assert one == two
