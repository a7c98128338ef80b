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
            f"model.router.capacity = {capacity} gives each of {experts} = {num_experts} less than "
            f"one of the {group_tokens} tokens in model.router.group = {config.group}: raise the "
            "capacity, use fewer experts, a smaller model.patch_size or a wider group",
        )

    @nn.compact
    def __call__(self, x, is_null=None, train=False) -> tuple[Routing, Aux]:
        del is_null, train
        logits = self.logits(x)
        slots = slots_per_expert(x.shape[1], self.num_experts, self.capacity)
        weight, token = top_tokens(jax.nn.softmax(logits), slots)
        asked = self.asked(router_z=lambda: router_z(logits))
        return by_expert(token, weight), Aux(asked, {}, {})
