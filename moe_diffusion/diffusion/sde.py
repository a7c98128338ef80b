"""The reverse-time SDE of the linear path, with the marginals of the flow (SiT, arXiv 2401.08740).

    dx = [v(x, t) + w(t) s(x, t)] dt + sqrt(2 w(t)) dW,   w any function >= 0   (SiT eq. 5, 8)

The velocity determines the score s: x - t v is the noise that x_t holds, so that
s = -(x - t v) / (sigma^2 (1 - t)), with sigma the standard deviation of the noise at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_diffusion.diffusion.solvers import Velocity, run_steps

# w(t) from t and sampling.sde_norm.
DIFFUSIONS = {
    "sigma": lambda t, norm: norm * (1 - t),
    "constant": lambda t, norm: norm,
    "decreasing": lambda t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing_decreasing": lambda t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def solve(
    velocity: Velocity,
    z: jax.Array,
    sampling: ConfigDict,
    step_noise: Callable[[jax.Array], jax.Array],
    noise_scale: float = 1.0,
    return_trajectory: bool = False,
) -> jax.Array:
    """Integrates from t = 0 to 1, the last step without noise.

    Args:
      velocity: called with x and the time of all its samples, a float32 scalar.
      z: [B, ...] noise of standard deviation `noise_scale`.
      sampling: the section of a config, of which this function reads:

        * steps: in all; steps - 1 equal ones up to 1 - sde_last_step_size, then the last.
        * sampler: "sde" (Euler-Maruyama) or "sde_heun", the stochastic Heun method, which takes
          twice the evaluations.
        * sde_diffusion, sde_norm: w(t), one of DIFFUSIONS.
        * sde_last_step: along the SDE's drift ("mean") or the velocity alone ("euler", which on
          this path is the same as Tweedie's estimate of x_1).
      step_noise: step i32 -> standard normal [B, ...].
      return_trajectory: return the states after every step, [steps, B, ...].
    """
    end = 1.0 - sampling.sde_last_step_size
    dt = end / (sampling.steps - 1)

    def weight(t):
        return DIFFUSIONS[sampling.sde_diffusion](t, sampling.sde_norm)

    def drift(x, t):
        v = velocity(x, t)
        return v - weight(t) * (x - t * v) / (noise_scale**2 * (1 - t))

    def step(x, index):
        t = index * jnp.float32(dt)
        noise = jnp.sqrt(2 * weight(t) * dt) * step_noise(index)
        if sampling.sampler == "sde":
            return x + (dt * drift(x, t) + noise)
        x += noise
        slope = drift(x, t)
        return x + dt * (slope + drift(x + dt * slope, t + dt)) / 2

    def last(x):
        slope = (drift if sampling.sde_last_step == "mean" else velocity)(x, jnp.float32(end))
        return x + sampling.sde_last_step_size * slope

    return run_steps(step, z, jnp.arange(sampling.steps - 1), return_trajectory, last)
