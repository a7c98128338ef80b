"""Sets of images and of features, as they come in files; and what is refused."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import archives, features, images
from moe_diffusion.evaluation.metrics import gaussian_of


def pictures(count=10, side=6, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


def everything(found, size=4):
    return np.concatenate(list(found.batches(size, len(found))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read_in_pieces(save, tmp_path):
    save(tmp_path / "a.npz", labels=np.zeros(3), arr_0=pictures())
    found = images.open_images(str(tmp_path / "a.npz"))
    assert len(found) == 10 and found.shape == (6, 6, 3)
    assert [len(batch) for batch in found.batches(4, 9)] == [4, 4, 1]
    np.testing.assert_array_equal(everything(found), pictures())


def test_a_folder_of_pictures_gives_what_the_archive_gives(tmp_path):
    for i, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = images.open_images(str(tmp_path))
    assert len(found) == 10 and found.shape == (6, 6, 3)
    np.testing.assert_array_equal(everything(found), pictures())


def test_a_data_source_and_its_splits():
    found = images.open_images("digits@test")
    assert found.shape == (8, 8, 1)
    np.testing.assert_array_equal(everything(found), Digits("test").images)
    assert len(images.open_images("digits")) == 1437
    assert images.open_images("synthetic", size=(12, 16)).shape == (12, 16, 3)


def test_samples_become_pixels():
    samples = np.array([-1.5, -1, 0, 0.001, 1, 1.2], np.float32).reshape(1, 2, 3, 1)
    rounded = images.to_pixels(samples, "round").ravel()
    np.testing.assert_array_equal(rounded, [0, 0, 128, 128, 255, 255])
    exact = images.to_pixels(samples, "none").ravel()
    np.testing.assert_allclose(exact, [0, 0.5, 128, 128.1275, 255, 255])
    pixels = pictures(2)
    np.testing.assert_array_equal(images.to_pixels(images.to_floats(pixels), "round"), pixels)


def archive(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_archives_of_every_kind(tmp_path):
    rows = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    mean, covariance = rows.mean(0), np.cov(rows, rowvar=False)
    adm = {"mu": mean, "sigma": covariance, "mu_s": mean[:3], "sigma_s": covariance[:3, :3]}
    adm = features.open_features(archive(tmp_path / "adm.npz", arr_0=pictures(), **adm))
    assert len(adm.images) == 10 and adm.vectors is None and adm.pool.count == 0
    assert adm.spatial.mean.shape == (3,)

    fid = features.open_features(archive(tmp_path / "fid.npz", mu=mean, sigma=covariance))
    assert fid.images is None and fid.spatial is None
    for key in ("features", "activations"):
        found = features.open_features(archive(tmp_path / "f.npz", **{key: rows}))
        np.testing.assert_allclose(found.pool.covariance, fid.pool.covariance, atol=1e-6)
        assert found.pool.count == 20
    first = features.open_features(archive(tmp_path / "f.npz", features=rows), num=8)
    np.testing.assert_allclose(first.pool.mean, rows[:8].mean(0), atol=1e-6)

    features.save_features(found, tmp_path / "saved.npz")
    again = features.open_features(str(tmp_path / "saved.npz"))
    np.testing.assert_array_equal(again.vectors, rows)
    np.testing.assert_array_equal(again.pool.covariance, found.pool.covariance)
    assert again.pool.count == 20


def test_features_are_collected_in_batches():
    class Means:
        def __call__(self, batch):
            return {"pool": batch.mean((1, 2))}

    found = features.FeatureSet("x", images=ArrayImages(pictures(10).astype(np.float32) / 255))
    found = features.with_vectors(found, Means(), batch_size=4)
    expected = gaussian_of((pictures(10) / 255).mean((1, 2)))
    np.testing.assert_allclose(found.pool.covariance, expected.covariance, atol=1e-6)
    assert found.vectors.shape == (10, 3) and found.pool.count == 10


class ArrayImages:
    name = "array"

    def __init__(self, array):
        self.array, self.shape = array, array.shape[1:]

    def __len__(self):
        return len(self.array)

    def batches(self, size, num):
        return iter(np.split(self.array[:num], range(size, num, size)))


ROWS = np.ones((4, 3), np.float32)
NOT_A_NUMBER = np.full((2, 6, 6, 3), np.nan, np.float32)
BAD_ARCHIVES = {
    "int": ({"arr_0": pictures().astype(np.int64)}, "is int64: images are uint8, or floats"),
    "latents": ({"arr_0": np.zeros((2, 4, 4, 4), np.float32)}, "latents must be decoded first"),
    "flat": ({"arr_0": np.zeros((2, 4), np.float32)}, r"not images \[H, W, 1 or 3\]"),
    "range": ({"arr_0": pictures().astype(np.float32)}, "floats up to 255"),
    "nan": ({"arr_0": NOT_A_NUMBER}, "holds NaN or infinity: make the images again"),
    "keys": ({"x": ROWS}, "holds x: wanted are images"),
    "nan features": ({"features": ROWS * np.nan}, "features of .* holds NaN or infinity"),
    "flat features": ({"features": ROWS[0]}, r"has shape \(3,\), not \[N, D\]"),
    "sigma": ({"mu": ROWS[0], "sigma": ROWS}, r"shapes \(3,\) and \(4, 3\), which do not fit"),
    "objects": ({"features": np.array([None, 1])}, "features of .* is of Python objects, which"),
    "objects as images": ({"arr_0": np.array([[None]])}, "arr_0 of .* is of Python objects"),
    "text": ({"features": ROWS.astype(str)}, "features of .* is dtype.*: numbers are wanted"),
    "complex": ({"mu": ROWS[0] * 1j, "sigma": np.eye(3)}, "mu of .* is dtype.'complex"),
    "no features": ({"features": ROWS[:0]}, r"has shape \(0, 3\), not"),
    "no images": ({"arr_0": pictures()[:0]}, "holds no image: make it again"),
    "wide": ({"arr_0": np.zeros((1, 1, 10**8, 1), np.uint8)}, "images of 1x100000000 pixels"),
    "skew": ({"mu": ROWS[0], "sigma": np.eye(3) + np.eye(3, k=1)}, "sigma of .* is no covariance"),
    "negative": ({"mu": ROWS[0], "sigma": np.diag([1, 1, -0.1])}, "sigma of .* is no covariance"),
    "huge": ({"mu": ROWS[0], "sigma": 1e300 * np.eye(3)}, "sigma of .* holds numbers up to 1e.300"),
    "count": ({"features": ROWS, "count": np.array(9)}, "says 9 images and holds 4 feature vec"),
    "counts": ({"features": ROWS, "count": np.array([4])}, "count of .* is no number of images"),
    "NaN images": ({"features": ROWS, "count": np.array(np.nan)}, "count of .* is no number"),
    "widths": ({"features": ROWS, "mu": np.ones(2), "sigma": np.eye(2)}, "3 and 2 dimensions"),
    "nan mu": ({"mu": ROWS[0] * np.nan, "sigma": np.eye(3)}, "mu of .* holds NaN"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_is_refused(kind, tmp_path):
    arrays, message = BAD_ARCHIVES[kind]
    with pytest.raises(UserError, match=message):
        features.open_features(archive(tmp_path / "bad.npz", **arrays))


def test_fewer_images_than_asked_are_refused(tmp_path):
    path = archive(tmp_path / "few.npz", arr_0=pictures())
    with pytest.raises(UserError, match="few.npz has 10 images, 11 are asked for: lower --num"):
        features.open_features(path, num=11)
    path = archive(tmp_path / "mu.npz", mu=ROWS[0], sigma=np.eye(3))
    with pytest.raises(UserError, match="mu.npz has 0 images, 5 are asked for"):
        features.open_features(path, num=5)


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "cut.npz"
    np.savez(path, arr_0=pictures())
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match="cut.npz is damaged or no .npz"):
        features.open_features(str(path))
    with pytest.raises(UserError, match="no .npz at .*nothing.npz"):
        features.open_features(str(tmp_path / "nothing.npz"))
    with pytest.raises(UserError, match="nothing is not there: give an .npz, a folder"):
        features.open_features(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"holds no pictures .* write folder:"):
        features.open_features(str(tmp_path))
    with pytest.raises(UserError, match="folder:/x needs --size"):
        features.open_features("folder:/x")


def test_every_flipped_bit_of_features_is_noticed_or_harmless(tmp_path):
    """240 bits, half of them outside of the numbers; zip stores dates that nothing reads."""
    rng, path = np.random.default_rng(0), tmp_path / "saved.npz"
    rows = rng.standard_normal((12, 3)).astype(np.float32)
    gaussian = gaussian_of(rows)
    features.save_features(
        features.FeatureSet("made", gaussian, spatial=gaussian, vectors=rows), path
    )
    whole, noticed = path.read_bytes(), 0
    good = features.open_features(str(path))
    text = np.flatnonzero(np.frombuffer(whole, np.uint8))
    for byte in (*rng.integers(len(whole), size=120), *rng.choice(text[-300:], 120)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = features.open_features(str(path))
        except UserError as error:
            assert str(path) in str(error)
            noticed += 1
        else:
            np.testing.assert_array_equal(found.vectors, good.vectors)
            for one, other in ((found.pool, good.pool), (found.spatial, good.spatial)):
                assert one.count == other.count
                np.testing.assert_array_equal(one.mean, other.mean)
                np.testing.assert_array_equal(one.covariance, other.covariance)
    assert 120 < noticed < 240


def test_bad_pictures_are_named(tmp_path):
    for i, pixels in enumerate(pictures(3)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="2.png cannot be read as an image"):
        everything(images.open_images(str(tmp_path)))
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2.png cannot be read as an image"):
        images.open_images(str(tmp_path))
    Image.fromarray(pictures(1, side=8)[0]).save(tmp_path / "2.png")
    with pytest.raises(UserError, match="2.png is 8x8, 0.png is 6x6: all pictures must have one"):
        images.open_images(str(tmp_path))


def red_and_grey(folder):
    """A grey picture, then two red ones, then one of 16 bits; its grey level is 128 * 257."""
    wide = np.full((6, 6), 128 * 257, np.uint16)
    kinds = [np.full((6, 6), 40, np.uint8), *[np.full((6, 6, 3), (200, 0, 0), np.uint8)] * 2, wide]
    for i, pixels in enumerate(kinds):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_the_first_picture_does_not_decide_on_colour(tmp_path):
    red_and_grey(tmp_path)
    found = images.open_images(str(tmp_path))
    assert found.shape == (6, 6, 3)
    pixels = everything(found)
    expected = [(40, 40, 40), (200, 0, 0), (200, 0, 0), (128, 128, 128)]
    assert pixels[:, 3, 2].tolist() == list(map(list, expected))
    for name in ("1.png", "2.png"):
        (tmp_path / name).unlink()
    found = images.open_images(str(tmp_path))
    assert found.shape == (6, 6, 1) and everything(found)[:, 0, 0, 0].tolist() == [40, 128]


def test_pictures_to_judge_are_upright_and_seen_on_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "0.png")
    Image.new("RGBA", (6, 8), (0, 0, 0, 0)).save(tmp_path / "1.png", exif=exif)
    (tmp_path / "._0.png").write_bytes(b"of another system")
    (tmp_path / "2.png").symlink_to(tmp_path / "0.png")
    found = images.open_images(str(tmp_path))
    assert len(found) == 2 and found.shape == (6, 8, 3)
    assert everything(found).min((1, 2, 3)).tolist() == [9, 255]


def test_pictures_without_a_meaning_are_refused_at_once(tmp_path):
    red_and_grey(tmp_path)
    Image.new("F", (6, 6)).save(tmp_path / "5.tiff")
    (tmp_path / "5.tiff").rename(tmp_path / "5.png")
    with pytest.raises(UserError, match="5.png cannot be read .* mode F means white"):
        images.open_images(str(tmp_path))


def test_names_of_sources_win_over_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "synthetic", "digits@test"):
        (tmp_path / name).mkdir()
        Image.fromarray(pictures(1)[0]).save(tmp_path / name / "0.png")
    assert images.open_images("digits").shape == (8, 8, 1)
    assert "digits is a data source; the folder of that name is ./digits" in capsys.readouterr().err
    assert len(images.open_images("digits@test")) == 360
    assert images.open_images("synthetic", (12, 16)).shape == (12, 16, 3)
    for name in ("./digits", "./synthetic", "./digits@test", str(tmp_path / "digits")):
        found = images.open_images(name)
        assert found.shape == (6, 6, 3) and len(found) == 1
    assert features.open_features("digits").images.shape == (8, 8, 1)


@pytest.mark.parametrize("name", ["me@host/val", "a:b@c", "two words", "x.npz", "@", "digits@test"])
def test_paths_may_hold_any_character(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in "ab":
        (tmp_path / name / label).mkdir(parents=True)
        Image.fromarray(pictures(1)[0]).save(tmp_path / name / label / "0.png")
    for text in (f"folder:{name}", f"folder:{tmp_path / name}"):
        found = features.open_features(text, (6, 6)).images
        assert len(found) == 2 and found.shape == (6, 6, 3)
    if not name.endswith(".npz"):
        assert len(images.open_images(f"./{name}/a")) == 1


def test_the_split_of_a_source(tmp_path):
    for text, expected in (
        ("digits", ("digits", "")),
        ("digits@test", ("digits", "test")),
        ("tfds:imagenet2012:5.1.0@validation", ("tfds:imagenet2012:5.1.0", "validation")),
        ("tfds:/data/me@host/1.0.0", ("tfds:/data/me@host/1.0.0", "")),
        ("tfds:/data/me@host/1.0.0@test", ("tfds:/data/me@host/1.0.0", "test")),
        (f"tfds:{tmp_path}", (f"tfds:{tmp_path}", "")),
        ("folder:me@host", ("folder:me@host", "")),
        ("me@host", ("me@host", "")),
    ):
        assert images.split_of(text) == expected, text
    (tmp_path / "me@host").mkdir()
    assert images.split_of(f"tfds:{tmp_path}/me@host") == (f"tfds:{tmp_path}/me@host", "")


def test_a_covariance_in_float32_is_one(tmp_path):
    """Of fewer vectors than dimensions, so that most eigenvalues are 0 up to rounding."""
    rows = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
    sigma = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64)).min() < 0
    features.open_features(archive(tmp_path / "f.npz", mu=rows.mean(0), sigma=sigma))
    zero = features.open_features(
        archive(tmp_path / "0.npz", mu=np.ones(2), sigma=np.zeros((2, 2)))
    )
    assert not zero.pool.covariance.any()


def test_bombs_and_headers_that_lie(tmp_path, monkeypatch):
    """64 MB of zeros in 64 kB, and headers that promise more than there is, allocate nothing."""
    assert archives._BOMB == 2**30
    monkeypatch.setattr(archives, "_BOMB", 2**25)
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("features.npy", "w", force_zip64=True) as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": (2**13, 2**11)}
            np.lib.format.write_array_header_1_0(stream, header)
            for _ in range(2**2):
                stream.write(bytes(2**24))
    with pytest.raises(UserError, match="features of .*bomb.npz unpacks to 67,108,864 bytes"):
        features.open_features(str(bomb))
    for name, shape in (("features", (2**40, 2**10)), ("arr_0", (2**40, 8, 8, 3)), ("mu", (-1,))):
        stream = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(bomb, "w") as file:
            file.writestr(f"{name}.npy", stream.getvalue() + bytes(100))
        with pytest.raises(UserError, match=f"'{name}' is not as long as it says"):
            features.open_features(str(bomb))
    bomb.unlink()
    os.mkfifo(bomb)
    with pytest.raises(UserError, match="bomb.npz is a device or pipe"):
        features.open_features(str(bomb))


def test_a_picture_of_too_many_pixels(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png cannot be read as an image .*decompression bomb"):
        images.open_images(str(tmp_path))
