"""The reverse-time SDE of the linear path, with the marginals of the flow (SiT, arXiv 2401.08740).

    dx = [v(x, t) + w(t) s(x, t)] dt + sqrt(2 w(t)) dW,   w any function >= 0   (SiT eq. 5, 8)

The score s follows from the velocity: x - t v is the noise that x_t holds, so that
s = -(x - t v) / (sigma^2 (1 - t)), with sigma the standard deviation of the noise at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt

# w(t) / norm, or all of w for those that SiT scales otherwise.
DIFFUSIONS = {
    "sigma": lambda t, norm: norm * (1 - t),
    "constant": lambda t, norm: norm,
    "decreasing": lambda t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def sample(
    velocity: Velocity,
    z: jax.Array,
    num_steps: int,
    step_noise: Callable[[jax.Array], jax.Array],
    *,
    heun: bool = False,
    diffusion: str = "sigma",
    norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    noise_scale: float = 1.0,
    return_trajectory: bool = False,
) -> jax.Array:
    """Integrates from t = 0 to 1, the last step without noise.

    Args:
      velocity: called with x and the time of all its samples, a float32 scalar.
      z: [B, ...] noise of standard deviation `noise_scale`.
      num_steps: in all; num_steps - 1 equal ones up to 1 - last_step_size, then the last.
      step_noise: step i32 -> standard normal [B, ...].
      heun: the stochastic Heun method (twice the evaluations) instead of Euler-Maruyama.
      diffusion, norm: w(t), one of DIFFUSIONS.
      last_step: along the SDE's drift ("mean") or the velocity alone ("euler", which on this path
        is the same as Tweedie's estimate of x_1).
      return_trajectory: the states after every step, [num_steps, B, ...].
    """
    end = 1.0 - last_step_size
    dt = end / (num_steps - 1)

    def weight(t):
        return DIFFUSIONS[diffusion](t, norm)

    def drift(x, t):
        v = velocity(x, t)
        return v - weight(t) * (x - t * v) / (noise_scale**2 * (1 - t))

    def step(x, index):
        t = index * jnp.float32(dt)
        noise = jnp.sqrt(2 * weight(t) * dt) * step_noise(index)
        if heun:
            x += noise
            slope = drift(x, t)
            x += dt * (slope + drift(x + dt * slope, t + dt)) / 2
        else:
            x += dt * drift(x, t) + noise
        return x, x if return_trajectory else None

    x, states = jax.lax.scan(step, z, jnp.arange(num_steps - 1))
    slope = (drift if last_step == "mean" else velocity)(x, jnp.float32(end))
    x += last_step_size * slope
    return jnp.concatenate([states, x[None]]) if return_trajectory else x
