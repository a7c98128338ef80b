"""Picture files: what the pixels of each kind mean, and which files of a folder count.

Every expected value is worked by hand; the arithmetic is in the comments.
"""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import pictures
from moe_diffusion.errors import UserError


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read(path):
    image = pictures.read(path, str(path), "mend it")
    return image.mode, np.asarray(image).tolist()


def test_grey_of_16_bits_reads_like_its_twin_of_8(tmp_path):
    """v / 257 rounded: 128 / 257 = 0.498 -> 0, 129 / 257 = 0.502 -> 1, 32,896 = 128 * 257."""
    wide = np.array([[0, 128, 129, 257], [385, 386, 32896, 65535]], np.uint16)
    path = save(tmp_path / "wide.png", Image.fromarray(wide))
    assert read(path) == ("L", [[0, 0, 1, 1], [1, 2, 128, 255]])
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    twins = [Image.fromarray(ramp * 257), Image.fromarray(ramp.astype(np.uint8))]
    wide, narrow = (read(save(tmp_path / f"{i}.png", twin)) for i, twin in enumerate(twins))
    assert wide == narrow
    array = pictures.from_array(ramp[..., None] * 257, "x", "y")
    assert np.asarray(array).tolist() == narrow[1]


def test_colour_of_16_bits_reads_like_its_twin_of_8(tmp_path):
    """Pillow cannot write such a file, so it is put together from the chunks of PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in (pixels.astype(">u2") * 257))
    path = tmp_path / "wide.png"
    path.write_bytes(png(width=2, height=3, bits=16, colour=2, data=rows))
    assert read(path) == ("RGB", pixels.tolist())


def png(width, height, bits, colour, data, *more):
    """A PNG of unfiltered rows; `more` are (name, content) of chunks between header and pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_transparency_is_seen_on_white(tmp_path):
    """At alpha 0 white; at 255 the colour; at 51 = 255 / 5, a fifth of it: 0.8 * 255 = 204 for 0,
    and 204 + 20 = 224 for 100."""
    colours = [[(100, 0, 0, 0), (100, 0, 0, 51), (100, 0, 0, 255)]]
    rgba = Image.fromarray(np.array(colours, np.uint8))
    on_white = [[255, 255, 255], [224, 204, 204], [100, 0, 0]]
    assert read(save(tmp_path / "rgba.png", rgba)) == ("RGB", [on_white])
    lossless = save(tmp_path / "rgba.webp", rgba, lossless=True, exact=True)
    assert read(lossless) == ("RGB", [on_white])
    grey = Image.fromarray(np.array([[(100, 0), (100, 51), (100, 255)]], np.uint8), "LA")
    assert read(save(tmp_path / "la.png", grey)) == ("L", [[255, 224, 100]])
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([100, 0, 0] * 3)
    path = save(tmp_path / "p.png", palette, transparency=bytes([0, 51, 255]))
    assert read(path) == ("RGB", [on_white])


def test_one_transparent_colour_is_seen_on_white(tmp_path):
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert read(save(tmp_path / "grey.png", grey, transparency=7)) == ("L", [[255, 8]])
    rgb = Image.fromarray(np.array([[(1, 2, 3), (1, 2, 4)]], np.uint8))
    path = save(tmp_path / "rgb.png", rgb, transparency=(1, 2, 3))
    assert read(path) == ("RGB", [[[255, 255, 255], [1, 2, 4]]])
    # Of 16 bits, 7 * 257 = 1,799 is transparent and its neighbour 1,800 is not.
    rows = b"\0" + np.array([1799, 1800], ">u2").tobytes()
    path = tmp_path / "wide.png"
    path.write_bytes(png(2, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 1799))))
    assert read(path) == ("L", [[255, 7]])


def test_palettes_cmyk_and_single_bits(tmp_path):
    palette = Image.fromarray(np.array([[1, 0]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    expected = ("RGB", [[[40, 50, 60], [10, 20, 30]]])
    for suffix in ("png", "bmp"):
        assert read(save(tmp_path / f"p.{suffix}", palette)) == expected
    bits = Image.fromarray(np.array([[255, 0]], np.uint8)).convert("1")
    assert read(save(tmp_path / "bits.png", bits)) == ("L", [[255, 0]])
    # 100% magenta and yellow ink let red through: 255, 0, 0, up to the rounding of JPEG.
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    mode, pixels = read(save(tmp_path / "ink.jpg", ink, quality=100))
    assert mode == "RGB"
    np.testing.assert_allclose(pixels, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=2)


# The picture [[1, 2], [3, 4], [5, 6]] (times 10) as it is stored under each orientation. EXIF 2.3,
# tag 274: where the 0th row and the 0th column of what is stored belong in the picture.
STORED = {
    1: [[1, 2], [3, 4], [5, 6]],  # top, left
    2: [[2, 1], [4, 3], [6, 5]],  # top, right
    3: [[6, 5], [4, 3], [2, 1]],  # bottom, right
    4: [[5, 6], [3, 4], [1, 2]],  # bottom, left
    5: [[1, 3, 5], [2, 4, 6]],  # left, top
    6: [[2, 4, 6], [1, 3, 5]],  # right, top
    7: [[6, 4, 2], [5, 3, 1]],  # right, bottom
    8: [[5, 3, 1], [6, 4, 2]],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_are_upright(orientation, dtype, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    scale = 10 * (257 if dtype == np.uint16 else 1)
    stored = Image.fromarray((np.array(STORED[orientation]) * scale).astype(dtype))
    path = save(tmp_path / "turned.png", stored, exif=exif)
    assert read(path) == ("L", [[10, 20], [30, 40], [50, 60]])
    assert pictures.header(path, "") == (3, 2, 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # what Pillow says of it
def test_a_jpeg_is_turned_and_bad_exif_says_nothing(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    ramp = Image.fromarray(np.repeat(np.arange(0, 240, 10, np.uint8)[None], 16, 0))  # 16 x 24
    path = save(tmp_path / "a.jpg", ramp, exif=exif, quality=100)
    assert pictures.header(path, "") == (24, 16, 1)
    _, pixels = read(path)
    np.testing.assert_allclose(pixels, np.asarray(ramp).T, atol=3)
    for content in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""):
        path = save(tmp_path / "b.jpg", ramp, exif=content, quality=100)
        np.testing.assert_allclose(read(path)[1], np.asarray(ramp), atol=3)
    exif[274] = 9  # there is no such orientation
    path = save(tmp_path / "c.jpg", ramp, exif=exif, quality=100)
    assert pictures.header(path, "") == (16, 24, 1) and np.shape(read(path)[1]) == (16, 24)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pixels_without_a_meaning_are_refused_by_name(mode, tmp_path):
    path = save(tmp_path / "depth.tiff", Image.new(mode, (4, 4)))
    path = path.rename(tmp_path / "depth.png")  # Pillow goes by the content
    message = (
        f"depth.png cannot be read as an image .no value of its mode {mode} means white.*: mend"
    )
    for look in (read, lambda path: pictures.header(path, "mend it")):
        with pytest.raises(UserError, match=message):
            look(path)
    if mode == "F":
        with pytest.raises(UserError, match="^record 3 cannot be read .* mode F means white"):
            pictures.from_array(np.zeros((4, 4), np.float32), "record 3", "mend it")


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = save(tmp_path / "whole.png", Image.new("RGB", (64, 64))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    # 20,000 x 20,000 pixels: a few bytes of file, 400 MB of memory.
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, 0, b""))
    Image.new("RGB", (4, 4)).save(tmp_path / "program.eps")  # Pillow would start Ghostscript
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (1 << 28)))
    (tmp_path / "texts.png").write_bytes(png(1, 1, 8, 0, b"\0\0", text))
    for name, why in (
        ("text", "cannot identify"),
        ("empty", "cannot identify"),
        ("cut", ""),
        ("program", "cannot identify"),
        ("pipe", "it is no regular file"),
        ("loop", "symbolic links"),
        ("gone", "No such file"),
        ("bomb", "decompression bomb"),
        ("texts", "Decompressed data too large"),
    ):
        with pytest.raises(
            UserError, match=f"{name}.png cannot be read as an image .*{why}.*: mend"
        ):
            read(tmp_path / f"{name}.png")
    assert pictures.read(whole, "record 3", "").mode == "RGB"
    with pytest.raises(UserError, match="^record 3 cannot be read as an image"):
        pictures.read(whole[:50], "record 3", "mend it")


# --- which files count ---------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def listed(folder):
    found = pictures.by_folder(folder)
    assert all(paths == sorted(paths) for paths in found.values())
    return {group: [os.path.relpath(p, folder) for p in paths] for group, paths in found.items()}


def test_hidden_folders_and_those_of_the_system_do_not_count(tmp_path, capsys):
    touch(tmp_path, "cat/1.png", "cat/deep/2.JPG", "cat/notes.txt", "dog/3.webp")
    assert listed(tmp_path) == {
        "cat": ["cat/1.png", "cat/deep/2.JPG"],
        "dog": ["dog/3.webp"],
    }
    assert capsys.readouterr().err == ""
    before = listed(tmp_path)
    touch(tmp_path, ".ipynb_checkpoints/1.png", "@eaDir/1.png", "__MACOSX/cat/._1.png")
    touch(tmp_path, "cat/.ipynb_checkpoints/1.png", "cat/deep/@eaDir/2.jpg", "cat/._1.png")
    touch(tmp_path, "cat/.DS_Store", "lost+found/x.png", ".hidden.png")
    assert listed(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out of {tmp_path}: .hidden.png, .ipynb_checkpoints, @eaDir, ")
    assert line.endswith(", 3 more (hidden or of the system)")


def test_pictures_directly_in_a_folder(tmp_path, capsys):
    touch(tmp_path, "b.png", "a.png", "._a.png", "cat/1.png", ".hidden/2.png")
    assert pictures.directly_in(tmp_path) == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert capsys.readouterr().err.endswith(": ._a.png (hidden or of the system)\n")
    assert listed(tmp_path) == {"cat": ["cat/1.png"]}
    assert capsys.readouterr().err.endswith(": a.png, b.png (in no sub-folder)\n")
    touch(tmp_path / ".cache" / "data", "1.png")  # the folder itself may be hidden
    assert len(pictures.directly_in(tmp_path / ".cache" / "data")) == 1


def test_loops_of_links_end(tmp_path, capsys):
    touch(tmp_path, "data/cat/1.png", "data/dog/2.png")
    before = listed(tmp_path / "data")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data/cat")
    (tmp_path / "data/cat/all").symlink_to(tmp_path / "data")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    (tmp_path / "data/above").symlink_to(tmp_path)
    (tmp_path / "data/nowhere").symlink_to("nowhere")
    (tmp_path / "data/itself.png").symlink_to("itself.png")
    (tmp_path / "data/cat/0.png").symlink_to("0.png")
    found = listed(tmp_path / "data")
    before["cat"].insert(0, "cat/0.png")  # whoever reads it will say what is wrong
    assert found == before
    line, other = capsys.readouterr().err.splitlines()
    assert line.endswith("(links to what counts already)")
    assert other.endswith(": itself.png (in no sub-folder)")
    assert all(name in line for name in ("above", "cat/again", "cat/all", "self"))


def test_every_file_counts_once_at_its_own_place(tmp_path, capsys):
    """Links come before their targets in the alphabet here, and must not win."""
    touch(tmp_path, "data/b/1.png", "data/b/sub/2.png", "store/3.png", "store/x/4.png")
    link = lambda name, target: (tmp_path / name).symlink_to(tmp_path / target)  # noqa: E731
    (tmp_path / "data/a").mkdir()
    touch(tmp_path, "data/a/5.png")
    link("data/a/1.png", "data/b/1.png")
    link("data/a/sub", "data/b/sub")
    link("data/a/3.png", "store/3.png")  # the file before the folder that holds it
    link("data/a/3b.png", "store/3.png")
    (tmp_path / "data/b/deep").mkdir()
    link("data/b/deep/more", "store")
    link("data/c", "data/b")
    assert listed(tmp_path / "data") == {
        "a": ["a/3.png", "a/5.png"],
        "b": ["b/1.png", "b/deep/more/x/4.png", "b/sub/2.png"],
    }
    assert "(links to what counts already)" in capsys.readouterr().err


def test_links_into_a_store_of_contents(tmp_path):
    """As git-annex and caches of downloads keep files: hidden, or without a suffix."""
    touch(tmp_path, ".git/annex/1.png", "cat/keep.png", "blobs/0a1b")
    (tmp_path / "cat/1.png").symlink_to("../.git/annex/1.png")
    (tmp_path / "cat/2.png").symlink_to("../blobs/0a1b")
    assert listed(tmp_path)["cat"] == ["cat/1.png", "cat/2.png", "cat/keep.png"]


def test_many_links_to_each_other_end_quickly(tmp_path):
    """Two links in each of 40 folders to the next: 2^40 ways to walk, and 40 folders to visit."""
    for i in range(40):
        touch(tmp_path, f"store/{i}/{i}.png")
        for name in ("x", "y") if i < 39 else ():
            (tmp_path / f"store/{i}/{name}").symlink_to(tmp_path / f"store/{i + 1}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cat").symlink_to(tmp_path / "store/0")
    assert len(listed(tmp_path / "data")["cat"]) == 40


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "cat/1.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(pictures.os, "scandir", refuse)
    with pytest.raises(UserError, match="the folder .*/cat cannot be read .*Permission denied"):
        pictures.by_folder(tmp_path)


def test_names_that_cannot_be_shown():
    assert pictures.printable("kühe 🐄") == "kühe 🐄"
    assert pictures.printable("a\nb\x1b[2J\udc80") == "a?b?[2J?"


def test_a_picture_that_says_its_orientation_last(tmp_path):
    """The EXIF block behind the pixels of a PNG is legal; the header alone cannot know of it."""
    exif = Image.Exif()
    exif[274] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    pixels = np.array(STORED[6], np.uint8) * 10
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    content = png(3, 2, 8, 0, rows)
    end = content.rindex(b"IEND") - 4
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + block))
    path = tmp_path / "late.png"
    path.write_bytes(content[:end] + chunk + content[end:])
    assert pictures.header(path, "") == (2, 3, 1)
    assert read(path) == ("L", [[10, 20], [30, 40], [50, 60]])
    assert Image.open(io.BytesIO(content)).size == (3, 2)
