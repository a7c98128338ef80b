"""The sampler that a config asks for: from noise to data.

All noise of an image comes from a key of its own, so that an image does not depend on the batch
that it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from moe_diffusion.diffusion import ddpm, guidance, objectives, sde, solvers
from moe_diffusion.parallel.mesh import use_pools

# (keys [B], step i32, shape of a batch) -> f32[B, ...]
StepNoise = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]
# (variables, z [B, H, W, C], cond {field: [B, ...]}, keys [B] or None) -> samples [B, H, W, C]
Sampler = Callable[..., jax.Array]

STOCHASTIC = ("sde", "sde_heun", "ddpm", "ddim")


def step_noise(keys: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise f32[B, ...] of a step, each image's from its own key."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape[1:])

    return jax.vmap(draw)(keys)


def make_sampler(
    model: nn.Module,
    config: ConfigDict,
    return_trajectory: bool = False,
    noise: StepNoise = step_noise,
    pool: int = 0,
) -> Sampler:
    """Compiles the sampler of `config.sampling` for a model trained as `config.diffusion` says.

    Args:
      return_trajectory: the sampler returns the states after every step, [steps, B, H, W, C].
      noise: where the noise of stochastic samplers comes from; replaced to replay a record.
      pool: images that compete for experts, see `sampling.generate.pool_of`. A batch must consist
        of whole pools. 0 pools what a training step would.

    Returns:
      fn(variables, z, cond, keys=None) -> samples f32[B, H, W, C]. z [B, H, W, C] is standard
      normal, whatever `diffusion.noise_scale` is. cond is the condition. Only the samplers in
      STOCHASTIC need keys [B], one per image.

    Raises:
      UserError: `sampling.respacing` or `sampling.steps` is impossible for ddpm.
    """
    config = FrozenConfigDict(config)
    sampling, diffusion = config.sampling, config.diffusion
    process = None
    if diffusion.path == "ddpm":
        steps = ddpm.spaced_timesteps(sampling.respacing or str(sampling.steps))
        process = ddpm.respace(ddpm.linear_process(), steps)

    def sampler(variables, z, cond, keys=None):
        if keys is None and noise is step_noise and sampling.sampler in STOCHASTIC:
            raise ValueError(f"the sampler {sampling.sampler} needs keys, one per image")
        if pool and len(z) % pool:
            raise ValueError(f"{len(z)} images are no whole pools of {pool}")

        def predict(x, t, cond):
            # Guidance may double the images of a pool, but not the number of pools.
            with use_pools(len(z) // pool if pool else 0):
                output = model.apply(variables, x, jnp.full(x.shape[:1], t), cond, False)
            if process is not None:
                return output.astype(jnp.float32)
            return objectives.velocity_of(output, x, t, diffusion)

        guided = guidance.guide(predict, model.null, sampling)

        def of_cond(x, t):
            return guided(x, t, cond)

        def noise_of(step):
            return noise(keys, step, z.shape)

        if process is not None:
            return ddpm.sample(process, of_cond, z, sampling, noise_of, return_trajectory)
        scale = diffusion.noise_scale
        start = scale * z
        if sampling.sampler in ("sde", "sde_heun"):
            return sde.solve(of_cond, start, sampling, noise_of, scale, return_trajectory)
        solve = solvers.solve_adaptive if sampling.sampler == "dopri5" else solvers.solve
        return solve(of_cond, start, sampling, return_trajectory)

    return jax.jit(sampler)
