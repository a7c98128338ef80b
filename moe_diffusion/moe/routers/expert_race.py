"""Expert Race (2503.16057): all pairs of a token and an expert compete for the same places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import at_most, require
from moe_diffusion.moe.router import Aux, MovingThreshold, exact_matmul, gates, router_z
from moe_diffusion.moe.routing import Routing, taken
from moe_diffusion.parallel.mesh import by_group


class ExpertRace(MovingThreshold):
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

    Source: Expert Race (2503.16057) section 4 (routing, gates, threshold) and section 5 (loss
    `similarity`).
    """

    capacity: float = 1.0
    scores: str = "identity"

    provides = ("similarity", "router_z")
    competitors = "pairs"
    choices = {"scores": ("identity", "sigmoid", "softmax")}
    positive = ("capacity",)

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        remedy = "a token cannot meet more experts than there are, lower it"
        capacity, experts = config.capacity, "model.moe.num_experts"
        at_most("model.router.capacity", capacity, experts, num_experts, remedy)
        require(
            group_tokens is None or int(capacity * group_tokens) >= 1,
            f"model.router.capacity = {capacity} leaves no pair to the {group_tokens} tokens in "
            f"model.router.group = {config.group}: raise the capacity or widen the group",
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null
        groups, tokens, _ = x.shape
        logits = self.logits(x)
        scores = gates(logits, self.scores).reshape(groups, -1)  # f32[G, T E], token by token
        threshold = self.variable("router_state", "threshold", jnp.zeros, ()).value
        winners, pairs = int(self.capacity * tokens), scores.shape[1]
        served = winners if train else self.bound(winners, pairs)
        weight, pair = by_group(lambda scores: lax.top_k(scores, served), scores)
        expert = (pair % self.num_experts).astype(jnp.int32)
        routing = Routing((pair // self.num_experts).astype(jnp.int32), expert, weight)
        if train:
            won = taken(routing, tokens, self.num_experts)
            asked = self.asked(
                similarity=lambda: similarity(logits, won), router_z=lambda: router_z(logits)
            )
            return routing, Aux(asked, {}, {"threshold": lax.stop_gradient(weight[:, -1].mean())})

        used, wanted = weight > threshold, (scores > threshold).sum()
        dropped = (wanted - used.sum()) / jnp.maximum(wanted, 1)
        metrics = {"experts_per_token": wanted / (groups * tokens), "dropped": dropped}
        return routing.only(used, self.num_experts), Aux({}, metrics, {})


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

    Source: Expert Race (2503.16057) section 5.
    """
    num_experts = logits.shape[-1]
    scores = jax.nn.softmax(logits).reshape(-1, num_experts)
    taken = taken.reshape(-1, num_experts)
    together, alike = exact_matmul(taken.T, taken), exact_matmul(scores.T, scores)
    own = jnp.eye(num_experts, dtype=bool)
    alone, pairs = jnp.where(own, together, 0.0), jnp.where(own, 0.0, together)
    # No token may have met two experts: the second sum is then 0, and so is its term.
    weight = num_experts * alone / jnp.maximum(alone.sum(), 1)
    weight += (num_experts**2 - num_experts) * pairs / jnp.maximum(pairs.sum(), 1)
    return (lax.stop_gradient(weight) * alike).sum() / len(scores)
