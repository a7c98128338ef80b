"""Expert Race (2503.16057): all pairs of a token and an expert compete for the same places."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import check_values, require
from moe_diffusion.moe.router import Aux, Router, router_z
from moe_diffusion.moe.routing import Routing
from moe_diffusion.parallel.mesh import by_group


class ExpertRace(Router):
    """The K x T best of the T x E pairs (token, expert) of a group are taken.

        gate[t, e] = logit, sigmoid(logit), or softmax of the logits of token t

    A token may get any number of experts and an expert any number of tokens, so that both hard
    samples and hard tokens get more. The pairs should race over the whole batch (group = batch),
    where times and images differ.

    Training: exactly the int(K T) pairs with the largest gates are taken. The smallest gate among
    them feeds a threshold, a moving average (router_state, one number for a layer).
    Inference: a pair is taken if its gate exceeds the threshold, whatever else is in the batch.
    Shapes are static: the best int(K T max_capacity) pairs of a group are candidates, and slots of
    pairs below the threshold stay unused. The metric `dropped` is the share of pairs above the
    threshold that are no candidates.

    capacity: K, experts per token on average.
    scores: how a logit becomes a gate: identity (the paper's choice) | sigmoid | softmax.
    threshold_decay: of the moving average, per optimizer step.
    max_capacity: bounds the pairs at inference to this multiple of K T; 0 = no bound.

    Source: Expert Race section 4 (routing, gates, threshold) and section 5 (loss `similarity`).
    """

    capacity: float = 1.0
    scores: str = "identity"
    threshold_decay: float = 0.95
    max_capacity: float = 4.0

    provides: ClassVar[tuple[str, ...]] = ("similarity", "router_z")

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        check_values(
            config,
            "model.router.",
            choices={"scores": ("identity", "sigmoid", "softmax")},
            positive=("capacity",),
            not_negative=("max_capacity",),
            fraction=("threshold_decay",),
        )
        require(
            config.capacity <= num_experts,
            f"model.router.capacity = {config.capacity} exceeds model.moe.num_experts = "
            f"{num_experts}: a token cannot meet more experts than there are, lower it",
        )
        require(
            group_tokens is None or int(config.capacity * group_tokens) >= 1,
            f"model.router.capacity = {config.capacity} leaves no pair to the {group_tokens} "
            f"tokens in model.router.group = {config.group}: raise the capacity or widen the group",
        )
        require(
            config.max_capacity == 0 or config.max_capacity >= 1,
            f"model.router.max_capacity = {config.max_capacity} would drop pairs even at the "
            "average load: use at least 1, or 0 for no bound",
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null
        groups, tokens, _ = x.shape
        logits = self.logits(x)
        gates = {"identity": lambda a: a, "sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
        gates = gates[self.scores](logits).reshape(groups, -1)  # f32[G, T E]
        threshold = self.variable("router_state", "threshold", jnp.zeros, ()).value
        winners = int(self.capacity * tokens)
        if train:
            weight, pair = _best(gates, winners)
            asked = self.asked(
                similarity=lambda: similarity(logits, _taken(pair, logits)),
                router_z=lambda: router_z(logits),
            )
            stats = {"threshold": lax.stop_gradient(weight[:, -1].mean())}
            return self._routing(pair, weight), Aux(asked, {}, stats)

        bound = max(1, int(winners * self.max_capacity)) if self.max_capacity else gates.shape[1]
        weight, pair = _best(gates, min(bound, gates.shape[1]))
        wanted, served = (gates > threshold).sum(), (weight > threshold).sum()
        metrics = {
            "experts_per_token": wanted / (groups * tokens),
            "dropped": (wanted - served) / jnp.maximum(wanted, 1),
        }
        return self._routing(pair, weight, weight > threshold), Aux({}, metrics, {})

    def _routing(
        self, pair: jax.Array, weight: jax.Array, used: jax.Array | None = None
    ) -> Routing:
        """The record of pairs i32[G, N], numbered token by token; `used` bool[G, N], else all."""
        expert = (pair % self.num_experts).astype(jnp.int32)
        if used is not None:
            expert = jnp.where(used, expert, self.num_experts)
            weight = jnp.where(used, weight, 0.0)
        return Routing((pair // self.num_experts).astype(jnp.int32), expert, weight)

    def next_state(self, state, stats):
        """threshold = decay * threshold + (1 - decay) * smallest gate taken in the batch."""
        if "threshold" not in stats:
            return dict(state)
        decay = self.threshold_decay
        return {"threshold": decay * state["threshold"] + (1 - decay) * stats["threshold"]}


def similarity(logits: jax.Array, taken: jax.Array) -> jax.Array:
    """Router similarity loss: 1 when all experts and all pairs of experts are alike, else more.

        P = softmax over experts    P' = P^T P    M' = M^T M    (E x E)
        W[i, i] = E M'[i, i] / sum_k M'[k, k]
        W[i, j] = (E^2 - E) M'[i, j] / sum_{k != l} M'[k, l]        for i != j
        loss = 1 / T * sum_ij W[i, j] P'[i, j]

    The diagonal balances the load of single experts, the rest that of pairs that meet in a token.
    No gradient flows through W.

    Args:
      logits: f32[G, T, E]; the sums run over the tokens of all groups.
      taken: f32[G, T, E], M: 1 where the expert took the token.

    Source: Expert Race (2503.16057), Eq. 9-11.
    """
    num_experts = logits.shape[-1]
    scores = jax.nn.softmax(logits).reshape(-1, num_experts)
    taken = taken.reshape(-1, num_experts)
    together = jnp.matmul(taken.T, taken, precision=lax.Precision.HIGHEST)
    alike = jnp.matmul(scores.T, scores, precision=lax.Precision.HIGHEST)
    own = jnp.eye(num_experts, dtype=bool)
    alone, pairs = jnp.where(own, together, 0.0), jnp.where(own, 0.0, together)
    # No token may have met two experts: the second sum is then 0, and so is its term.
    weight = num_experts * alone / jnp.maximum(alone.sum(), 1)
    weight += (num_experts**2 - num_experts) * pairs / jnp.maximum(pairs.sum(), 1)
    return (lax.stop_gradient(weight) * alike).sum() / len(scores)


def _best(gates: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Value and index of the `count` largest of each group, descending: f32[G, T E] -> [G, N]."""
    return by_group(lambda gates: lax.top_k(gates, count), gates)


def _taken(pair: jax.Array, logits: jax.Array) -> jax.Array:
    """f32[G, T, E]: 1 for the pairs i32[G, N]."""
    groups = jnp.arange(len(pair))[:, None]
    flat = jnp.zeros_like(logits).reshape(len(pair), -1)
    return flat.at[groups, pair].set(1.0).reshape(logits.shape)
