"""Euler and Heun integration of dx/dt = v(x, t) from noise (t=0) to data (t=1).

The whole trajectory is one `lax.scan`, compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from moe_diffusion.diffusion import guidance
from moe_diffusion.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt


def sample(
    velocity: Velocity,
    z: jax.Array,
    num_steps: int,
    method: str = "heun",
    return_trajectory: bool = False,
) -> jax.Array:
    """Integrates the flow on the uniform grid t_i = i / num_steps.

    Args:
      velocity: called with x and the time of all its samples, a float32 scalar.
      z: [B, ...] standard normal noise.
      method: "euler" (num_steps evaluations) or "heun", whose corrector evaluates at t_{i+1} in
        every step, also at t=1 (2 * num_steps evaluations), as the authors' code does.
      return_trajectory: return the states after every step, [num_steps, B, ...].

    Raises:
      UserError: unknown method, or less than one step.
    """
    if method not in ("euler", "heun"):
        raise UserError(f"sampling.sampler is {method!r}; choose 'euler' or 'heun'")
    if num_steps < 1:
        raise UserError(f"sampling.steps is {num_steps}; take at least 1")
    dt = 1.0 / num_steps

    def step(x, times):
        t, t_next = times
        slope = velocity(x, t)
        if method == "heun":
            slope = (slope + velocity(x + dt * slope, t_next)) / 2
        x = x + dt * slope
        return x, x if return_trajectory else None

    times = jnp.arange(num_steps + 1, dtype=jnp.float32) / num_steps
    x, trajectory = jax.lax.scan(step, z, (times[:-1], times[1:]))
    return trajectory if return_trajectory else x


def make_sampler(
    model: nn.Module, config: ml_collections.ConfigDict, return_trajectory: bool = False
) -> Callable[[Mapping[str, Any], jax.Array, jax.Array], jax.Array]:
    """Compiles the sampler of `config.sampling` for a model trained as `config.diffusion` says.

    Returns:
      fn(variables, z [B, H, W, C], labels i32[B]) -> samples [B, H, W, C] (see `sample` for the
      trajectory), float32.
    """
    sampling = ml_collections.FrozenConfigDict(config.sampling)

    def run(variables, z, labels):
        def velocity(x, t, label):
            output = model.apply(variables, x, jnp.full(x.shape[:1], t), label, False)
            return output[..., : x.shape[-1]].astype(jnp.float32)

        guided = guidance.guide(
            velocity,
            model.num_classes,
            sampling.cfg,
            interval=tuple(sampling.cfg_interval),
            joint=sampling.joint,
        )
        return sample(
            lambda x, t: guided(x, t, labels),
            z,
            sampling.steps,
            sampling.sampler,
            return_trajectory,
        )

    return jax.jit(run)
