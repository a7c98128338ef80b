"""Pictures: sizes by arithmetic, pixels by colour, files whole or absent."""

from __future__ import annotations

import errno
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


def test_captions_of_any_text():
    """Lines become one; beside a row a caption takes 600 pixels at most, however long it is."""
    one_line = figures.image_grid(_ramp(2), ["two\n lines", "b"], columns=2)
    two_lines = figures.image_grid(_ramp(2), ["two lines", "b"], columns=2)
    assert np.array_equal(np.asarray(one_line), np.asarray(two_lines))
    long = figures.image_grid(_ramp(2), ["a caption " * 100_000] * 2, columns=2)
    plain = figures.image_grid(_ramp(2), columns=2)
    assert 500 < long.width - plain.width <= 600 + 6


def test_pictures_carry_texts(tmp_path):
    """In the order that is given, in any letters; `Software` says whose they are."""
    path = figures.save_png(
        figures.image_grid(_ramp(1)), tmp_path / "a.png", {"b": "é 七\n", "a": 1}
    )
    with Image.open(path) as image:
        assert image.text == {"Software": "moe_diffusion", "b": "é 七\n", "a": "1"}
    figures.save_pngs(_ramp(2), tmp_path / "each", [{"number": 0}, {"number": 1}])
    for number in range(2):
        with Image.open(tmp_path / "each" / f"{number:06}.png") as image:
            assert image.text["number"] == str(number)


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
        def save(self, target, format, pnginfo):
            target.write(b"half")
            raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        figures.save_png(Broken(), path)
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.size == (5, 4)


def test_heads_stand_above_their_columns():
    images = np.ones((4, 8, 8, 1), np.float32)  # white on white: all ink is text
    plain = figures.image_grid(images, columns=2)
    headed = figures.image_grid(images, columns=2, heads=["1", "20"])
    assert headed.width == plain.width and headed.height > plain.height
    ink = np.asarray(headed.convert("L")) < 200
    assert ink[12 + headed.height - plain.height :].sum() == 0  # nothing on the images
    left, right = ink[:, : headed.width // 2].sum(), ink[:, headed.width // 2 :].sum()
    assert 0 < left < right


def test_a_film(tmp_path):
    """Two frames in one second; the last stays for two more. The smaller one is filled up."""
    frames = [Image.new("L", (10, 6), 0), Image.new("L", (12, 5), 0)]
    with Image.open(figures.save_gif(frames, tmp_path / "film.gif", 1.0)) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (2, (12, 6), 0)
        times, corners = [], []
        for number in range(2):
            film.seek(number)
            times.append(film.info["duration"])
            pixels = np.asarray(film.convert("L"))
            corners.append((pixels[0, 0], pixels[5, 9], pixels[4, 11]))
    assert times == [500, 2500]
    assert corners == [(0, 0, 255), (0, 255, 0)]


def test_save_pngs(tmp_path):
    paths = figures.save_pngs(_ramp(3, channels=3), tmp_path)
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    with Image.open(paths[2]) as image:
        assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)
