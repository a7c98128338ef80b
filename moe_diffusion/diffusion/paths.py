"""The flow path between noise and data, and the times at which it is trained.

Time runs from noise (t=0) to data (t=1). Rectified flow (arXiv 2209.03003), as DSMoE and DiffMoE
train it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_diffusion.errors import UserError


def interpolate(data: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = t * data + (1 - t) * noise.

    Args:
      data, noise: [B, ...].
      t: [B] in [0, 1].
    """
    t = t.reshape(t.shape + (1,) * (data.ndim - t.ndim))
    return t * data + (1 - t) * noise


def velocity(data: jax.Array, noise: jax.Array) -> jax.Array:
    """dx_t/dt = data - noise, the regression target."""
    return data - noise


def velocity_from_data(data: jax.Array, x_t: jax.Array, t: jax.Array, t_eps: float) -> jax.Array:
    """The velocity that leads from x_t to `data`: (data - x_t) / max(1 - t, t_eps).

    JiT's reading of a network that predicts the data (arXiv 2511.13720, table 1 and eq. 6). The
    floor keeps the quotient finite near t = 1.

    Args:
      data, x_t: [B, ...].
      t: [B], or a scalar for the whole batch.
    """
    t = jnp.asarray(t)
    t = t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim))
    return (data - x_t) / jnp.maximum(1 - t, t_eps)


def shift_time(t: jax.Array, shift: float) -> jax.Array:
    """Moves the share of noise u = 1 - t to shift * u / (1 + (shift - 1) * u).

    More than 1 means more noise (arXiv 2403.03206, eq. 23); 1 changes nothing.
    """
    return t / (1 + (shift - 1) * (1 - t))


def sample_time(
    rng: jax.Array,
    shape: tuple[int, ...],
    sampling: str,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> jax.Array:
    """Training times in (0, 1), float32.

    Args:
      sampling: "uniform", or "logit_normal": sigmoid(mean + std * normal) (arXiv 2403.03206,
        eq. 19; JiTMoE uses mean -0.8, std 0.8). `mean` and `std` serve only the second.
      shift: see `shift_time`.

    Raises:
      UserError: unknown `sampling`.
    """
    if sampling == "uniform":
        return shift_time(jax.random.uniform(rng, shape), shift)
    if sampling == "logit_normal":
        t = jax.nn.sigmoid(mean + std * jax.random.normal(rng, shape))
        return shift_time(t, shift)
    raise UserError(f"diffusion.time_sampling is {sampling!r}; choose 'uniform' or 'logit_normal'")
