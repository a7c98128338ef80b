"""The KL autoencoder: shapes, published sizes, chunks, scale and shift."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_diffusion.models import autoencoder as module
from moe_diffusion.models.autoencoder import Autoencoder, AutoencoderKL

TINY = AutoencoderKL(
    latent_channels=2, block_channels=(4, 8), layers_per_block=1, norm_groups=2, shift=0.5
)


@pytest.fixture(scope="module")
def autoencoder():
    """Takes one image per device at once."""
    params = jax.jit(TINY.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES_AT_ONCE", 1)
        yield Autoencoder(TINY, params)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (20, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def moments(autoencoder, images):
    return autoencoder.moments(images)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (AutoencoderKL(), 83_653_863),  # sd-vae-ft-mse and -ema
        (AutoencoderKL(latent_channels=16, quant_conv=False), 83_819_683),  # FLUX.1
    ],
)
def test_published_sizes(network, parameters):
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32)
    reconstruction, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    assert reconstruction.shape == image.shape and network.factor == 8
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def apply(autoencoder, method, x):
    """On one device, in one piece."""
    function = jax.jit(lambda params, x: TINY.apply({"params": params}, x, method=method))
    return function(autoencoder.params, x)


def test_chunks_are_the_whole(autoencoder, images, moments):
    """On 8 devices in chunks of 8, 8 and 4."""
    assert len(jax.local_devices()) == 8
    whole = np.concatenate(apply(autoencoder, "moments", images), -1)
    assert moments.shape == whole.shape == (20, 4, 6, 4)
    np.testing.assert_allclose(moments, whole, atol=1e-5)


def test_the_memory_bounds_a_chunk(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 8)
    sizes = {side: module.images_at_once(side**2) for side in (64, 256, 512, 1024)}
    assert sizes == {64: 8, 256: 8, 512: 2, 1024: 1}


def test_latents_are_scaled_and_shifted(autoencoder, images, moments):
    mean, logvar = np.split(moments, 2, axis=-1)
    latents = autoencoder.encode(images)
    np.testing.assert_allclose(latents, (mean - 0.5) * 0.18215, rtol=1e-6)
    noise = (autoencoder.encode(images, seed=1) - latents) / 0.18215 / np.exp(logvar / 2)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    pictures = autoencoder.decode(latents)
    assert pictures.shape == images.shape
    np.testing.assert_allclose(pictures, apply(autoencoder, "decode", mean), atol=1e-4)


def test_fingerprints_tell_weights_and_scales_apart(autoencoder):
    params = autoencoder.params
    changed = jax.tree.map(np.array, params)
    changed["decoder"]["conv_out"]["bias"][0] += 1e-6
    names = {
        Autoencoder(network, weights).fingerprint
        for network in (TINY, TINY.copy(shift=0.0))
        for weights in (params, changed, params)
    }
    assert len(names) == 4
