"""What a training step minimises: an error of the network's output, plus the routers' losses.

    flow:  L = E || v(x_t, t, cond) - (x_1 - x_0) ||^2 + sum_i weight_i * router_loss_i
    ddpm:  L = E [mse of epsilon + vb]                 + sum_i weight_i * router_loss_i

The random draws are a value of their own, so that a recorded trajectory can be replayed. Everywhere
`diffusion` is that section of a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion import time_buckets
from moe_diffusion.buckets import sized
from moe_diffusion.conditions import cond_of, drop
from moe_diffusion.diffusion import ddpm, paths, sown

# (params, router_state, batch, key, frozen) -> (loss, aux); frozen: what is not trained, see
# training/step.py
LossFn = Callable[..., tuple[jax.Array, "LossAux"]]


class Draws(NamedTuple):
    """All randomness of one evaluation of the loss.

    Attributes:
      t: [B], float32 in (0, 1) for a flow, integer steps 0..999 for DDPM.
      noise: [B, H, W, C], standard normal.
      drop_uniform: [B]; a sample has no condition where this is below `diffusion.cond_dropout`.
      dropout: key of the network's own dropout; None for a network without.
    """

    t: jax.Array
    noise: jax.Array
    drop_uniform: jax.Array
    dropout: jax.Array | None = None


class LossAux(NamedTuple):
    """What a loss reports beside its value.

    Attributes:
      metrics: name -> scalar, for logging only; and the table of `time_buckets`.
      router_stats: statistics for `stack.next_router_state`; {} if no router keeps a state.
    """

    metrics: dict[str, jax.Array]
    router_stats: Any


def draw(rng: jax.Array, shape: tuple[int, ...], diffusion: ConfigDict) -> Draws:
    """Draws times, noise and dropouts for a batch of images of `shape` (B, H, W, C)."""
    rng_t, rng_noise, rng_drop, rng_dropout = jax.random.split(rng, 4)
    if diffusion.path == "ddpm":
        t = jax.random.randint(rng_t, shape[:1], 0, ddpm.NUM_TIMESTEPS)
    else:
        t = paths.sample_time(rng_t, shape, diffusion)
    noise = jax.random.normal(rng_noise, shape)
    return Draws(t, noise, jax.random.uniform(rng_drop, shape[:1]), rng_dropout)


def velocity_of(
    output: jax.Array, x_t: jax.Array, t: jax.Array, diffusion: ConfigDict
) -> jax.Array:
    """The velocity f32[B, H, W, C] that a network's output stands for.

    Args:
      output: [B, H, W, C or 2C]; with model.learn_sigma it is 2C, and a flow uses the first half.
      x_t: [B, H, W, C] at the times t, [B] or a scalar.
    """
    prediction = output[..., : x_t.shape[-1]].astype(jnp.float32)
    if diffusion.prediction == "data":
        return paths.velocity_from_data(prediction, x_t, t, diffusion.t_eps)
    return prediction


class Objective(NamedTuple):
    """What the network is asked, and how its answer is judged.

    Attributes:
      x_t: [B, H, W, C], the corrupted images.
      t: f32[B], as the network wants it.
      time: f32[B], 0 = noise and 1 = data.
      errors: output [B, H, W, C or 2C] -> {name: f32[B]}, the sum of whose means is minimised.
    """

    x_t: jax.Array
    t: jax.Array
    time: jax.Array
    errors: Callable[[jax.Array], dict[str, jax.Array]]


def _flow(image: jax.Array, draws: Draws, diffusion: ConfigDict) -> Objective:
    """Velocity matching.

    A network that predicts the data is compared as a velocity too (the v-loss of 2511.13720, eq.
    6), with the same floor of 1 - t on both sides.
    """
    t, noise = draws.t, diffusion.noise_scale * draws.noise
    x_t = paths.interpolate(image, noise, t)

    def errors(output):
        if diffusion.prediction == "data":
            target = paths.velocity_from_data(image, x_t, t, diffusion.t_eps)
        else:
            target = paths.velocity(image, noise)
        difference = velocity_of(output, x_t, t, diffusion) - target
        return {"mse": jnp.mean(jnp.square(difference), (1, 2, 3))}

    return Objective(x_t, t, t, errors)


def _ddpm(image: jax.Array, draws: Draws, diffusion: ConfigDict) -> Objective:
    """The noise's error and the variational bound, see `ddpm.loss_terms`."""
    process = ddpm.linear_process()

    def errors(output):
        terms = ddpm.loss_terms(process, output, image, draws.t, draws.noise)
        return dict(zip(("mse", "vb"), terms, strict=True))

    x_t, t = ddpm.diffuse(process, image, draws.t, draws.noise), draws.t.astype(jnp.float32)
    return Objective(x_t, t, 1 - t / ddpm.NUM_TIMESTEPS, errors)


def objective(image: jax.Array, draws: Draws, diffusion: ConfigDict) -> Objective:
    """What the network is asked about images [B, H, W, C] on `diffusion.path`."""
    return (_ddpm if diffusion.path == "ddpm" else _flow)(image, draws, diffusion)


def diffusion_loss(
    model: nn.Module,
    params: Any,
    router_state: Any,
    batch: Mapping[str, jax.Array],
    draws: Draws,
    diffusion: ConfigDict,
    loss_weights: Mapping[str, float],
) -> tuple[jax.Array, LossAux]:
    """The loss of one batch.

    Args:
      model: for images of any size, see `buckets.sized`.
      batch: "image" [B, H, W, C] in [-1, 1], and the fields of the condition.
      loss_weights: see `with_router_losses`.

    Returns:
      The scalar loss, and the report of `with_router_losses`. The error of a flow is "mse"; DDPM
      has "mse" and "vb". The metrics also have their sum by time, see `time_buckets`.
    """
    asked = objective(batch["image"], draws, diffusion)
    output, collections = sized(model, asked.x_t.shape[1:]).apply(
        {"params": params, "router_state": router_state},
        asked.x_t,
        asked.t,
        drop(model, cond_of(batch), draws.drop_uniform < diffusion.cond_dropout),
        True,
        rngs={} if draws.dropout is None else {"dropout": draws.dropout},
        mutable=["losses", "metrics", "router_stats"],
    )
    means, by_time = time_buckets.averages(asked.time, asked.errors(output))
    loss, aux = with_router_losses(means, collections, loss_weights)
    return loss, aux._replace(metrics=aux.metrics | by_time)


def with_router_losses(
    errors: Mapping[str, jax.Array], collections: Mapping[str, Any], loss_weights: dict[str, float]
) -> tuple[jax.Array, LossAux]:
    """Adds up errors and the weighted losses of the routers, and reports them.

    Args:
      errors: {name: scalar}, each minimised with weight 1.
      collections: what `model.apply` returned beside the output: the collections "losses",
        "metrics" and "router_stats" that the routers sowed.
      loss_weights: name -> weight; the names must be those that the routers return.

    Returns:
      The scalar loss, and the report. Its metrics are "loss" (that scalar), the errors, every
      router's loss (unweighted, summed over layers) and the routers' metrics (mean over layers).

    Raises:
      UserError: `loss_weights` has other names.
    """
    losses = sown.sum_by_name(collections.get("losses", {}))
    loss = sum(errors.values()) + sown.weigh(losses, loss_weights)
    router_metrics = sown.mean_by_name(collections.get("metrics", {}))
    metrics = {"loss": loss, **errors, **losses, **router_metrics}
    return loss, LossAux(metrics, collections.get("router_stats", {}))


def make_loss(model: nn.Module, config: ConfigDict) -> LossFn:
    """The loss that `config.diffusion` and `config.loss_weights` ask for."""
    diffusion, loss_weights = config.diffusion, dict(config.loss_weights)

    def loss_fn(params, router_state, batch, rng, frozen=None):
        del frozen
        draws = draw(rng, batch["image"].shape, diffusion)
        return diffusion_loss(model, params, router_state, batch, draws, diffusion, loss_weights)

    return loss_fn
