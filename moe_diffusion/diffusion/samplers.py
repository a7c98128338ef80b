"""From noise to data: ODE solvers for the flow, and the sampler that a config asks for.

The whole trajectory is one compiled loop. All noise of an image comes from a key of its own, so
that an image does not depend on the batch that it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from moe_diffusion.diffusion import ddpm, guidance, objectives, sde
from moe_diffusion.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt
# (keys [B], step i32, shape of a batch) -> f32[B, ...]
StepNoise = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]
# (variables, z [B, H, W, C], cond {field: [B, ...]}, keys [B] or None) -> samples [B, H, W, C]
Sampler = Callable[..., jax.Array]

STOCHASTIC = ("sde", "sde_heun", "ddpm", "ddim")


def sample(
    velocity: Velocity,
    z: jax.Array,
    num_steps: int,
    method: str = "heun",
    return_trajectory: bool = False,
    final_euler: bool = False,
) -> jax.Array:
    """Integrates the flow on the uniform grid t_i = i / num_steps.

    Args:
      velocity: called with x and the time of all its samples, a float32 scalar.
      z: [B, ...] the noise to start from.
      method: "euler" (num_steps evaluations) or "heun", whose corrector evaluates at t_{i+1} in
        every step, also at t=1 (2 * num_steps evaluations), as the authors' code does.
      return_trajectory: return the states after every step, [num_steps, B, ...].
      final_euler: the last step of Heun's method is one of Euler's (JiT, algorithm 2).

    Raises:
      UserError: unknown method, or less than one step.
    """
    if method not in ("euler", "heun"):
        raise UserError(f"sampling.sampler is {method!r}; choose 'euler' or 'heun'")
    if num_steps < 1:
        raise UserError(f"sampling.steps is {num_steps}; take at least 1")
    dt = 1.0 / num_steps

    def step(x, times, corrected=method == "heun"):
        t, t_next = times
        slope = velocity(x, t)
        if corrected:
            slope = (slope + velocity(x + dt * slope, t_next)) / 2
        x = x + dt * slope
        return x, x if return_trajectory else None

    times = jnp.arange(num_steps + 1, dtype=jnp.float32) / num_steps
    if not final_euler:
        x, states = jax.lax.scan(step, z, (times[:-1], times[1:]))
        return states if return_trajectory else x
    x, states = jax.lax.scan(step, z, (times[:-2], times[1:-1]))
    x, _ = step(x, times[-2:], corrected=False)
    return jnp.concatenate([states, x[None]]) if return_trajectory else x


def sample_adaptive(
    velocity: Velocity,
    z: jax.Array,
    rtol: float,
    atol: float,
    num_states: int = 0,
    max_steps: int = 4096,
) -> jax.Array:
    """Integrates with Dormand-Prince 5(4) and adaptive steps, the same ones for the whole batch.

    A step is accepted when the error of every image (root mean square over its values, relative to
    atol + rtol * |x|) is below 1; images therefore depend on their batch within that tolerance.

    Args:
      num_states: > 0 returns interpolated states at i / num_states, [num_states, B, ...].
      max_steps: a solution that needs more becomes NaN.
    """
    import diffrax  # takes a second, which the other samplers need not spend

    def worst_image(error):
        return jnp.sqrt(jnp.max(jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))))

    save = diffrax.SaveAt(t1=True)
    if num_states:
        save = diffrax.SaveAt(ts=jnp.arange(1, num_states + 1) / num_states)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, _: velocity(x, jnp.asarray(t, jnp.float32))),
        diffrax.Dopri5(),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=z,
        saveat=save,
        stepsize_controller=diffrax.PIDController(rtol, atol, norm=worst_image),
        max_steps=max_steps,
        throw=False,
    )
    solved = solution.result == diffrax.RESULTS.successful
    states = jnp.where(solved, solution.ys, jnp.nan)
    return states if num_states else states[-1]


def step_noise(keys: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise f32[B, ...] of a step, each image's from its own key."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape[1:])

    return jax.vmap(draw)(keys)


def make_sampler(
    model: nn.Module,
    config: ml_collections.ConfigDict,
    return_trajectory: bool = False,
    noise: StepNoise = step_noise,
) -> Sampler:
    """Compiles the sampler of `config.sampling` for a model trained as `config.diffusion` says.

    Args:
      return_trajectory: the sampler returns the states after every step, [steps, B, H, W, C].
      noise: where the noise of stochastic samplers comes from; replaced to replay a record.

    Returns:
      fn(variables, z, cond, keys=None) -> samples f32[B, H, W, C]. z [B, H, W, C] is standard
      normal, whatever `diffusion.noise_scale` is; cond is the condition; keys [B], one per image,
      are needed by the samplers in STOCHASTIC only.

    Raises:
      UserError: `sampling.respacing` or `sampling.steps` is impossible for ddpm.
    """
    config = ml_collections.FrozenConfigDict(config)
    run = _flow
    if config.diffusion.path == "ddpm":
        spacing = config.sampling.respacing or str(config.sampling.steps)
        process = ddpm.respace(ddpm.linear_process(), ddpm.spaced_timesteps(spacing))
        run = partial(_ddpm, process)

    def sampler(variables, z, cond, keys=None):
        if keys is None and noise is step_noise and config.sampling.sampler in STOCHASTIC:
            raise ValueError(f"the sampler {config.sampling.sampler} needs keys, one per image")
        return run(model, config, return_trajectory, noise, variables, z, cond, keys)

    return jax.jit(sampler)


def _guide(output, model, sampling, channels):
    """Guidance around the network's output, or what is made of it, as the config says."""
    return guidance.guide(
        output,
        model.null,
        sampling.cfg,
        interval=tuple(sampling.cfg_interval),
        channels=sampling.cfg_channels or channels,
        joint=sampling.joint,
    )


def _flow(model, config, return_trajectory, noise, variables, z, cond, keys):
    sampling, scale = config.sampling, config.diffusion.noise_scale

    def of_cond(x, t, cond):
        output = model.apply(variables, x, jnp.full(x.shape[:1], t), cond, False)
        return objectives.velocity_of(output, x, t, config.diffusion)

    guided = _guide(of_cond, model, sampling, channels=None)

    def velocity(x, t):
        return guided(x, t, cond)

    z = scale * z
    if sampling.sampler == "dopri5":
        num_states = sampling.steps if return_trajectory else 0
        return sample_adaptive(velocity, z, sampling.rtol, sampling.atol, num_states)
    if sampling.sampler in ("sde", "sde_heun"):
        return sde.sample(
            velocity,
            z,
            sampling.steps,
            lambda step: noise(keys, step, z.shape),
            heun=sampling.sampler == "sde_heun",
            diffusion=sampling.sde_diffusion,
            norm=sampling.sde_norm,
            last_step=sampling.sde_last_step,
            last_step_size=sampling.sde_last_step_size,
            noise_scale=scale,
            return_trajectory=return_trajectory,
        )
    return sample(
        velocity, z, sampling.steps, sampling.sampler, return_trajectory, sampling.final_euler
    )


def _ddpm(process, model, config, return_trajectory, noise, variables, z, cond, keys):
    sampling = config.sampling
    timesteps = jnp.asarray(process.timesteps, jnp.float32)

    def output(x, t, cond):
        output = model.apply(variables, x, jnp.full(x.shape[:1], t), cond, False)
        return output.astype(jnp.float32)

    # The variance stays that of the conditional pass.
    guided = _guide(output, model, sampling, channels=z.shape[-1])

    def step(x, executed):
        i = len(timesteps) - 1 - executed
        p = ddpm.reverse(process, guided(x, timesteps[i], cond), x, i, sampling.clip)
        drawn = noise(keys, executed, x.shape)
        if sampling.sampler == "ddim":
            x = ddpm.ddim_step(process, p, x, i, drawn, sampling.eta)
        else:
            x = ddpm.ancestral_step(p, i, drawn)
        return x, x if return_trajectory else None

    x, states = jax.lax.scan(step, z, jnp.arange(len(timesteps)))
    return states if return_trajectory else x
