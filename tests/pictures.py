"""What the road from pictures to a number starts from: PNGs in classes, and a small autoencoder."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from PIL import Image

from moe_diffusion.data.latents import Latents
from moe_diffusion.interop import autoencoder as interop
from moe_diffusion.models.autoencoder import Autoencoder, AutoencoderKL

SIDE, CLASSES, COUNT = 64, 4, 200


def write_pictures(folder: Path) -> Path:
    """folder/class_<c>/<i>.png, 64x64: blurred noise, in another colour for each class."""
    for index in range(COUNT):
        rng, label = np.random.default_rng(index), index % CLASSES
        pixels = rng.integers(0, 256, (4, 4, 3))
        pixels[..., :] += 60 * np.array([label & 1, label >> 1, 0])
        image = Image.fromarray(np.minimum(pixels, 255).astype(np.uint8))
        path = folder / f"class_{label}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path)
    return folder


def write_autoencoder(folder: Path, seed: int = 0) -> Path:
    """A folder of diffusers with random weights; 8 pixels a latent, 4 channels."""
    network = AutoencoderKL(block_channels=(4, 4, 8, 8), layers_per_block=1, norm_groups=2)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3)))
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        if path[-1].key != "kernel":
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(weight, shapes["params"])
    interop.save(Autoencoder(network, params), folder)
    return folder


def assert_same_latents(folder: Path, other: Path) -> None:
    """Of two prepared folders: the same but for rounding.

    XLA divides the work of eight devices of a CPU in another way than that of one, so that on some
    CPUs the last bit of a latent differs.
    """
    one, two = (Latents(str(path)) for path in (folder, other))
    assert len(one) == len(two) and one.manifest["fields"] == two.manifest["fields"]
    one, two = (latents.take(np.arange(len(latents))) for latents in (one, two))
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], rtol=2e-3, atol=1e-4, err_msg=name)


def prepare_args(pictures: Path, autoencoder: Path, out: Path) -> list[str]:
    """Of `prepare`: 10 shards, mirrored images, too (the default)."""
    return [
        *("--source", f"folder:{pictures}", "--size", str(SIDE), "--vae", str(autoencoder)),
        *("--shard-size", "20", "--workers", "2", "--out", str(out)),
    ]
