"""Sets of images and of features, as they come in files; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.data.sources import Digits
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import features, images
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
    "nan features": ({"features": ROWS * np.nan}, "feature vector 0 holds NaN or infinity"),
    "flat features": ({"features": ROWS[0]}, r"has shape \(3,\), not \[N, D\]"),
    "sigma": ({"mu": ROWS[0], "sigma": ROWS}, r"shapes \(3,\) and \(4, 3\), which do not fit"),
    "nan mu": ({"mu": ROWS[0] * np.nan, "sigma": np.eye(3)}, "mu or sigma of .* hold NaN"),
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
    with pytest.raises(UserError, match="nothing.npz is not there"):
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
    with pytest.raises(UserError, match="2.png is a broken picture"):
        everything(images.open_images(str(tmp_path)))
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2.png is a broken picture"):
        images.open_images(str(tmp_path))
    Image.fromarray(pictures(1, side=8)[0]).save(tmp_path / "2.png")
    with pytest.raises(UserError, match="2.png is 8x8, 0.png is 6x6: all pictures must have one"):
        images.open_images(str(tmp_path))
