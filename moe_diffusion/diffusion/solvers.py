"""Solvers of dx/dt = v(x, t), from noise at t = 0 to data at t = 1.

The whole trajectory is one compiled loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.diffusion import paths
from moe_diffusion.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt


def run_steps(
    step: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    inputs: Any,
    return_trajectory: bool,
    last: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Applies `step` once for every input, then `last`.

    Args:
      step: (x, input of the step) -> x.
      x: [B, ...], where to start.
      inputs: a pytree of arrays [num_steps, ...].
      last: x -> x, a last step of another kind.

    Returns:
      The last state, or with `return_trajectory` the states after every step, [num_steps, B, ...].
    """

    def body(x, given):
        x = step(x, given)
        return x, x if return_trajectory else None

    x, states = jax.lax.scan(body, x, inputs)
    if last is not None:
        x = last(x)
        states = jnp.concatenate([states, x[None]]) if return_trajectory else None
    return states if return_trajectory else x


def time_grid(sampling: ConfigDict, shape: tuple[int, ...]) -> np.ndarray:
    """The times f64[steps + 1] between which `solve` steps: i / steps, unless they are shifted.

    Args:
      sampling: the section of a config, of which this function reads steps and time_shift;
        "resolution" takes `paths.resolution_shift`.
      shape: (B, H, W, C) of a batch.
    """
    grid = np.arange(sampling.steps + 1) / sampling.steps
    shift = 1.0 if sampling.time_shift == "none" else paths.resolution_shift(shape[1:3])
    return paths.shift_time(grid, shift)


def solve(
    velocity: Velocity, z: jax.Array, sampling: ConfigDict, return_trajectory: bool = False
) -> jax.Array:
    """Integrates from t = 0 to 1 on the times of `time_grid`.

    Args:
      velocity: called with x and the time of all its samples, a float32 scalar.
      z: [B, ...] the noise to start from.
      sampling: the section of a config, of which this function reads:

        * sampler: "euler" (`steps` evaluations) or "heun", whose corrector evaluates at t_{i+1} in
          every step, also at t=1 (2 * `steps` evaluations), as the authors' code does.
        * final_euler: the last step of Heun's method is one of Euler's (JiT, algorithm 2).
      return_trajectory: return the states after every step, [steps, B, ...].

    Raises:
      UserError: unknown sampler, or less than one step.
    """
    num_steps, sampler = sampling.steps, sampling.sampler
    if sampler not in ("euler", "heun"):
        raise UserError(f"sampling.sampler is {sampler!r}; choose 'euler' or 'heun'")
    if num_steps < 1:
        raise UserError(f"sampling.steps is {num_steps}; take at least 1")

    def step(x, times, corrected=sampler == "heun"):
        t, t_next, dt = times
        slope = velocity(x, t)
        if corrected:
            slope = (slope + velocity(x + dt * slope, t_next)) / 2
        return x + dt * slope

    grid, last = time_grid(sampling, z.shape), None
    times = np.stack([grid[:-1], grid[1:], np.diff(grid)], axis=1).astype(np.float32)
    if sampling.final_euler:
        last, times = partial(step, times=times[-1], corrected=False), times[:-1]
    return run_steps(step, z, times, return_trajectory, last)


def solve_adaptive(
    velocity: Velocity,
    z: jax.Array,
    sampling: ConfigDict,
    return_trajectory: bool = False,
    max_steps: int = 4096,
) -> jax.Array:
    """Integrates with Dormand-Prince 5(4) and adaptive steps, the same ones for the whole batch.

    The solver accepts a step when the error of every image (root mean square over its values,
    relative to atol + rtol * |x|) is below 1. Images therefore depend on their batch within that
    tolerance.

    Args:
      velocity, z: see `solve`.
      sampling: the section of a config, of which this function reads rtol, atol and, for a
        trajectory, steps.
      return_trajectory: return interpolated states at i / steps, [steps, B, ...].
      max_steps: a solution that needs more becomes NaN.
    """
    import diffrax  # takes a second, which the other solvers need not spend

    def worst_image(error):
        return jnp.sqrt(jnp.max(jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))))

    save = diffrax.SaveAt(t1=True)
    if return_trajectory:
        save = diffrax.SaveAt(ts=jnp.arange(1, sampling.steps + 1) / sampling.steps)
    ode = diffrax.ODETerm(lambda t, x, _: velocity(x, jnp.asarray(t, jnp.float32)))
    control = diffrax.PIDController(sampling.rtol, sampling.atol, norm=worst_image)
    options = {"saveat": save, "stepsize_controller": control, "max_steps": max_steps}
    solution = diffrax.diffeqsolve(
        ode, diffrax.Dopri5(), t0=0.0, t1=1.0, dt0=None, y0=z, throw=False, **options
    )
    solved = solution.result == diffrax.RESULTS.successful
    states = jnp.where(solved, solution.ys, jnp.nan)
    return states if return_trajectory else states[-1]
