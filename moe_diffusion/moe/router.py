"""What all routers share: the base class, and what a router returns besides its Routing.

    router(x[G, T, D], is_null bool[G, T], train) -> Routing, Aux

`is_null` marks tokens of unconditional samples, for routers that give them an expert of their own.
Logits and scores are always f32. A router with a memory keeps it in the collection `router_state`
and never writes it: it returns in Aux.stats what it saw, under the same names, and the training
step, once per optimizer step, asks `next_state` for the new value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Scalars = dict[str, jax.Array]

INITIALIZERS = {
    "kaiming_normal": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),  # DSMoE
    "kaiming_uniform": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # TC-DiT
    "normal_0.006": nn.initializers.normal(0.006),  # EC-DiT, DiffMoE
    "normal_0.02": nn.initializers.normal(0.02),  # ProMoE
}


class Aux(NamedTuple):
    """What a router tells besides the routing; scalars by name, unweighted.

    losses: only those asked for. metrics: for logs. stats: evidence for `next_state`, f32[E].
    """

    losses: Scalars
    metrics: Scalars
    stats: Scalars


class Router(nn.Module):
    """The base class: a gate without bias, x -> logits f32[G, T, E].

    competes: whether the routing of a token depends on the other tokens of its group.
    """

    num_experts: int
    kernel_init: str = "kaiming_normal"
    losses: tuple[str, ...] = ()

    provides: ClassVar[tuple[str, ...]] = ("router_z",)
    competes: ClassVar[bool] = True

    @property
    def experts_per_token(self) -> float:
        """How many experts a token meets, on average."""
        return self.capacity

    def kernel(self, width: int, outputs: int) -> jax.Array:
        """The weights of the gate, f32[D, outputs]."""
        init = nn.with_logical_partitioning(INITIALIZERS[self.kernel_init], ("embed", None))
        return self.param("kernel", init, (width, outputs), jnp.float32)

    def logits(self, x: jax.Array) -> jax.Array:
        return exact_matmul(x.astype(jnp.float32), self.kernel(x.shape[-1], self.num_experts))

    def asked(self, **makers) -> Scalars:
        """The losses asked for, of those given as functions without arguments."""
        return {name: make() for name, make in makers.items() if name in self.losses}

    def next_state(self, state: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
        """router_state after a step that saw `stats`; elementwise, so layers may be stacked."""
        del stats
        return dict(state)


def exact_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in full f32: the choice of an expert is discrete, and bf16 passes would flip it."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
