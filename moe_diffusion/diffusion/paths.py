"""The flow path between noise and data, and the times at which it is trained.

Time runs from noise (t=0) to data (t=1). Rectified flow (arXiv 2209.03003), as DSMoE and DiffMoE
train it.
"""

from __future__ import annotations

import jax

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


def sample_time(
    rng: jax.Array, shape: tuple[int, ...], sampling: str, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """Training times in (0, 1), float32.

    Args:
      sampling: "uniform", or "logit_normal": sigmoid(mean + std * normal) (arXiv 2403.03206,
        eq. 19; JiTMoE uses mean -0.8, std 0.8). `mean` and `std` serve only the second.

    Raises:
      UserError: unknown `sampling`.
    """
    if sampling == "uniform":
        return jax.random.uniform(rng, shape)
    if sampling == "logit_normal":
        return jax.nn.sigmoid(mean + std * jax.random.normal(rng, shape))
    raise UserError(f"diffusion.time_sampling is {sampling!r}; choose 'uniform' or 'logit_normal'")
