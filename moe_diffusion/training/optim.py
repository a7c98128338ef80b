"""AdamW, its schedule, clipping and the moving averages of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

Tree = Any


def make_schedule(optim_config: Any, num_steps: int) -> optax.Schedule:
    """Learning rate of step n (0, 1, ...): linear warm-up from 0, then what `schedule` names.

    `cosine` and `linear` end at `min_learning_rate` after `num_steps`; `inverse_sqrt` is
    peak * sqrt(warmup / n). With a warm-up, step 0 has rate 0.
    """
    peak, warmup = optim_config.learning_rate, optim_config.warmup_steps
    floor, rest = optim_config.min_learning_rate, max(1, num_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=floor / peak),
        "linear": lambda: optax.linear_schedule(peak, floor, rest),
        "inverse_sqrt": lambda: lambda n: peak * jnp.sqrt(warmup / jnp.maximum(n + warmup, 1)),
    }[optim_config.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    optim_config: Any, is_stacked: Callable[[str], bool]
) -> optax.GradientTransformation:
    """torch.optim.AdamW (1711.05101, Algorithm 2) before the multiplication by the learning rate.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        (step n = 1, 2, ...)
        u = m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay p

    The training step subtracts rate * u. `decay_mask` "matrices" spares biases, scales and vectors.

    Args:
      is_stacked: tells from the path of a parameter whether it has a layer axis.
    """
    mask = partial(_matrices, is_stacked) if optim_config.decay_mask == "matrices" else None
    decay = optax.add_decayed_weights(optim_config.weight_decay, mask)
    return optax.chain(_scale_by_adam(optim_config), decay)


def _scale_by_adam(optim_config: Any) -> optax.GradientTransformation:
    """optax.scale_by_adam with its state, but it rounds m to `mu_dtype` before it makes u from m.

    optax makes u from an f32 m, which is one more copy of all parameters if the state keeps
    bfloat16. v stays f32, since bfloat16 would lose its small steps.
    """
    b1, b2, eps = optim_config.b1, optim_config.b2, optim_config.eps
    dtype = jnp.dtype(optim_config.mu_dtype)

    def init(params: Tree) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Tree, state: optax.ScaleByAdamState, params: Tree = None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(dtype), state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        scale_m, scale_v = 1 / (1 - b1**count), 1 / (1 - b2**count)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return scale_m * m.astype(v.dtype) / (jnp.sqrt(scale_v * v) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _matrices(is_stacked: Callable[[str], bool], params: Tree) -> Tree:
    """True for what has at least two axes in one layer and is no bias (JiT's parameter groups)."""

    def is_matrix(path: tuple[str, ...], param: jax.Array) -> bool:
        axes = param.ndim - is_stacked("/".join(path))
        return axes > 1 and not path[-1].endswith(("bias", "scale"))

    return path_aware_map(is_matrix, params)


def clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    """What torch's clip_grad_norm_ multiplies gradients by: min(1, max_norm / (norm + 1e-6))."""
    if max_norm == 0:
        return jnp.float32(1.0)
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))


def init_emas(params: Tree, router_state: Tree, ema_config: Any) -> dict[str, dict[str, Tree]]:
    """One f32 average per decay, by its text ("0.9999"). It starts at the given values.

    With `ema_config.router_state == "live"` an average has no router state of its own.
    """
    own = {} if ema_config.router_state == "live" else router_state

    def start() -> dict[str, Tree]:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return {"params": average, "router_state": jax.tree.map(jnp.copy, own)}

    return {str(decay): start() for decay in ema_config.decays}


def update_emas(
    emas: Tree, params: Tree, router_state: Tree, step: jax.Array, ema_config: Any
) -> dict[str, dict[str, Tree]]:
    """average = d average + (1 - d) value, with the values after optimizer step `step` (0, 1, ...).

    d is the decay or, with `warmup`, at most (1 + step) / (10 + step). The state of the routers is
    averaged likewise ("average"), taken over ("copy") or left to the live one ("live").
    """

    def update(decay: str, ema: Mapping[str, Tree]) -> dict[str, Tree]:
        weight = 1 - float(decay)  # in double precision: 1 - f32(0.9999) is 2e-4 off
        if ema_config.warmup:
            weight = jnp.maximum(weight, 9 / (10 + step))
        average = partial(jax.tree.map, lambda a, b: a + weight * (b - a))
        own = ema["router_state"]
        if ema_config.router_state == "average":
            own = average(own, router_state)
        elif ema_config.router_state == "copy":
            own = router_state
        return {"params": average(ema["params"], params), "router_state": own}

    return {decay: update(decay, ema) for decay, ema in emas.items()}
