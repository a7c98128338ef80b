"""Pictures: sizes by arithmetic, pixels by colour, files whole or absent."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.errors import UserError
from moe_diffusion.figures import images as figures
from tests import cli


def _ramp(count, side=8, channels=1):
    """Image i is constant, from black (-1) to white (1)."""
    values = np.linspace(-1, 1, count, dtype=np.float32)
    return np.broadcast_to(values[:, None, None, None], (count, side, side, channels)).copy()


def test_grid_size_and_tiles_without_text():
    grid = figures.image_grid(_ramp(6), columns=3, scale=2)
    # Tiles of 16 with gaps of 3 between them, a margin of 4 gaps around.
    assert grid.size == (3 * 16 + 2 * 3 + 24, 2 * 16 + 3 + 24)
    pixels = np.asarray(grid)
    for i, grey in enumerate([0, 51, 102, 153, 204, 255]):
        y, x = 12 + 19 * (i // 3), 12 + 19 * (i % 3)
        assert (pixels[y : y + 16, x : x + 16] == grey).all()
    assert (pixels[:12] == 255).all() and (pixels[12 + 16 : 12 + 19] == 255).all()


def test_wide_images_with_captions():
    """Tiles of 16 x 64: small images grow by the longer side."""
    images = np.ones((4, 2, 8, 1), np.float32)
    grid = figures.image_grid(images, list("abcd"), columns=2)
    plain = figures.image_grid(-images, columns=2)
    assert plain.size == (2 * 64 + 3 + 24, 2 * 16 + 3 + 24)
    dark = np.argwhere(np.asarray(plain.convert("L")) == 0)
    assert dark.min(0).tolist() == [12, 12] and len(dark) == 4 * 16 * 64
    assert grid.width == plain.width and grid.height > plain.height


def test_pictures_need_no_model():
    """Nor jax, whose import takes a second."""
    code = "import sys; from moe_diffusion.figures import curves, images, routing; "
    code += "sys.exit('jax' in sys.modules or 'moe_diffusion.models' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cli.ROOT)


def test_small_images_grow_and_large_ones_stay():
    assert figures.image_grid(_ramp(1, 8)).size == (64 + 24, 64 + 24)
    assert figures.image_grid(_ramp(1, 200)).size == (200 + 80, 200 + 80)


def test_upscaling_keeps_pixels_sharp():
    image = np.array([[-1, 1], [1, -1]], np.float32).reshape(1, 2, 2, 1)
    tile = np.asarray(figures.image_grid(image, scale=32).convert("L"))[12:76, 12:76]
    np.testing.assert_array_equal(tile, np.kron([[0, 255], [255, 0]], np.ones((32, 32))))


def test_one_caption_a_row_stands_left_others_below():
    images = np.ones((4, 8, 8, 1), np.float32)  # white on white: all ink is text
    plain = figures.image_grid(images, columns=2)
    by_row = figures.image_grid(images, [3, 3, 5, 5], columns=2)
    assert by_row.height == plain.height and by_row.width > plain.width
    ink = np.asarray(by_row.convert("L")) < 200
    assert ink[:, : by_row.width - plain.width + 12].sum() == ink.sum() > 10
    below = figures.image_grid(images, [3, 5, 3, 5], columns=2)
    assert below.width == plain.width and below.height > plain.height
    ink = np.asarray(below.convert("L")) < 200
    assert ink[76:96, :].any() and not ink[:76].any()


def test_long_captions_are_cut_and_long_titles_widen():
    images = np.ones((2, 8, 8, 1), np.float32)
    short = figures.image_grid(images, ["cat", "dog"], columns=2)
    assert figures.image_grid(images, ["golden retriever", "dog"], columns=2).size == (short.size)
    assert figures.image_grid(images, columns=2, title="a title " * 9).width > short.width


def test_colour_and_latents():
    red = np.array([1, -1, -1], np.float32).reshape(1, 1, 1, 3)
    assert figures.image_grid(red, scale=20).getpixel((15, 15)) == (255, 0, 0)
    latents = np.zeros((2, 1, 1, 4), np.float32)
    latents[1, ..., :3] = 9  # each shown channel runs over its own range: black and white
    grid = figures.image_grid(latents, columns=2, scale=64)
    assert grid.height > 64 + 24  # the title says which channels these are
    assert grid.getpixel((20, grid.height - 20)) == (0, 0, 0)
    assert grid.getpixel((20 + 67, grid.height - 20)) == (255, 255, 255)


def test_values_beyond_the_range_are_clipped():
    grid = figures.image_grid(np.full((1, 8, 8, 1), -7.0))
    assert grid.getpixel((40, 40)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (np.zeros((0, 8, 8, 1)), None, r"\(0, 8, 8, 1\)"),
        (np.zeros((8, 8)), None, r"\(8, 8\)"),
        (np.zeros((3, 8, 8, 1)), [1, 2], "3 images got 2 captions"),
        (np.array([0, np.nan]).reshape(2, 1, 1, 1), None, "1 of 2 images hold NaN"),
    ],
)
def test_grid_refuses(images, captions, message):
    with pytest.raises(UserError, match=message):
        figures.image_grid(images, captions)


def test_save_png_is_atomic(tmp_path):
    path = figures.save_png(Image.new("L", (5, 4), 77), tmp_path / "new" / "a.png")
    with Image.open(path) as image:
        assert image.size == (5, 4) and image.getpixel((0, 0)) == 77

    class Broken:
        def save(self, target, format):
            target.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        figures.save_png(Broken(), path)
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size == (5, 4)


def test_save_pngs(tmp_path):
    paths = figures.save_pngs(_ramp(3, channels=3), tmp_path)
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    with Image.open(paths[2]) as image:
        assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)
