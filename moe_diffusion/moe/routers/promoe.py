"""ProMoE: tokens meet the experts whose prototypes they resemble (2510.24711, section 3).

    cosine[t, e] = cosine of token t and the prototype of expert e, a learned vector

Tokens of unconditional samples go, with weight 1, to an expert of their own: the last one.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import check_values, require
from moe_diffusion.moe.router import Aux, Router, exact_matmul
from moe_diffusion.moe.routing import (
    Routing,
    by_expert,
    by_token,
    slots_per_expert,
    top_experts,
    top_tokens,
)


class ProMoE(Router):
    """What token choice and expert choice have in common.

    scores: how a cosine becomes a gate: identity | sigmoid | softmax.
    null_expert: the last of num_experts serves the tokens of unconditional samples, and only them.
      Without it they are routed as all others.
    contrast_temperature: of the loss `contrast`.
    """

    scores: str = "softmax"
    null_expert: bool = True
    contrast_temperature: float = 0.07

    share: ClassVar[str]  # the field that says how many experts a token has on average
    provides: ClassVar[tuple[str, ...]] = ("contrast",)

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        check_values(
            config,
            "model.router.",
            choices={"scores": ("identity", "sigmoid", "softmax")},
            positive=(cls.share, "contrast_temperature"),
        )
        require(
            config[cls.share] <= num_experts - config.null_expert,
            f"model.router.{cls.share} = {config[cls.share]} exceeds the experts with a prototype, "
            f"model.moe.num_experts = {num_experts} less model.router.null_expert = "
            f"{int(config.null_expert)}: lower it, or add experts",
        )

    @property
    def num_routed(self) -> int:
        """How many experts have a prototype."""
        return self.num_experts - self.null_expert

    def gates(self, cosine: jax.Array, axis: int) -> jax.Array:
        """Cosines f32[G, T, E] as weights; a softmax is over `axis`."""
        if self.scores == "identity":
            return cosine
        return jax.nn.sigmoid(cosine) if self.scores == "sigmoid" else jax.nn.softmax(cosine, axis)

    def null_tokens(self, x: jax.Array, is_null: jax.Array | None) -> jax.Array:
        """bool[G, T]: the tokens for the last expert."""
        if is_null is None or not self.null_expert:
            return jnp.zeros(x.shape[:2], bool)
        return is_null


class ProMoETokenChoice(ProMoE):
    """Every token takes its K best experts; gates are not renormalised.

    top_k: K, experts per token.
    """

    top_k: int = 2

    share: ClassVar[str] = "top_k"
    group_matters: ClassVar[bool] = False

    @property
    def experts_per_token(self) -> float:
        return self.top_k

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del train
        x = x.astype(jnp.float32)
        null = self.null_tokens(x, is_null)[..., None]
        prototypes = self.kernel(x.shape[-1], self.num_routed)
        cosine = exact_matmul(unit(x, axis=-1), unit(prototypes, axis=0))
        expert = top_experts(lax.stop_gradient(cosine), self.top_k)
        weight = jnp.take_along_axis(self.gates(cosine, axis=-1), expert, axis=-1)
        expert = jnp.where(null, self.num_experts - 1, expert)
        weight = jnp.where(null, jnp.arange(self.top_k) == 0, weight)

        def contrast():
            taken = jax.nn.one_hot(expert, self.num_experts).sum(-2)[..., : self.num_routed]
            return contrast_loss(prototypes, x, taken, self.contrast_temperature, pooled=True)

        return by_token(expert, weight), Aux(self.asked(contrast=contrast), {}, {})


class ProMoEExpertChoice(ProMoE):
    """Every expert with a prototype takes its C best tokens of the group (the sample).

    C = int(T / E * capacity), at least 1, of the E experts with a prototype. They do not choose
    among the tokens of unconditional samples; a group of nothing else leaves the slots unused. A
    softmax is over the tokens of an expert. The last expert takes all tokens of unconditional
    samples, so the list has no equal shares, and dispatch sorts it.

    capacity: experts per token on average.
    """

    capacity: float = 1.0

    share: ClassVar[str] = "capacity"

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del train
        groups, tokens, width = x.shape
        x = x.astype(jnp.float32)
        null = self.null_tokens(x, is_null)
        prototypes = self.kernel(width, self.num_routed)
        cosine = exact_matmul(unit(x, axis=-1), unit(prototypes, axis=0))
        # Below every cosine, and finite: a group of null tokens alone must not become NaN.
        cosine = jnp.where(null[..., None], -1e9, cosine)
        slots = min(tokens, max(1, slots_per_expert(tokens, self.num_routed, self.capacity)))
        weight, token = top_tokens(self.gates(cosine, axis=1), slots)
        used = ~jnp.take_along_axis(null[:, None], token, axis=-1)

        def contrast():
            taken = jax.vmap(_taken, in_axes=(0, 0, None))(token, used, tokens)
            return contrast_loss(prototypes, x, taken, self.contrast_temperature, pooled=False)

        aux = Aux(self.asked(contrast=contrast), {}, {})
        if not self.null_expert:
            return by_expert(token, weight), aux
        expert = jnp.arange(self.num_routed, dtype=jnp.int32)[:, None]
        expert = jnp.where(used, expert, self.num_experts).reshape(groups, -1)
        weight = jnp.where(used, weight, 0.0).reshape(groups, -1)
        every_token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), null.shape)
        last = jnp.where(null, self.num_experts - 1, self.num_experts)
        return Routing(
            token=jnp.concatenate([token.reshape(groups, -1).astype(jnp.int32), every_token], 1),
            expert=jnp.concatenate([expert, last.astype(jnp.int32)], 1),
            weight=jnp.concatenate([weight, null.astype(jnp.float32)], 1),
        ), aux


def _taken(token: jax.Array, used: jax.Array, num_tokens: int) -> jax.Array:
    """f32[T, E] of one group: 1 where an expert uses a slot, bool[E, C], for token i32[E, C]."""
    expert = jnp.arange(token.shape[0])[:, None]
    return jnp.zeros((num_tokens, token.shape[0])).at[token, expert].set(used.astype(jnp.float32))


def contrast_loss(
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
