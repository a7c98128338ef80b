"""The routers of the papers, one small class each; see `router.py` for what they have in common."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.moe import losses
from moe_diffusion.moe.prototypes import ProMoEExpertChoice, ProMoETokenChoice
from moe_diffusion.moe.router import INITIALIZERS, Aux, Router
from moe_diffusion.moe.routing import (
    Routing,
    by_expert,
    by_token,
    expert_load,
    slots_per_expert,
    top_experts,
    top_tokens,
)
from moe_diffusion.parallel.mesh import by_group

__all__ = [
    "INITIALIZERS",
    "ROUTERS",
    "Aux",
    "DiffMoE",
    "ExpertChoice",
    "ProMoEExpertChoice",
    "ProMoETokenChoice",
    "Router",
    "TokenChoice",
]


class TokenChoice(Router):
    """Every token takes its K best experts: TC-DiT, Dense2MoE, and DeepSeek's router of DSMoE.

    scores = softmax(logits) or sigmoid(logits)
    chosen = top-k of scores + bias, within the topk_group best of n_group groups of experts
    weight = scores of the chosen [/ their sum, if normalize and K > 1] * scale

    The bias enters the choice alone (DeepSeek-V3, 2412.19437, Eq. 16). Without an auxiliary loss it
    balances the load: bias_update_rate up for an expert under the mean load, as much down
    above it. Rate 0 keeps it, as the DSMoE authors do. A group counts as much as its two best
    experts, and experts of rejected groups score 0, not -inf (so in DSMoE's code: with a negative
    enough bias one of them can still be chosen).
    """

    top_k: int = 2
    scores: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    selection_bias: bool = False
    bias_update_rate: float = 0.0
    n_group: int = 1
    topk_group: int = 1

    provides: ClassVar[tuple[str, ...]] = ("balance", "router_z")
    competes: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null, train
        logits = self.logits(x)
        scores = jax.nn.softmax(logits) if self.scores == "softmax" else jax.nn.sigmoid(logits)
        expert = top_experts(self._choice(lax.stop_gradient(scores)), self.top_k)
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if self.normalize and self.top_k > 1:
            weight /= weight.sum(-1, keepdims=True) + 1e-20
        routing = by_token(expert, weight * self.scale)

        load = expert_load(routing, self.num_experts)
        asked = self.asked(
            balance=lambda: losses.balance(scores / scores.sum(-1, keepdims=True), load),
            router_z=lambda: losses.router_z(logits),
        )
        stats = {"bias": load} if self.bias_update_rate else {}
        return routing, Aux(asked, {}, stats)

    @property
    def experts_per_token(self) -> float:
        return self.top_k

    def _choice(self, scores: jax.Array) -> jax.Array:
        """Scores f32[G, T, E] as the choice sees them: biased, and limited to the best groups."""
        if self.selection_bias:
            scores += self.variable("router_state", "bias", jnp.zeros, (self.num_experts,)).value
        if self.topk_group == self.n_group:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], self.n_group, -1)
        group_scores = by_group(lambda scores: lax.top_k(scores, 2)[0], grouped).sum(-1)
        best = top_experts(group_scores, self.topk_group)
        kept = jax.nn.one_hot(best, self.n_group, dtype=bool).any(-2)
        return jnp.where(kept[..., None], grouped, 0.0).reshape(scores.shape)

    def next_state(self, state, stats):
        """bias += rate * sign(mean load - load): 2408.15664, Algorithm 1."""
        if "bias" not in state or "bias" not in stats:
            return dict(state)
        load = stats["bias"]
        under = jnp.sign(load.mean(-1, keepdims=True) - load)
        return {"bias": state["bias"] + self.bias_update_rate * under}


class ExpertChoice(Router):
    """Every expert takes its C best tokens of the group: EC-DiT (group = sample).

    weight = softmax over experts, of the pairs taken. A token may get many experts or none.
    Source: Expert Choice (2202.09368) section 3.2; EC-DiT (2410.02098).
    """

    capacity: float = 1.0

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null, train
        logits = self.logits(x)
        slots = slots_per_expert(x.shape[1], self.num_experts, self.capacity)
        weight, token = top_tokens(jax.nn.softmax(logits), slots)
        asked = self.asked(router_z=lambda: losses.router_z(logits))
        return by_expert(token, weight), Aux(asked, {}, {})


class DiffMoE(Router):
    """Experts choose from a pool of the whole batch; a predictor sets their share at inference.

    Training: expert choice over the group (the batch), C = T / E * capacity. A small MLP on the
    detached token learns to tell which tokens each expert takes (binary cross-entropy), and its
    C-th largest probability in the batch feeds each expert's threshold, an EMA.
    Inference: k_e = the number of tokens whose predicted probability exceeds the threshold of
    expert e; the expert takes its k_e best tokens by gate score, as in the authors' code (the
    thresholds say how many, the gate says which). max_capacity bounds k_e to that multiple of C,
    so that shapes are static; what the bound drops is the metric `dropped`. 0 means no bound.
    threshold: `dynamic`, those EMAs, or one constant for all experts, as text like "0.4" (what the
    paper's interval search looks for).
    Source: DiffMoE (2503.14487) section 3, Algorithms 1 and 2.
    """

    capacity: float = 1.0
    threshold: str = "dynamic"
    threshold_decay: float = 0.95
    max_capacity: float = 4.0

    provides: ClassVar[tuple[str, ...]] = ("capacity", "router_z")

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null
        logits = self.logits(x)
        scores = jax.nn.softmax(logits)
        predicted = CapacityPredictor(self.num_experts, name="predictor")(x)
        threshold = self.variable("router_state", "threshold", jnp.zeros, (self.num_experts,)).value
        tokens = x.shape[1]
        slots = slots_per_expert(tokens, self.num_experts, self.capacity)
        if train:
            weight, token = top_tokens(scores, slots)
            quantile = top_tokens(jax.nn.sigmoid(predicted), slots)[0][..., -1]
            asked = self.asked(
                capacity=lambda: losses.capacity(predicted, _taken(token, scores)),
                router_z=lambda: losses.router_z(logits),
            )
            stats = {"threshold": lax.stop_gradient(quantile.mean(0))}
            return by_expert(token, weight), Aux(asked, {}, stats)

        if self.threshold != "dynamic":
            threshold = float(self.threshold)
        wanted = (jax.nn.sigmoid(predicted) > threshold).sum(1)  # i32[G, E]
        bound = max(1, int(slots * self.max_capacity)) if self.max_capacity else tokens
        bound = min(tokens, bound)
        weight, token = top_tokens(scores, bound)
        used = jnp.arange(bound) < wanted[..., None]
        dropped = jnp.maximum(wanted - bound, 0).sum() / jnp.maximum(wanted.sum(), 1)
        metrics = {"capacity": wanted.sum() / (x.shape[0] * tokens), "dropped": dropped}
        # Bounded, the slots are worth a static shape; unbounded, most of the T slots are empty.
        return by_expert(token, weight, used, fixed_slots=bound < tokens), Aux({}, metrics, {})

    def next_state(self, state, stats):
        """threshold = decay * threshold + (1 - decay) * quantile seen in the batch."""
        if "threshold" not in stats:
            return dict(state)
        decay = self.threshold_decay
        return {"threshold": decay * state["threshold"] + (1 - decay) * stats["threshold"]}


class CapacityPredictor(nn.Module):
    """Linear, SiLU, Linear on the detached token: x[G, T, D] -> logits f32[G, T, E]."""

    num_experts: int

    @nn.compact
    def __call__(self, x):
        x = lax.stop_gradient(x).astype(jnp.float32)
        xavier = nn.initializers.xavier_uniform()
        init = nn.with_logical_partitioning(xavier, ("embed", None))
        x = nn.silu(nn.Dense(x.shape[-1], kernel_init=init, name="dense_0")(x))
        return nn.Dense(self.num_experts, kernel_init=init, name="dense_1")(x)


def _taken(token: jax.Array, scores: jax.Array) -> jax.Array:
    """f32[G, T, E], 1 where token i32[G, E, C] says that the expert took the token."""
    groups, num_experts, _ = token.shape
    group = jnp.arange(groups)[:, None, None]
    expert = jnp.arange(num_experts)[:, None]
    return jnp.zeros_like(scores).at[group, token, expert].set(1.0)


ROUTERS = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "diffmoe": DiffMoE,
    "promoe_tc": ProMoETokenChoice,
    "promoe_ec": ProMoEExpertChoice,
}
