"""DiffMoE: expert choice from a pool of the whole batch, with a learned share at inference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import require
from moe_diffusion.moe.router import Aux, MovingThreshold, router_z
from moe_diffusion.moe.routers.expert_choice import ExpertChoice
from moe_diffusion.moe.routing import Routing, by_expert, slots_per_expert, taken, top_tokens


class DiffMoE(ExpertChoice, MovingThreshold):
    """Experts choose from a pool of the whole batch; a predictor sets their share at inference.

    Training: expert choice over the group (the batch), C = T / E * capacity. A small MLP on the
    detached token learns to tell which tokens each expert takes (binary cross-entropy). Its C-th
    largest probability in the batch feeds each expert's threshold, a moving average.
    Inference: k_e = the number of tokens whose predicted probability exceeds the threshold of
    expert e. The expert takes its k_e best tokens by gate score, as in the authors' code: the
    thresholds say how many, the gate says which. With group = sample the pool is an image (Table 8,
    local dynamic routing).

    capacity: experts per token on average.
    threshold: "dynamic", those averages; one constant for all experts as text like "0.4" (what the
      paper's interval search looks for); or "off", no predictor: at inference every expert takes
      its C best tokens of the pool, as in training (Table 4 and Figure 6, fixed top-k; with
      `capacity` 0.95, C = 0.95).
    threshold_decay: of the averages, per optimizer step.
    max_capacity: at inference an expert takes at most this multiple of C tokens; 0 = no bound.

    Source: DiffMoE (2503.14487) section 3, Algorithms 1 and 2.
    """

    threshold: str = "dynamic"

    provides = ("capacity_predictor", "router_z")

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        require(
            config.threshold in ("dynamic", "off") or _is_fraction(config.threshold),
            f"model.router.threshold = {config.threshold!r} must be dynamic, off or a number at "
            "least 0 and below 1, like 0.4",
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null
        logits = self.logits(x)
        scores = jax.nn.softmax(logits)
        predicted = CapacityPredictor(self.num_experts, name="predictor")(x)
        threshold = self.variable("router_state", "threshold", jnp.zeros, (self.num_experts,)).value
        tokens = x.shape[1]
        if train or self.threshold == "off":
            weight, token = self.best(scores)
            routing = by_expert(token, weight)
            chosen = taken(routing, tokens, self.num_experts)
            quantile = self.best(jax.nn.sigmoid(predicted))[0][..., -1]
            asked = self.asked(
                capacity_predictor=lambda: predictor_loss(predicted, chosen),
                router_z=lambda: router_z(logits),
            )
            return routing, Aux(asked, {}, {"threshold": lax.stop_gradient(quantile.mean(0))})

        if self.threshold != "dynamic":
            threshold = float(self.threshold)
        wanted = (jax.nn.sigmoid(predicted) > threshold).sum(1)  # i32[G, E]
        bound = self.bound(slots_per_expert(tokens, self.num_experts, self.capacity), tokens)
        weight, token = top_tokens(scores, bound)
        used = jnp.arange(bound) < wanted[..., None]
        dropped = jnp.maximum(wanted - bound, 0).sum() / jnp.maximum(wanted.sum(), 1)
        metrics = {"experts_per_token": wanted.sum() / (x.shape[0] * tokens), "dropped": dropped}
        # Bounded, the slots are worth a static shape; unbounded, most of the T slots are empty.
        return by_expert(token, weight, used, fixed_slots=bound < tokens), Aux({}, metrics, {})


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


def predictor_loss(logits: jax.Array, taken: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of the predictor's logits f32[G, T, E] against the experts' choice.

    taken[g, t, e] is 1 where expert e took token t. DiffMoE (2503.14487), capacity predictor loss.
    """
    return optax.sigmoid_binary_cross_entropy(logits, taken).mean()


def _is_fraction(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
