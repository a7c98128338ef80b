"""KL autoencoders of latent diffusion: images [B, H, W, C] <-> latents [B, h, w, c].

One network serves the autoencoders of Stable Diffusion (4 channels, "sd-vae-ft-mse" and "-ema") and
of FLUX.1 (16 channels). `interop.autoencoder.load` reads their weights. Source: Rombach et al.,
2112.10752, section 3.1 and appendix G. The details follow the published code: GroupNorm with eps
1e-6, SiLU, one attention head over all positions at the lowest resolution.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A device encodes or decodes so much at once: 8 images of 256x256 take a few GB.
IMAGES_AT_ONCE = 8
PIXELS_AT_ONCE = IMAGES_AT_ONCE * 256 * 256


class AutoencoderKL(nn.Module):
    """Encoder to the moments of a Gaussian, and decoder.

    Attributes:
      block_channels: width of every level, the highest resolution first. Each level but the last
        halves the resolution.
      layers_per_block: residual blocks in a level of the encoder; the decoder has one more.
      quant_conv: whether a 1x1 convolution follows the encoder and another precedes the decoder;
        FLUX has none.
      scale, shift: the diffusion model sees (z - shift) * scale; see `Autoencoder`.
    """

    channels: int = 3
    latent_channels: int = 4
    block_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    quant_conv: bool = True
    scale: float = 0.18215
    shift: float = 0.0

    def setup(self):
        shared = (tuple(self.block_channels), self.layers_per_block, self.norm_groups)
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.channels, *shared)
        if self.quant_conv:
            self.quant = nn.Conv(2 * self.latent_channels, (1, 1))
            self.post_quant = nn.Conv(self.latent_channels, (1, 1))

    def moments(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images in [-1, 1] -> mean and log variance (in [-30, 20]) of z, both [B, h, w, c]."""
        h = self.encoder(image)
        mean, logvar = jnp.split(self.quant(h) if self.quant_conv else h, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: jax.Array) -> jax.Array:
        """Unscaled z [B, h, w, c] -> images, in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant(z) if self.quant_conv else z)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The reconstruction from the mean. It uses every parameter, as `init` needs."""
        return self.decode(self.moments(image)[0])

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.block_channels) - 1)


class Encoder(nn.Module):
    """[B, H, W, C] -> [B, h, w, out_channels]; for the attributes see `AutoencoderKL`."""

    out_channels: int
    block_channels: Sequence[int]
    layers_per_block: int
    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(self.block_channels[0], "conv_in")(x)
        for i, width in enumerate(self.block_channels):
            last = i == len(self.block_channels) - 1
            level = Level(width, self.layers_per_block, self.norm_groups, "" if last else "down")
            x = level.copy(name=f"level_{i}")(x)
        x = Middle(self.norm_groups, name="mid")(x)
        x = nn.silu(_norm(self.norm_groups, "norm_out")(x))
        return _conv(self.out_channels, "conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, c] -> [B, H, W, out_channels]; for the attributes see `AutoencoderKL`."""

    out_channels: int
    block_channels: Sequence[int]
    layers_per_block: int
    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(self.block_channels[-1], "conv_in")(x)
        x = Middle(self.norm_groups, name="mid")(x)
        for i, width in reversed(list(enumerate(self.block_channels))):
            resize = "up" if i else ""
            level = Level(width, self.layers_per_block + 1, self.norm_groups, resize)
            x = level.copy(name=f"level_{i}")(x)
        x = nn.silu(_norm(self.norm_groups, "norm_out")(x))
        return _conv(self.out_channels, "conv_out")(x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a step to the next.

    Attributes:
      resize: "down" halves the resolution, "up" doubles it, "" keeps it.
    """

    width: int
    blocks: int
    norm_groups: int
    resize: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.blocks):
            x = ResBlock(self.width, self.norm_groups, name=f"block_{j}")(x)
        if self.resize == "down":
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # right and bottom only
            x = nn.Conv(self.width, (3, 3), strides=2, padding="VALID", name="down")(x)
        elif self.resize == "up":
            x = _conv(self.width, "up")(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class ResBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input; [B, h, w, C] -> [B, h, w, width]."""

    width: int
    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in range(2):
            h = nn.silu(_norm(self.norm_groups, f"norm_{i}")(h))
            h = _conv(self.width, f"conv_{i}")(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name="shortcut")(x)
        return x + h


class Middle(nn.Module):
    """A residual block, attention and another block, at the lowest resolution."""

    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = ResBlock(width, self.norm_groups, name="block_0")(x)
        x = Attention(self.norm_groups, name="attn")(x)
        return ResBlock(width, self.norm_groups, name="block_1")(x)


class Attention(nn.Module):
    """Attention with one head over all positions, scale 1 / sqrt(C), added to its input."""

    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = _norm(self.norm_groups, "norm")(x).reshape(batch, 1, height * width, channels)
        q, k, v = (nn.Dense(channels, name=name)(h).swapaxes(1, 2) for name in "qkv")
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(channels, name="out")(h)


def _conv(width: int, name: str) -> nn.Conv:
    return nn.Conv(width, (3, 3), padding=1, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, name=name)


def images_at_once(pixels: int) -> int:
    """How many images of so many pixels a device takes at once."""
    return max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // pixels))


class Autoencoder:
    """A network with its weights, as the rest of the library uses it.

    Latents are what the diffusion model sees, (z - shift) * scale. This process's devices
    share the work, chunk by chunk, so that any number of images fits the memory.
    """

    def __init__(self, network: AutoencoderKL, params: Mapping[str, Any], name: str = ""):
        self.network = network
        self.params = params
        self.name = name

    def moments(self, images: np.ndarray) -> np.ndarray:
        """Images f32[B, H, W, C] in [-1, 1] -> f32[B, h, w, 2c]: mean and log variance of z."""
        pixels = images.shape[1] * images.shape[2]
        return self._chunked(self._moments, images, pixels)

    def encode(self, images: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Images f32[B, H, W, C] in [-1, 1] -> latents f32[B, h, w, c].

        Latents are drawn from the Gaussian of every image; without a seed they are its mean.
        """
        z, logvar = np.split(self.moments(images), 2, axis=-1)
        if seed is not None:
            noise = np.random.default_rng(seed).standard_normal(z.shape, np.float32)
            z = z + np.exp(0.5 * logvar) * noise
        return (z - self.network.shift) * self.network.scale

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents f32[B, h, w, c] -> images f32[B, H, W, C], in [-1, 1] but for overshoot."""
        z = np.asarray(latents, np.float32) / self.network.scale + self.network.shift
        pixels = latents.shape[1] * latents.shape[2] * self.network.factor**2
        return self._chunked(self._decode, z, pixels)

    @property
    def latent_channels(self) -> int:
        return self.network.latent_channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of weights, scale and shift, whatever file they came from."""
        digest = hashlib.sha256(repr((self.network.scale, self.network.shift)).encode())
        for path, leaf in sorted(flatten_dict(self.params, sep="/").items()):
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(leaf, np.float32))
        return digest.hexdigest()[:16]

    def _chunked(self, function: Any, array: np.ndarray, pixels: int) -> np.ndarray:
        """Applies `function` to chunks of [B, ...], split over the devices.

        All chunks have one size, so that it compiles once; the last one is filled up with zeros.

        Args:
          function: (params, chunk) -> results, one per entry.
          pixels: of one image, which bounds the chunk.
        """
        devices = self._mesh.size
        chunk = devices * min(images_at_once(pixels), -(-len(array) // devices))
        parts = []
        for start in range(0, len(array), chunk):
            part = np.asarray(array[start : start + chunk], np.float32)
            padding = [(0, chunk - len(part))] + [(0, 0)] * (array.ndim - 1)
            # Of this process's devices alone: the mesh of a training run has those of all hosts.
            with jax.set_mesh(self._mesh):
                placed = jax.device_put(np.pad(part, padding), self._split)
                done = function(self._placed_params, placed)
            parts.append(np.asarray(done)[: len(part)])
        return np.concatenate(parts)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.local_devices()), ("image",))

    @property
    def _split(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec("image"))

    @functools.cached_property
    def _placed_params(self) -> Any:
        return jax.device_put(self.params, NamedSharding(self._mesh, PartitionSpec()))

    @functools.cached_property
    def _moments(self) -> Any:
        def function(params, image):
            moments = self.network.apply({"params": params}, image, method="moments")
            return jnp.concatenate(moments, axis=-1)

        return jax.jit(function, out_shardings=self._split)

    @functools.cached_property
    def _decode(self) -> Any:
        def function(params, z):
            return self.network.apply({"params": params}, z, method="decode")

        return jax.jit(function, out_shardings=self._split)
