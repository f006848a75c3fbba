"""The pictures show the numbers they are given, and leave the caller's matplotlib alone."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import latentlab as ll
from latentlab.report import (
    figure_svg,
    plot_intervals,
    plot_khat,
    plot_losses,
    plot_mixture,
    plot_predictive,
)
from latentlab.report.canvas import rounded

NAMES = ("length", "mass", "age", "dose")


def draws_of(num_components, num_features, num_samples=40):
    """Draws of a mixture with components four sds apart in every column but the first."""
    r = np.random.default_rng(0)
    centre = 4.0 * np.arange(num_components)[:, None] * (np.arange(num_features) > 0)
    shape = (num_samples, num_components, num_features)
    weights = r.dirichlet(np.full(num_components, 50.0), num_samples)
    return weights, centre + 0.1 * r.normal(size=shape), np.exp(0.1 * r.normal(size=shape))


def rows_of(num_rows, num_features):
    return np.random.default_rng(1).normal(size=(num_rows, num_features))


def points_of(ax):
    return np.concatenate([np.c_[line.get_data()] for line in ax.lines])


@pytest.mark.parametrize("num_components", [1, 2, 12])
def test_ellipses_stand_at_the_mean_of_the_draws(num_components):
    weights, locs, scales = draws_of(num_components, 2)
    ax = plot_mixture(rows_of(30, 2), weights, locs, scales, NAMES[:2])
    ellipses = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    assert np.allclose([e.center for e in ellipses], locs.mean(0).repeat(2, 0))
    sizes = np.array([(e.width, e.height) for e in ellipses]).reshape(num_components, 2, 2)
    assert np.allclose(sizes, 2 * scales.mean(0)[:, None] * [[[1], [2]]])  # 1 and 2 sd


def test_every_row_is_drawn_in_the_colour_of_its_most_probable_component():
    x = np.array([[0.0, 0.1], [0.0, 3.9], [0.3, 4.2]])
    ax = plot_mixture(x, *draws_of(2, 2), NAMES[:2])
    first, second = (np.c_[line.get_data()] for line in ax.lines)
    assert np.array_equal(first, x[:1])
    assert np.array_equal(second, x[1:])
    assert ax.lines[0].get_color() != ax.lines[1].get_color()


def test_of_many_columns_those_are_drawn_that_tell_components_apart():
    weights, locs, scales = draws_of(2, 4)
    scales[:, :, 2] *= 10  # as far apart as the others, in units of x only
    x = rows_of(20, 4)
    ax = plot_mixture(x, weights, locs, scales, NAMES)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("mass", "dose")
    assert "two of 4 columns" in ax.get_title("left")
    assert sorted(points_of(ax).tolist()) == sorted(x[:, [1, 3]].tolist())


def test_rows_with_a_missing_cell_are_left_out_and_counted():
    x = rows_of(20, 2)
    x[3, 0] = x[7, 1] = np.nan
    ax = plot_mixture(x, *draws_of(2, 2), NAMES[:2])
    assert len(points_of(ax)) == 18
    assert "2 rows with a missing cell" in ax.get_title("left")


def test_a_missing_cell_out_of_sight_does_not_hide_its_row():
    x = 0.1 * rows_of(20, 3)
    x[8:] += 4.0
    x[:, 0] = np.nan
    ax = plot_mixture(x, *draws_of(2, 3), NAMES[:3])
    assert [len(line.get_xdata()) for line in ax.lines] == [8, 12]


def test_many_rows_are_thinned_and_the_title_says_so():
    ax = plot_mixture(rows_of(100_000, 2), *draws_of(2, 2), NAMES[:2])
    assert len(points_of(ax)) == 2000
    assert "2,000 of 100,000 rows" in ax.get_title("left")
    assert len(figure_svg(ax.figure)) < 200_000


def test_one_column_shows_a_density_that_holds_all_mass():
    weights, locs, scales = draws_of(3, 1)
    x = rows_of(500, 1)
    x[4] = np.nan
    ax = plot_mixture(x, weights, locs + [[0.0], [4.0], [8.0]], scales, NAMES[:1])
    curves = {line.get_label(): np.trapezoid(*line.get_data()[::-1]) for line in ax.lines}
    assert curves.pop("fitted density, 90 % band") == pytest.approx(1.0, abs=0.01)
    assert list(curves.values()) == pytest.approx(weights.mean(0), abs=0.01)
    (bars,) = ax.patches
    heights, edges, _ = bars.get_data()
    assert heights @ np.diff(edges) == pytest.approx(1.0)


@pytest.mark.parametrize("num_features", [1, 2, 3])
@pytest.mark.parametrize("x", ["one row", "no cell", "a constant"])
def test_poor_data_are_drawn_too(num_features, x):
    rows = {"one row": rows_of(1, num_features), "no cell": np.full((3, num_features), np.nan)}
    x = rows.get(x, np.ones((50, num_features)))
    ax = plot_mixture(x, *draws_of(1, num_features), NAMES[:num_features])
    assert figure_svg(ax.figure).startswith("<svg")
    figure = plot_predictive(x, np.stack([x, x]), NAMES[:num_features])
    assert figure_svg(figure).startswith("<svg")


def test_shapes_that_do_not_agree_are_named():
    weights, locs, scales = draws_of(2, 2)
    with pytest.raises(ValueError, match=r"locs: expected shape \(40, 2, 2\), got \(40, 2, 1\)"):
        plot_mixture(rows_of(5, 2), weights, locs[:, :, :1], scales, NAMES[:2])
    with pytest.raises(ValueError, match=r"x: expected shape \(5, 3\), got \(5, 2\)"):
        plot_mixture(rows_of(5, 2), weights, locs, scales, NAMES[:3])


def test_losses_show_each_stage_its_elbo_and_the_stop():
    losses = 100 + 1e6 * np.exp(-np.arange(3000.0))
    ax = plot_losses(losses, (0, 1000, 2500), (-101.0, -100.5, -100.0), stop_reason="$ it is $")
    stages = [line for line in ax.lines if line.get_label() == "_stage"]
    assert [line.get_xdata()[0] for line in stages] == [0, 1000, 2500]
    ends = next(line for line in ax.lines if "ELBO" in line.get_label())
    assert np.array_equal(np.c_[ends.get_data()], [[1000, 101], [2500, 100.5], [3000, 100]])
    assert ax.get_title("left") == r"stopped: \$ it is \$"
    assert ax.get_ylim()[1] < 110  # the steep beginning does not flatten the end


def test_a_climb_that_is_judged_by_rows_kept_aside_says_so():
    x = torch.randn(60, 1, dtype=torch.float64)
    flow = ll.fit(ll.FlowDensity(num_features=1), x, max_steps=20, progress=False)
    normal = ll.fit(ll.GaussianMixture(1, 1), x, max_steps=200, held_out=0.2, progress=False)
    for posterior, rows in ((flow, "rows kept aside"), (normal, "ELBO")):
        labels = posterior.plot("losses").get_legend_handles_labels()[1]
        assert labels == ["loss", f"{rows}, at a stage's end"]


def test_losses_draw_the_median_of_blocks_and_skip_what_is_not_finite():
    losses = np.tile([1.0, 2.0, 9.0], 240)
    losses[5] = np.inf
    ax = plot_losses(losses, (0,))
    line = next(line for line in ax.lines if line.get_label() == "loss")
    assert len(line.get_xdata()) == 240
    assert set(line.get_ydata()[2:]) <= {1.5, 2.0, 5.5, 9.0}


@pytest.mark.parametrize("losses", [[], [1.0], [np.nan, np.nan], [2.0, 2.0]])
def test_short_climbs_are_drawn(losses):
    assert figure_svg(plot_losses(np.array(losses), (0,), (-1.0,)).figure)


def test_intervals_are_drawn_and_written_from_the_top():
    ax = plot_intervals(["a", "b"], np.array([2.0, 1234.5]), np.array([1.0, 1e3]), [3.0, 2e3])
    (dots,) = ax.lines
    assert np.array_equal(np.c_[dots.get_data()], [[2.0, 0], [1234.5, 1]])
    ends = [segment[:, 0].tolist() for segment in ax.collections[0].get_segments()]
    assert ends == [[1.0, 3.0], [1e3, 2e3]]
    assert [t.get_text() for t in ax.texts] == ["2.00  [1.00, 3.00]", "1234  [1000, 2000]"]
    assert ax.yaxis_inverted()


def test_a_number_without_an_interval_is_written_alone():
    ax = plot_intervals(["a"], np.array([2.0]), np.array([2.0]), np.array([2.0]))
    assert [t.get_text() for t in ax.texts] == ["2.000"]


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (79.98342, 1.47, "79.98"),
        (1004290159.3, 1e5, "1004290159"),
        (0.3565, 0.0961, "0.3565"),
        (-0.0001357, 0.3007, "0.000"),
        (-0.0301357, 0.3007, "-0.030"),
        (1234.5, 1000.0, "1234"),
        (2.0377e-06, 9.05e-08, "2.0377e-06"),
        (5.89e-06, 1.37e-06, "5.89e-06"),
        (1.5e15, 2e14, "1.500e+15"),
        (1e-9, 2.0, "0.00"),
        (3.0, 0.0, "3.000"),
        (3.0, np.inf, "3.000"),
        (np.nan, 1.0, "nan"),
        (np.inf, 1.0, "inf"),
    ],
)
def test_a_number_is_written_to_three_digits_of_its_width(value, width, text):
    assert rounded(value, width) == text


def test_long_names_do_not_crowd_the_picture_out():
    """Matplotlib would warn that it finds no room for the axes, and a warning is an error here."""
    long = "a name of a column that goes on and on, with $ and \\ in it, to no end" * 2
    weights, locs, scales = draws_of(2, 2)
    x = rows_of(30, 2)
    figures = [
        plot_mixture(x, weights, locs, scales, [long, long]).figure,
        plot_mixture(x[:, :1], weights, locs[:, :, :1], scales[:, :, :1], [long]).figure,
        plot_intervals([long] * 3, np.ones(3), np.zeros(3), np.full(3, 2.0)).figure,
        plot_khat([long], [0.3], [0.1]).figure,
        plot_predictive(x, np.stack([x, x]), [long, long]),
    ]
    for figure in figures:
        figure.canvas.draw()
        for ax in figure.axes:
            assert ax.get_position().width > 0.2
            assert ax.get_position().height > 0.2


def test_khat_dots_stand_at_their_values_and_the_others_at_the_edges():
    khat, se = np.array([0.3, -np.inf, 0.9, np.inf, np.nan]), [0.1, np.nan, np.nan, 0.0, np.inf]
    ax = plot_khat(["a", "b", "c", "d", "e"], khat, se)
    left, right = ax.get_xlim()
    marks = [tuple(np.ravel(line.get_data())) for line in ax.lines if line.get_marker() != "None"]
    assert marks == [(0.3, 0), (left, 1), (0.9, 2), (right, 3), (right, 4)]
    words = [text.get_text() for text in ax.texts]
    assert words == ["good", "strained", "bad", "exact", "not finite", "not finite"]
    bars = [c.get_segments()[0][:, 0] for c in ax.collections if hasattr(c, "get_segments")]
    assert np.allclose(bars[0], [0.2, 0.4])
    assert left < 0
    assert right > 0.9


def test_khat_bands_end_at_half_and_seven_tenths():
    ax = plot_khat(["a"], np.array([-np.inf]), np.array([np.nan]))
    edges = {round(x, 6) for p in ax.patches for x in (p.get_x(), p.get_x() + p.get_width())}
    assert {0.5, 0.7} < edges


def test_predictive_draws_the_distribution_of_the_data_over_those_of_new_data():
    x = np.array([[3.0], [1.0], [np.nan], [2.0]])
    x_new = np.arange(8.0).reshape(2, 4, 1)
    (ax,) = plot_predictive(x, x_new, NAMES[:1]).axes
    data = next(line for line in ax.lines if line.get_label() == "data")
    assert np.allclose(np.c_[data.get_data()], [[1, 0], [1, 1 / 3], [2, 2 / 3], [3, 1]])
    first = ax.lines[0].get_xdata()  # cell 2 is missing in the data, so it is not compared
    assert first.tolist() == [0, 0, 1, 3]


def test_of_many_columns_the_check_shows_those_that_differ_most():
    r = np.random.default_rng(0)
    x, x_new = r.normal(size=(200, 9)), r.normal(size=(20, 200, 9))
    x[:, [0, 2, 3, 5, 7, 8]] += 3
    figure = plot_predictive(x, x_new, [f"c{d}" for d in range(9)])
    assert [ax.get_xlabel() for ax in figure.axes] == ["c0", "c2", "c3", "c5", "c7", "c8"]
    assert "6 of 9 columns" in figure.axes[0].get_title("left")


def test_pictures_are_drawn_on_the_axes_that_are_handed_in():
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plot_intervals(["a"], [1.0], [0.0], [2.0], ax=axes[0]) is axes[0]
    assert plot_predictive(rows_of(5, 2), rows_of(15, 2).reshape(3, 5, 2), "ab", axes) is figure
    assert len(figure.axes) == 2
    with pytest.raises(ValueError, match="ax: expected shape"):
        plot_predictive(rows_of(5, 2), rows_of(15, 2).reshape(3, 5, 2), "ab", axes[0])


def test_names_are_written_as_they_are():
    hostile = ["$\\frac{", "a & <b> \x00"]
    ax = plot_mixture(rows_of(9, 2), *draws_of(2, 2), hostile)
    svg = figure_svg(ax.figure)
    assert "$\\frac{</text>" in svg
    assert "a &amp; &lt;b&gt;" in svg


def test_a_glyph_that_our_font_lacks_is_left_to_the_reader():
    ax = plot_intervals(["長さ"], [1.0], [0.0], [2.0])
    assert "長さ" in figure_svg(ax.figure)


def test_nothing_of_matplotlib_is_changed():
    before = dict(matplotlib.rcParams)
    axes = [
        plot_mixture(rows_of(9, 2), *draws_of(2, 2), NAMES[:2]),
        plot_losses(np.ones(9), (0,)),
        plot_khat(["a"], [0.1], [0.1]),
        plot_intervals(["a"], [1.0], [0.0], [2.0]),
    ]
    for ax in axes:
        figure_svg(ax.figure)
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")  # another test may have asked for it
    assert pyplot is None or not pyplot.get_fignums()
