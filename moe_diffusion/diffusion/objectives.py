"""The velocity objective: what a training step minimises.

    L = E || v(x_t, t, y) - (x_1 - x_0) ||^2 + sum_i weight_i * auxiliary_i

The random draws are a value of their own, so that a recorded trajectory can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from moe_diffusion.diffusion import paths
from moe_diffusion.moe import losses as aux_losses

LossFn = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, "LossAux"]]


class Draws(NamedTuple):
    """All randomness of one loss evaluation: t [B], noise [B, H, W, C], drop_uniform [B]."""

    t: jax.Array
    noise: jax.Array
    drop_uniform: jax.Array


class LossAux(NamedTuple):
    """What a loss reports beside its value.

    Attributes:
      metrics: name -> scalar, for logging only.
      router_stats: statistics for `model.update_router_state`; {} if the router keeps no state.
    """

    metrics: dict[str, jax.Array]
    router_stats: Any


def draw(
    rng: jax.Array,
    image: jax.Array,
    *,
    time_sampling: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
) -> Draws:
    """Draws times, noise and label-dropout uniforms for a batch of images [B, H, W, C]."""
    rng_t, rng_noise, rng_drop = jax.random.split(rng, 3)
    batch = image.shape[:1]
    return Draws(
        t=paths.sample_time(rng_t, batch, time_sampling, time_mean, time_std),
        noise=jax.random.normal(rng_noise, image.shape),
        drop_uniform=jax.random.uniform(rng_drop, batch),
    )


def flow_loss(
    model: nn.Module,
    params: Any,
    router_state: Any,
    batch: Mapping[str, jax.Array],
    draws: Draws,
    *,
    label_dropout: float,
    loss_weights: Mapping[str, float],
) -> tuple[jax.Array, LossAux]:
    """Velocity matching plus the weighted losses of the routers.

    Args:
      batch: "image" [B, H, W, C] in [-1, 1], "label" i32[B].
      label_dropout: a label becomes the null class where drop_uniform < label_dropout.
      loss_weights: name -> weight; the names must be those that the routers return.

    Returns:
      The scalar loss, and metrics "loss" (that scalar), "mse", every auxiliary loss (unweighted,
      summed over layers) and the routers' metrics (mean over layers).
    """
    image = batch["image"]
    label = jnp.where(draws.drop_uniform < label_dropout, model.num_classes, batch["label"])
    x_t = paths.interpolate(image, draws.noise, draws.t)
    output, sown = model.apply(
        {"params": params, "router_state": router_state},
        x_t,
        draws.t,
        label,
        True,
        mutable=["losses", "metrics", "router_stats"],
    )
    # With learn_sigma the network has 2C outputs; the flow uses the first half.
    prediction = output[..., : image.shape[-1]].astype(jnp.float32)
    mse = jnp.mean(jnp.square(prediction - paths.velocity(image, draws.noise)))
    named = aux_losses.sum_by_name(sown.get("losses", {}))
    loss = mse + aux_losses.weigh(named, loss_weights)
    router_metrics = aux_losses.mean_by_name(sown.get("metrics", {}))
    metrics = {"loss": loss, "mse": mse, **named, **router_metrics}
    return loss, LossAux(metrics, sown.get("router_stats", {}))


def make_loss(model: nn.Module, config: ml_collections.ConfigDict) -> LossFn:
    """The loss that `config.diffusion` asks for, see `make_flow_loss`."""
    return make_flow_loss(model, config)


def make_flow_loss(model: nn.Module, config: ml_collections.ConfigDict) -> LossFn:
    """The loss of `config` as `loss_fn(params, router_state, batch, rng) -> (loss, LossAux)`."""
    diffusion = config.diffusion
    loss_weights = dict(config.loss_weights)

    def loss_fn(params, router_state, batch, rng):
        draws = draw(
            rng,
            batch["image"],
            time_sampling=diffusion.time_sampling,
            time_mean=diffusion.time_mean,
            time_std=diffusion.time_std,
        )
        return flow_loss(
            model,
            params,
            router_state,
            batch,
            draws,
            label_dropout=diffusion.label_dropout,
            loss_weights=loss_weights,
        )

    return loss_fn
