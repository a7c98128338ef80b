"""Expert choice: EC-DiT."""

from __future__ import annotations

import jax
from flax import linen as nn

from moe_diffusion.checks import at_most, require
from moe_diffusion.moe.router import Aux, Router, router_z
from moe_diffusion.moe.routing import Routing, by_expert, slots_per_expert, top_tokens


class ExpertChoice(Router):
    """Every expert takes its C best tokens of the group: EC-DiT (group = sample).

        weight = softmax over experts, of the pairs taken

    A token may get many experts or none.

    capacity: experts per token on average, C = int(T / E * capacity).

    Source: Expert Choice (2202.09368) section 3.2; EC-DiT (2410.02098).
    """

    capacity: float = 1.0

    positive = ("capacity",)

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        remedy = "an expert cannot take more tokens than there are, lower it"
        capacity, experts = config.capacity, "model.moe.num_experts"
        at_most("model.router.capacity", capacity, experts, num_experts, remedy)
        require(
            group_tokens is None or slots_per_expert(group_tokens, num_experts, capacity) >= 1,
            _too_few(capacity, num_experts, group_tokens, f"model.router.group = {config.group}"),
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null, train
        logits = self.logits(x)
        weight, token = self.best(jax.nn.softmax(logits))
        asked = self.asked(router_z=lambda: router_z(logits))
        return by_expert(token, weight), Aux(asked, {}, {})

    def best(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The C best tokens of every expert: f32[G, T, E] -> weight, token of [G, E, C].

        Raises a UserError where C is 0: a pool at inference may be smaller than in training.
        """
        tokens = scores.shape[1]
        slots = slots_per_expert(tokens, self.num_experts, self.capacity)
        slots = max(slots, self.is_initializing())  # init sees one sample, whatever a group is
        require(slots >= 1, _too_few(self.capacity, self.num_experts, tokens, "a pool"))
        return top_tokens(scores, slots)


def _too_few(capacity: float, num_experts: int, tokens: int, where: str) -> str:
    return (
        f"model.router.capacity = {capacity} gives each of model.moe.num_experts = {num_experts} "
        f"less than one of the {tokens} tokens in {where}: raise the capacity, use fewer experts, "
        "a smaller model.patch_size or a wider group (of samples: sampling.pool)"
    )
