"""Pictures of autoencoders show what they were given, and leave no room for what is missing."""

import numpy as np
import pytest

from latentlab.report.images import plot_effects, plot_images, plot_latents, plot_reconstructions


def shown(ax):
    return np.asarray(ax.images[0].get_array(), float)


def test_a_grid_holds_every_image_in_its_place():
    images = np.arange(5 * 2 * 3.0).reshape(5, 1, 2, 3)
    ax = plot_images(images, num_columns=3, names=["one", "two"])
    grid = ax.images[0].get_array()
    assert grid.shape == (5, 11)
    np.testing.assert_array_equal(grid[:2, 4:7], images[1, 0])
    np.testing.assert_array_equal(grid[3:, 4:7], images[4, 0])
    assert grid.mask[2].all()  # air between the rows
    assert grid.mask[3:, 8:].all()  # no sixth image
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]


def test_colours_are_clipped_and_missing_pixels_are_clear():
    images = np.full((2, 3, 2, 2), 1.5)
    images[0, 1, 0, 0] = np.nan
    grid = shown(plot_images(images))
    assert grid.shape == (2, 5, 4)
    assert grid[..., :3].max() == 1.0
    assert grid[0, 0, 3] == 0.0
    assert grid[1, 1, 3] == 1.0


def test_reconstructions_stand_below_their_images():
    images = np.random.default_rng(0).normal(size=(4, 1, 3, 3))
    ax = plot_reconstructions(images, -images)
    grid = ax.images[0].get_array()
    np.testing.assert_array_equal(grid[:3], -grid[4:])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["data", "decoded"]


def test_a_map_shows_the_dimensions_that_are_used_most():
    rng = np.random.default_rng(0)
    loc = rng.normal(size=(300, 4)) * [0.01, 1.0, 0.02, 1.0]
    scale = np.where(loc.std(0) > 0.5, 0.2, 1.0) * np.ones_like(loc)
    ax = plot_latents(loc, scale)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[1], mean", "z[3], mean")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), loc[:, 1])
    assert "2 of 4 dimensions are used" in ax.get_title(loc="left")
    line = plot_latents(loc[:, 1:2], scale[:, 1:2])
    assert line.get_xlabel() == "z[0], mean"


def test_a_map_draws_the_prior_that_there_is_and_no_other():
    loc = np.random.default_rng(0).normal(size=(30, 2))
    assert len(plot_latents(loc, np.ones_like(loc)).lines) == 3  # dots and two circles
    (dots,) = plot_latents(loc).lines
    np.testing.assert_array_equal(dots.get_xdata(), loc[:, 0])
    behind, dots = plot_latents(loc, prior=2 * loc).lines
    np.testing.assert_array_equal(behind.get_xdata(), 2 * loc[:, 0])
    assert behind.get_zorder() < dots.get_zorder()


def test_codes_that_are_all_equal_have_a_picture():
    plot_latents(np.full((5, 1), 3e4), np.ones((5, 1)))
    plot_latents(np.zeros((5, 2)))


def test_effects_stand_in_rows_of_latents_and_columns_of_the_table():
    effects = np.array([[1.0, -2.0, np.nan], [0.0, 0.5, 1.0]])
    ax = plot_effects(effects, ["a", "b", "c"], [1, 4])
    shown_ = ax.images[0].get_array()
    assert shown_.mask[0, 2]
    assert shown_[0, 1] == -2.0
    assert ax.images[0].get_clim() == (-2.0, 2.0)  # white is no change
    assert [t.get_text() for t in ax.get_yticklabels()] == ["z[1]", "z[4]"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_images(np.zeros((2, 8, 8))), r"images: expected shape \(N, C, H, W\)"),
        (lambda: plot_images(np.zeros((2, 2, 8, 8))), "with 1 or 3 channels"),
        (lambda: plot_images(np.zeros((0, 1, 8, 8))), "images: expected"),
        (
            lambda: plot_reconstructions(np.zeros((2, 1, 8, 8)), np.zeros((3, 1, 8, 8))),
            "reconstructions: expected shape",
        ),
        (lambda: plot_latents(np.zeros((2, 1)), np.zeros((2, 2))), "scale: expected shape"),
        (lambda: plot_effects(np.zeros((2, 1)), ["a"], [0]), "effects: expected shape"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
