"""The velocity objective: what a training step minimises.

    L = E || v(x_t, t, cond) - (x_1 - x_0) ||^2 + sum_i weight_i * auxiliary_i

The random draws are a value of their own, so that a recorded trajectory can be replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from moe_diffusion.conditions import cond_of
from moe_diffusion.diffusion import ddpm, paths
from moe_diffusion.diffusion.loss_parts import Draws, LossAux, LossFn, forward, with_router_losses


class Flow(NamedTuple):
    """What a loss must know of the flow: fields of the section `diffusion` of a config.

    Attributes:
      prediction: what the network returns, "velocity" or "data".
      t_eps: floor of 1 - t where data become a velocity.
      noise_scale: standard deviation of the noise.
    """

    prediction: str = "velocity"
    t_eps: float = 0.05
    noise_scale: float = 1.0


RECTIFIED = Flow()


def draw(
    rng: jax.Array,
    image: jax.Array,
    *,
    time_sampling: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    time_shift: float = 1.0,
) -> Draws:
    """Draws times, noise and dropouts for a batch of images [B, H, W, C]."""
    rng_t, rng_noise, rng_drop, rng_dropout = jax.random.split(rng, 4)
    batch = image.shape[:1]
    return Draws(
        t=paths.sample_time(rng_t, batch, time_sampling, time_mean, time_std, time_shift),
        noise=jax.random.normal(rng_noise, image.shape),
        drop_uniform=jax.random.uniform(rng_drop, batch),
        dropout=rng_dropout,
    )


def velocity_of(
    output: jax.Array, x_t: jax.Array, t: jax.Array, diffusion: Flow | ml_collections.ConfigDict
) -> jax.Array:
    """The velocity f32[B, H, W, C] that a network's output stands for.

    Args:
      output: [B, H, W, C or 2C] (with learn_sigma; the flow uses the first half).
      x_t: [B, H, W, C] at the times t, [B] or a scalar.
      diffusion: `Flow`, or the section of a config.
    """
    prediction = output[..., : x_t.shape[-1]].astype(jnp.float32)
    if diffusion.prediction == "data":
        return paths.velocity_from_data(prediction, x_t, t, diffusion.t_eps)
    return prediction


def flow_loss(
    model: nn.Module,
    params: Any,
    router_state: Any,
    batch: Mapping[str, jax.Array],
    draws: Draws,
    *,
    cond_dropout: float,
    loss_weights: Mapping[str, float],
    diffusion: Flow | ml_collections.ConfigDict = RECTIFIED,
) -> tuple[jax.Array, LossAux]:
    """Velocity matching plus the weighted losses of the routers, see `with_router_losses`.

    A network that predicts the data is compared as a velocity too (the v-loss of 2511.13720, eq.
    6), with the same floor of 1 - t on both sides.

    Args:
      batch: "image" [B, H, W, C] in [-1, 1], and the fields of the condition.
      cond_dropout: a sample has no condition where drop_uniform < cond_dropout.
      loss_weights: name -> weight; the names must be those that the routers return.
      diffusion: `Flow`, or the section of a config.

    Returns:
      The scalar loss, and metrics: "loss" (that scalar), "mse", and what the routers report.
    """
    image, t = batch["image"], draws.t
    noise = diffusion.noise_scale * draws.noise
    x_t = paths.interpolate(image, noise, t)
    dropped = draws.drop_uniform < cond_dropout
    output, sown = forward(
        model, params, router_state, x_t, t, cond_of(batch), dropped, draws.dropout
    )
    if diffusion.prediction == "data":
        target = paths.velocity_from_data(image, x_t, t, diffusion.t_eps)
    else:
        target = paths.velocity(image, noise)
    mse = jnp.mean(jnp.square(velocity_of(output, x_t, t, diffusion) - target))
    return with_router_losses(mse, sown, loss_weights, mse=mse)


def make_loss(model: nn.Module, config: ml_collections.ConfigDict) -> LossFn:
    """The loss that `config.diffusion` asks for, `make_flow_loss` or `ddpm.make_ddpm_loss`."""
    if config.diffusion.path == "ddpm":
        return ddpm.make_ddpm_loss(model, config)
    return make_flow_loss(model, config)


def make_flow_loss(model: nn.Module, config: ml_collections.ConfigDict) -> LossFn:
    """The loss of `config` as a `LossFn`."""
    diffusion = config.diffusion
    loss_weights = dict(config.loss_weights)

    def loss_fn(params, router_state, batch, rng, frozen=None):
        del frozen
        draws = draw(
            rng,
            batch["image"],
            time_sampling=diffusion.time_sampling,
            time_mean=diffusion.time_mean,
            time_std=diffusion.time_std,
            time_shift=diffusion.time_shift,
        )
        return flow_loss(
            model,
            params,
            router_state,
            batch,
            draws,
            cond_dropout=diffusion.cond_dropout,
            loss_weights=loss_weights,
            diffusion=diffusion,
        )

    return loss_fn
