"""Folders of images: ADM's crop, classes by sub-folder, broken files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.data import images, pipeline
from moe_diffusion.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """2 cats (one in a deeper folder), 3 dogs, of different sizes; and what is no image."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("dog/b.PNG", "dog/a.jpg", "dog/c.webp", "cat/x/1.png", "cat/2.jpeg")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 3 * i, 30 - 2 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "data" / "dog" / "notes.txt").write_text("good boys")
    (tmp_path / "data" / "README").write_text("pets")
    return tmp_path / "data"


def open_folder(folder, side=8, channels=3, **options):
    return images.ImageFolder(str(folder), (side, side, channels), **options)


def test_classes_and_files_are_sorted(folder):
    source = open_folder(folder)
    assert source.class_names == ["cat", "dog"] and source.cond_spec["label"].num_values == 2
    names = [source.name(i).removeprefix(f"{folder}/") for i in range(len(source))]
    assert names == ["cat/2.jpeg", "cat/x/1.png", "dog/a.jpg", "dog/b.PNG", "dog/c.webp"]
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1, 1])
    record = source[1]
    assert record["image"].shape == (8, 8, 3) and record["image"].dtype == np.float32
    assert np.abs(record["image"]).max() <= 1 and record["label"] == 0
    grey = open_folder(folder, channels=1)[1]["image"]
    assert grey.shape == (8, 8, 1)
    luma = record["image"] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[..., 0], luma, atol=0.02)


def test_what_is_no_class_changes_no_label(folder, capsys):
    before = open_folder(folder)
    capsys.readouterr()
    for name in (".ipynb_checkpoints", "@eaDir", "cat/.ipynb_checkpoints", "dog/__MACOSX"):
        (folder / name).mkdir()
        Image.new("RGB", (9, 9)).save(folder / name / "0.png")
    (folder / "cats").symlink_to(folder / "cat")
    Image.new("RGB", (9, 9)).save(folder / "0.png")
    source = open_folder(folder)
    assert source.class_names == ["cat", "dog"] and len(source) == 5
    np.testing.assert_array_equal(source.labels, before.labels)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"left out of {folder}: .ipynb_checkpoints, @eaDir, cat/.ipynb_checkpoints, dog/__MACOSX "
        "(hidden or of the system)",
        f"left out of {folder}: cats (links to what counts already)",
        f"left out of {folder}: 0.png (in no sub-folder)",
    ]


def test_every_kind_of_picture_becomes_the_same_record(tmp_path):
    """Of one picture: 16 bits, upside down, a palette, transparent where it is white."""
    grey = np.full((8, 8), 255, np.uint8)
    grey[:4, :4] = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[274] = 3
    picture = Image.fromarray(grey)
    alpha = Image.fromarray(np.where(grey == 255, 0, 255).astype(np.uint8))
    clear = Image.merge("LA", (Image.fromarray(np.where(grey == 255, 0, grey)), alpha))
    picture.save(tmp_path / "a/0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a/1.png")
    picture.rotate(180).save(tmp_path / "a/2.png", exif=exif)
    picture.convert("P").save(tmp_path / "a/3.png")
    clear.save(tmp_path / "a/4.png")
    clear.convert("RGBA").save(tmp_path / "a/5.png")
    for channels in (1, 3):
        source = open_folder(tmp_path, channels=channels)
        expected = np.repeat(grey[..., None].astype(np.float32) / 127.5 - 1, channels, -1)
        for i in range(6):
            np.testing.assert_array_equal(source[i]["image"], expected, err_msg=source.name(i))


def test_center_crop_by_hand():
    """9x4 -> (halved by box) 4x2 -> crop 2x2: each pixel is the mean of 4; the 9th column goes."""
    pixels = np.arange(36, dtype=np.uint8).reshape(4, 9) * 7
    cropped = np.asarray(images.center_crop(Image.fromarray(pixels), 2, 2))
    box = Image.fromarray(pixels).resize((4, 2), Image.Resampling.BOX)
    np.testing.assert_array_equal(cropped, np.asarray(box)[:, 1:3])
    even = pixels[:, :8]
    halved = images.center_crop(Image.fromarray(even), 2, 2)
    means = even.reshape(2, 2, 4, 2).mean((1, 3))
    np.testing.assert_allclose(np.asarray(halved), means[:, 1:3], atol=1.01)


def test_center_crop_scales_the_shorter_side():
    """A wide ramp: enlarged or reduced to the height, the middle stays in the middle."""
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (30, 1))
    for size in (25, 30, 48):  # below, at and above the image's own size
        cropped = np.asarray(images.center_crop(Image.fromarray(ramp), size, size), np.float64)
        assert cropped.shape == (size, size)
        np.testing.assert_allclose(cropped.mean(), 127.5, atol=4)  # half a pixel
        np.testing.assert_allclose(cropped[0, [0, -1]], [64, 191], atol=5)


def test_a_broken_image_is_named_or_skipped(folder, capsys):
    (folder / "dog" / "a.jpg").write_bytes(b"\xff\xd8 no jpeg")
    half = (folder / "dog" / "c.webp").read_bytes()
    (folder / "dog" / "c.webp").write_bytes(half[: len(half) // 2])
    source = open_folder(folder)
    with pytest.raises(UserError, match=r"dog/a.jpg cannot be read .* data.skip_broken=true"):
        source[2]
    source = open_folder(folder, skip_broken=True)
    assert source.read(2) is None and source.read(4) is None
    np.testing.assert_array_equal(source[2]["image"], source[3]["image"])  # the next one
    np.testing.assert_array_equal(source[4]["image"], source[0]["image"])  # and round the end
    assert source[4]["label"] == 0
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 2  # each once
    assert reported[0].startswith(f"skipped: {folder}/dog/a.jpg cannot be read as an image")
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="100 images in a row from .*cat/2.jpeg on are broken"):
        source[0]


@pytest.mark.parametrize("size", [(20, 30), (10, 60), (40, 30), (12, 10)])
def test_center_crop_to_what_is_not_square(size):
    """The image covers the crop with one side to spare, and the middle stays in the middle."""
    down, right = np.meshgrid(np.linspace(0, 255, 30), np.linspace(0, 255, 60), indexing="ij")
    height, width = size
    scale = max(height / 30, width / 60)
    for ramp, axis, share in ((down, 0, height / 30 / scale), (right, 1, width / 60 / scale)):
        image = Image.fromarray(ramp.astype(np.uint8))
        cropped = np.asarray(images.center_crop(image, height, width), np.float64)
        assert cropped.shape == size
        first, last = np.take(cropped, [0, -1], axis).mean(1 - axis)
        assert (first + last) / 2 == pytest.approx(127, abs=6)
        pixel = 255 * share / size[axis]
        assert last - first == pytest.approx(255 * share - pixel, abs=10)


def test_a_folder_cropped_to_what_is_not_square(folder):
    assert images.ImageFolder(str(folder), (8, 12, 3))[1]["image"].shape == (8, 12, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_name_a_broken_image(folder, workers):
    (folder / "dog" / "a.jpg").write_bytes(b"")
    data = SimpleNamespace(batch_size=5, augment="none", num_workers=workers, prefetch=1)
    iterator = pipeline.make_iterator(open_folder(folder), data, seed=0)
    try:
        with pytest.raises(UserError, match="dog/a.jpg cannot be read"):
            next(iterator)
    finally:
        iterator.close()


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no sub-folder: images must lie in one sub-folder"):
        open_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="cat holds no image"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match=r"cannot be \(8, 8, 4\). For latents: data.source=latents"):
        open_folder(tmp_path, channels=4)
