"""Token choice: TC-DiT, Dense2MoE, and DeepSeek's router of DSMoE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import at_most, divides, require
from moe_diffusion.moe.router import Aux, Router, balance, gates, router_z
from moe_diffusion.moe.routing import Routing, by_token, expert_load, top_experts
from moe_diffusion.parallel.mesh import by_group


class TokenChoice(Router):
    """Every token takes its K best experts.

        scores = softmax(logits) or sigmoid(logits)
        chosen = top-k of scores + bias, within the topk_group best of n_group groups of experts
        weight = scores of the chosen [/ their sum, if normalize and K > 1] * scale

    top_k: K, experts per token; 0 = none, the shared expert alone.
    scores: softmax | sigmoid.
    normalize: the gates of a token sum to 1, if top_k > 1.
    normalize_one: they do if top_k = 1, too (2510.09094, Eq. 3). Such a gate is 1 and teaches the
      router nothing; it is for models that were trained with more experts.
    scale: multiplies the gates.
    selection_bias: a bias is added to the scores for the choice only, never to the gates
      (DeepSeek-V3, 2412.19437, Eq. 16).
    bias_update_rate: step of the bias towards equal load, per optimizer step: up for an expert
      under the mean load, down for one above it. The load is then balanced without an auxiliary
      loss. 0 keeps the bias as it is, as the DSMoE authors do.
    n_group: groups into which the experts are divided. A group counts as much as its two best
      experts.
    topk_group: groups that a token may choose from. Experts of rejected groups score 0, not -inf
      (so in DSMoE's code: with a negative enough bias one of them can still be chosen).
    balance_gates: the loss `balance` has the mean gates of the experts, as Dense2MoE writes it
      (2510.09094, section 3.2), and not the mean scores, as GShard does.
    """

    top_k: int = 2
    scores: str = "softmax"
    normalize: bool = False
    normalize_one: bool = False
    scale: float = 1.0
    selection_bias: bool = False
    bias_update_rate: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    balance_gates: bool = False

    provides = ("balance", "router_z")
    group_matters = False
    share = "top_k"
    choices = {"scores": ("softmax", "sigmoid")}
    positive = ("scale", "n_group", "topk_group")
    not_negative = ("top_k", "bias_update_rate")

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        groups, rate, experts = config.n_group, config.bias_update_rate, "model.moe.num_experts"
        at_most("model.router.top_k", config.top_k, experts, num_experts)
        divides("model.router.n_group", groups, experts, num_experts)
        at_most("model.router.topk_group", config.topk_group, "model.router.n_group", groups)
        require(
            groups == 1 or num_experts // groups >= 2,
            f"model.router.n_group = {groups} leaves one expert to a group, but a group is rated "
            "by its two best: use fewer groups",
        )
        require(
            rate == 0 or config.selection_bias,
            f"model.router.bias_update_rate = {rate} has no bias to move: set "
            "model.router.selection_bias=true, or the rate to 0",
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null, train
        logits = self.logits(x)
        scores = gates(logits, self.scores)
        expert = top_experts(self._choice(lax.stop_gradient(scores)), self.top_k)
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if self.normalize and self.top_k > 1 - self.normalize_one:
            weight /= weight.sum(-1, keepdims=True) + 1e-20  # Eq. 3 of Dense2MoE
        routing = by_token(expert, weight * self.scale)

        load = expert_load(routing, self.num_experts)
        shares = scores
        if self.balance_gates:
            chosen = jax.nn.one_hot(expert, self.num_experts)
            shares = jnp.einsum("gtk,gtke->gte", weight, chosen)
        asked = self.asked(
            balance=lambda: balance(shares / shares.sum(-1, keepdims=True), load),
            router_z=lambda: router_z(logits),
        )
        return routing, Aux(asked, {}, {"bias": load} if self.bias_update_rate else {})

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
