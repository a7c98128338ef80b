"""Auxiliary losses of routers, unweighted, and how a training step gathers and weighs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from moe_diffusion.errors import UserError


def balance(scores: jax.Array, load: jax.Array) -> jax.Array:
    """Load balance, E * sum_e f_e P_e; 1 when balanced, E when one expert has everything.

    scores f32[G, T, E], summing to 1 over the experts; P_e is their mean over all tokens.
    load f32[E]: assignments of each expert; f_e is its share of them. No gradient flows through it.
    Source: GShard (2006.16668) section 2.2, Switch (2101.03961) Eq. 4-6; so in TC-DiT's code.
    """
    share = load / load.sum()
    return scores.shape[-1] * jnp.sum(share * scores.mean((0, 1)))


def router_z(logits: jax.Array) -> jax.Array:
    """Mean squared logsumexp of the router logits f32[G, T, E]. ST-MoE (2202.08906) Eq. 5."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def capacity(logits: jax.Array, taken: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of capacity logits f32[G, T, E] against the experts' choice.

    taken[g, t, e] is 1 where expert e took token t. DiffMoE (2503.14487), capacity predictor loss.
    """
    return optax.sigmoid_binary_cross_entropy(logits, taken).mean()


def contrast(
    prototypes: jax.Array, x: jax.Array, taken: jax.Array, temperature: float, pooled: bool
) -> jax.Array:
    """Routing contrastive loss: a prototype is nearer to its own tokens than to those of others.

        logit[i, j] = cosine(prototype_i, mean of the tokens that expert j took) / temperature

    Cross-entropy of the rows against the diagonal, a mean over the experts that took tokens; the
    others have neither row nor column. 0 if there are none.

    Args:
      prototypes: f32[D, E].
      x, taken: tokens f32[G, T, D]; taken f32[G, T, E] is 1 where the expert took the token.
      pooled: means over the tokens of all groups, else one loss for every group.

    Source: ProMoE (2510.24711) section 3, routing contrastive learning.
    """
    sums = jnp.einsum("gtd,gte->gde", x, taken, precision=lax.Precision.HIGHEST)
    count = taken.sum(1)  # [G, E]
    if pooled:
        sums, count = sums.sum(0, keepdims=True), count.sum(0, keepdims=True)
    valid = count > 0
    means = unit(sums / jnp.maximum(count, 1)[:, None], axis=1)
    cosine = jnp.einsum(
        "di,gdj->gij", unit(prototypes, axis=0), means, precision=lax.Precision.HIGHEST
    )
    # Finite, so that a group whose experts took nothing has no NaN in its gradient.
    logits = jnp.where(valid[:, None], cosine / temperature, -1e9)
    own = jnp.diagonal(jax.nn.log_softmax(logits), axis1=1, axis2=2)
    return -jnp.where(valid, own, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def unit(x: jax.Array, axis: int) -> jax.Array:
    """Vectors of length 1 along an axis; a zero vector stays zero."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))


def sum_by_name(tree: Any) -> dict[str, jax.Array]:
    """Sown losses {path: {name: [layers]}} -> {name: sum over all layers}."""
    return {name: sum(jnp.sum(v) for v in values) for name, values in _by_name(tree).items()}


def mean_by_name(tree: Any) -> dict[str, jax.Array]:
    """Sown metrics {path: {name: [layers]}} -> {name: mean over all layers}."""
    by_name = _by_name(tree).items()
    return {name: jnp.concatenate([jnp.ravel(v) for v in vs]).mean() for name, vs in by_name}


def weigh(losses: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of weights[name] * losses[name]; the names on both sides must be the same."""
    if set(losses) != set(weights):
        raise UserError(
            f"loss_weights names {sorted(weights)}, but the model's losses are {sorted(losses)}; "
            "give every loss one weight and no other"
        )
    return sum((weights[name] * losses[name] for name in sorted(losses)), jnp.float32(0.0))


def _by_name(tree: Any) -> dict[str, list[jax.Array]]:
    values: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values.setdefault(path[-1].key, []).append(leaf)
    return values
