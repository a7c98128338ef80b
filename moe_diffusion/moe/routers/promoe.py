"""ProMoE: tokens meet the experts whose prototypes they resemble (2510.24711, section 3).

    cosine[t, e] = cosine of token t and the prototype of expert e, a learned vector

Tokens of unconditional samples go, with weight 1, to an expert of their own: the last one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import require
from moe_diffusion.moe import routing
from moe_diffusion.moe.router import Aux, Router, exact_matmul, gates


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

    provides = ("contrast",)
    choices = {"scores": ("identity", "sigmoid", "softmax")}

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
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

    def meet(self, x: jax.Array, is_null: jax.Array | None) -> tuple[jax.Array, ...]:
        """Prototypes f32[D, E], cosines f32[G, T, E], and null bool[G, T].

        E counts the experts with a prototype. null marks the tokens for the last expert.
        """
        prototypes = self.kernel(x.shape[-1], self.num_routed)
        null = is_null if is_null is not None and self.null_expert else jnp.zeros(x.shape[:2], bool)
        return prototypes, exact_matmul(unit(x, axis=-1), unit(prototypes, axis=0)), null

    def aux(self, prototypes: jax.Array, x: jax.Array, taken: jax.Array, pooled: bool) -> Aux:
        """What the router tells besides the routing, see `contrast_loss`."""
        args = (prototypes, x, taken, self.contrast_temperature, pooled)
        return Aux(self.asked(contrast=lambda: contrast_loss(*args)), {}, {})


class ProMoETokenChoice(ProMoE):
    """Every token takes its K best experts; gates are not renormalised.

    top_k: K, experts per token.
    """

    top_k: int = 2

    share = "top_k"
    positive = ("top_k", "contrast_temperature")
    group_matters = False

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[routing.Routing, Aux]:
        del train
        x = x.astype(jnp.float32)
        prototypes, cosine, null = self.meet(x, is_null)
        expert = routing.top_experts(lax.stop_gradient(cosine), self.top_k)
        weight = jnp.take_along_axis(gates(cosine, self.scores), expert, axis=-1)
        expert = jnp.where(null[..., None], self.num_experts - 1, expert)
        weight = jnp.where(null[..., None], jnp.arange(self.top_k) == 0, weight)
        taken = jax.nn.one_hot(expert, self.num_experts).sum(-2)[..., : self.num_routed]
        return routing.by_token(expert, weight), self.aux(prototypes, x, taken, pooled=True)


class ProMoEExpertChoice(ProMoE):
    """Every expert with a prototype takes its C best tokens of the group (the sample).

    C = int(T / E * capacity), at least 1, of the E experts with a prototype. They do not choose
    among the tokens of unconditional samples; a group of nothing else leaves the slots unused. A
    softmax is over the tokens of an expert. The last expert takes all tokens of unconditional
    samples, so the list has no equal shares, and dispatch sorts it.

    capacity: experts per token on average.
    """

    capacity: float = 1.0

    positive = ("capacity", "contrast_temperature")

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[routing.Routing, Aux]:
        del train
        x, tokens = x.astype(jnp.float32), x.shape[1]
        prototypes, cosine, null = self.meet(x, is_null)
        # Below every cosine, and finite: a group of null tokens alone must not become NaN.
        cosine = jnp.where(null[..., None], -1e9, cosine)
        share = routing.slots_per_expert(tokens, self.num_routed, self.capacity)
        slots = min(tokens, max(1, share))
        weight, token = routing.top_tokens(gates(cosine, self.scores, axis=1), slots)
        chosen = routing.by_expert(token, weight, fixed_slots=not self.null_expert)
        if self.null_expert:
            chosen = self._with_null_tokens(chosen, null)
        taken = routing.taken(chosen, tokens, self.num_routed)
        return chosen, self.aux(prototypes, x, taken, pooled=False)

    def _with_null_tokens(self, chosen: routing.Routing, null: jax.Array) -> routing.Routing:
        """Frees the slots that hold null tokens, and adds those tokens for the last expert."""
        used = ~jnp.take_along_axis(null, chosen.token, axis=1)
        every = jnp.broadcast_to(jnp.arange(null.shape[1], dtype=jnp.int32), null.shape)
        last = jnp.where(null, self.num_experts - 1, self.num_experts).astype(jnp.int32)
        added = routing.Routing(every, last, null.astype(jnp.float32))
        freed = chosen.only(used, self.num_experts)
        return jax.tree.map(lambda *lists: jnp.concatenate(lists, axis=1), freed, added)


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
