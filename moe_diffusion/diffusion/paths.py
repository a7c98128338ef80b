"""The flow path between noise and data, and the times at which it is trained.

Time runs from noise (t=0) to data (t=1). The path is that of rectified flow (arXiv 2209.03003), as
DSMoE and DiffMoE train it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """t, [B] or a scalar, with axes of size 1 behind, so that it multiplies x [B, ...]."""
    return jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))


def interpolate(data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = t * data + (1 - t) * noise.

    Args:
      data, noise: [B, ...].
      t: [B] in [0, 1].
    """
    t = expand(t, data)
    return t * data + (1 - t) * noise


def velocity(data: jax.Array, noise: jax.Array) -> jax.Array:
    """dx_t/dt = data - noise, the regression target."""
    return data - noise


def velocity_from_data(data: jax.Array, x_t: jax.Array, t: jax.Array, t_eps: float) -> jax.Array:
    """The velocity that leads from x_t to `data`: (data - x_t) / max(1 - t, t_eps).

    JiT reads a network that predicts the data this way (arXiv 2511.13720, table 1 and eq. 6). The
    floor keeps the quotient finite near t = 1.

    Args:
      data, x_t: [B, ...].
      t: [B], or a scalar for the whole batch.
    """
    return (data - x_t) / jnp.maximum(1 - expand(t, x_t), t_eps)


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """Moves the share of noise u = 1 - t to shift * u / (1 + (shift - 1) * u).

    More than 1 means more noise (arXiv 2403.03206, eq. 23); 1 changes nothing.
    """
    return t / (1 + (shift - 1) * (1 - t))


def resolution_shift(sides: tuple[int, int]) -> float:
    """The shift exp(mu) with which FLUX.1 [dev] samples a latent of these sides (H, W).

    mu is linear in the number of tokens H/2 * W/2: 0.5 at 256 and 1.15 at 4096. `shift_time` of
    exp(mu) is what flux/sampling.py writes as exp(mu) / (exp(mu) + 1 / u - 1).
    """
    return np.exp(0.5 + (1.15 - 0.5) * (np.prod(sides) / 4 - 256) / (4096 - 256))


def sample_time(rng: jax.Array, shape: tuple[int, ...], diffusion: ConfigDict) -> jax.Array:
    """Training times in (0, 1), float32.

    Args:
      shape: (B, H, W, C) of the images; the result is f32[B].
      diffusion: the section of a config, of which this function reads:

        * time_sampling: "uniform", or "logit_normal": sigmoid(time_mean + time_std * normal)
          (arXiv 2403.03206, eq. 19; JiTMoE uses mean -0.8, std 0.8).
        * time_shift: see `shift_time`; 0 takes `resolution_shift` of the images.

    Raises:
      UserError: unknown `time_sampling`.
    """
    sampling = diffusion.time_sampling
    if sampling == "uniform":
        t = jax.random.uniform(rng, shape[:1])
    elif sampling == "logit_normal":
        normal = jax.random.normal(rng, shape[:1])
        t = jax.nn.sigmoid(diffusion.time_mean + diffusion.time_std * normal)
    else:
        raise UserError(f"diffusion.time_sampling is {sampling!r}; choose uniform | logit_normal")
    return shift_time(t, diffusion.time_shift or resolution_shift(shape[1:3]))
