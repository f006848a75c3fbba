"""Folders of PNG files: what is read, and what a broken one gets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latentlab as ll
from latentlab.data.images import as_images

Image = pytest.importorskip("PIL.Image")


def write(folder, name, cells):
    Image.fromarray(np.asarray(cells)).save(folder / name)


def test_grey_values_come_back_as_shares_in_the_order_of_names(tmp_path):
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (3, 4, 6), dtype=np.uint8)
    for name, image in zip(("b.png", "a.png", "c.PNG"), cells, strict=True):
        write(tmp_path, name, image)
    (tmp_path / "notes.txt").write_text("no image")
    images = ll.data.load_images(tmp_path)
    assert images.names == ("a.png", "b.png", "c.PNG")
    assert images.x.dtype == torch.float32
    assert np.array_equal(images.x[:, 0].numpy(), cells[[1, 0, 2]].astype(np.float32) / 255)


def test_colours_are_channels(tmp_path):
    cells = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    write(tmp_path, "a.png", cells)
    assert ll.data.load_images(tmp_path).x.shape == (1, 1, 4, 6)
    colours = ll.data.load_images(tmp_path, grey=False).x[0]
    assert np.allclose(colours.numpy(), cells.transpose(2, 0, 1) / 255, atol=1e-7)


def test_sixteen_bits_reach_white_at_one(tmp_path):
    write(tmp_path, "a.png", np.array([[0, 65_535], [32_768, 1]], np.uint16))
    x = ll.data.load_images(tmp_path).x[0, 0]
    assert x[0].tolist() == [0.0, 1.0]
    assert x[1, 0].item() == pytest.approx(32_768 / 65_535)


def test_transparent_pixels_are_white(tmp_path):
    write(tmp_path, "a.png", np.zeros((2, 2, 4), np.uint8))
    assert ll.data.load_images(tmp_path).x.min() == 1.0


def test_one_bit_and_palette_images_are_read(tmp_path):
    Image.new("1", (3, 2), 1).save(tmp_path / "a.png")
    Image.new("RGB", (3, 2), "white").convert("P").save(tmp_path / "b.png")
    assert ll.data.load_images(tmp_path).x.min() == 1.0


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255))
def test_resizing_keeps_an_even_grey_and_gives_the_size(tmp_path_factory, height, width, grey):
    folder = tmp_path_factory.mktemp("even")
    write(folder, "a.png", np.full((5, 7), grey, np.uint8))
    write(folder, "b.png", np.full((2, 3), grey, np.uint8))
    x = ll.data.load_images(folder, size=(height, width)).x
    assert x.shape == (2, 1, height, width)
    assert np.allclose(x.numpy(), grey / 255, atol=1e-6)


def test_halving_averages_blocks(tmp_path):
    cells = np.random.default_rng(2).integers(0, 256, (4, 6), dtype=np.uint8)
    write(tmp_path, "a.png", cells)
    blocks = cells.reshape(2, 2, 3, 2).mean((1, 3)) / 255
    x = ll.data.load_images(tmp_path, size=(2, 3)).x[0, 0]
    assert np.allclose(x.numpy(), blocks, atol=1e-6)


def test_images_of_several_sizes_are_refused_by_name(tmp_path):
    write(tmp_path, "a.png", np.zeros((4, 6), np.uint8))
    write(tmp_path, "b.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(ValueError, match=r"b\.png: expected 4 x 6 .* got 6 x 4; .*size=\(4, 6\)"):
        ll.data.load_images(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected PNG files, found 'x\.jpg'"):
        ll.data.load_images(tmp_path)


@pytest.mark.parametrize("cut", [0, 20, 60])
def test_a_broken_file_is_named(tmp_path, cut):
    write(tmp_path, "a.png", np.random.default_rng(3).integers(0, 256, (9, 9), dtype=np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"b\.png: not readable as PNG"):
        ll.data.load_images(tmp_path)


def test_another_kind_of_file_with_the_ending_is_named(tmp_path):
    (tmp_path / "a.png").write_text("col\n1\n")
    with pytest.raises(ValueError, match=r"a\.png: not readable as PNG"):
        ll.data.load_images(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        ll.data.load_images(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ll.data.load_images(tmp_path / "absent")


@pytest.mark.parametrize("size", [8, (8,), (8, 0), (8, 2.5), "88", (True, 8)])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    write(tmp_path, "a.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(ValueError, match="size: expected"):
        ll.data.load_images(tmp_path, size=size)


IMAGES = np.random.default_rng(0).random((4, 1, 2, 3))


def changed(place, value):
    images = IMAGES.copy()
    images[place] = value
    return images


@pytest.mark.parametrize("kind", [np.array, torch.tensor, np.ndarray.tolist])
def test_images_of_any_kind_are_numbers(kind):
    found = as_images(kind(IMAGES), (1, 2, 3))
    assert found.dtype == (torch.float64 if kind is torch.tensor else torch.float32)
    np.testing.assert_allclose(found.numpy(), IMAGES, rtol=1e-6)
    assert as_images((IMAGES > 0.5), (1, 2, 3)).unique().tolist() == [0.0, 1.0]


def test_a_missing_pixel_stays_missing():
    assert as_images(changed((2, 0, 1, 1), np.nan), (1, 2, 3)).isnan().sum() == 1


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (changed((2, 0, 1, 1), np.inf), ValueError, r"1 inf \(first at \[2, 0, 1, 1\]\)"),
        (changed((2, 0, 1, 1), 1e200), ValueError, "beyond 2e\\+123"),
        (changed((slice(None), 0, 1, 1), np.nan), ValueError, r"first at \[0, 1, 1\]"),
        (IMAGES[:, 0], ValueError, r"expected shape \(N, 1, 2, 3\) .* got \(4, 2, 3\)"),
        (IMAGES[:1], ValueError, "at least 2 images, got 1"),
        (IMAGES.astype(str), TypeError, "got text"),
        (IMAGES + 0j, TypeError, "complex128"),
    ],
    ids=str,
)
def test_images_that_cannot_be_computed_with_are_named(x, error, says):
    with pytest.raises(error, match=says):
        as_images(x, (1, 2, 3), min_rows=2)


def test_images_that_are_all_equal_are_told():
    with pytest.warns(UserWarning, match="all 4 images are equal"):
        as_images(np.full((4, 1, 2, 3), 0.5), (1, 2, 3), min_rows=2)
