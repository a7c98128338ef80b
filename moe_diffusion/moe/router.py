"""What all routers share: the base class, what a router returns, and the losses of several.

    router(x[G, T, D], is_null bool[G, T], train) -> Routing, Aux

`is_null` marks tokens of unconditional samples, for routers that give them an expert of their own.
Logits and scores are always f32. A router with a memory keeps it in the collection `router_state`
and never writes it. It returns what it saw in `Aux.stats`, under the same names, and the training
step calls `next_state` for the new value once per optimizer step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import check_values
from moe_diffusion.errors import UserError

Scalars = dict[str, jax.Array]

INITIALIZERS = {
    "kaiming_normal": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),  # DSMoE
    "kaiming_uniform": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # TC-DiT
    "normal_0.006": nn.initializers.normal(0.006),  # EC-DiT, DiffMoE
    "normal_0.02": nn.initializers.normal(0.02),  # ProMoE
}

# Fields that the model fills in and a config does not have.
_NOT_CONFIGURED = ("num_experts", "losses", "parent", "name")


class Aux(NamedTuple):
    """What a router tells besides the routing; scalars by name, unweighted.

    losses: only those asked for. metrics: for logs. stats: evidence for `next_state`, f32[E] or
    f32[].
    """

    losses: Scalars
    metrics: Scalars
    stats: Scalars


class Router(nn.Module):
    """The base class: a gate without bias, x -> logits f32[G, T, E].

    A router is a subclass in one file. Its fields are the keys that `model.router` has in a config,
    and their defaults are the defaults there.

    kernel_init: initial weights of the gate, one of INITIALIZERS.

    Class variables:
      provides: names of the losses that it can return.
      group_matters: whether the routing of a token depends on the other tokens of its group.
    """

    num_experts: int
    kernel_init: str = "kaiming_normal"
    losses: tuple[str, ...] = ()

    provides: ClassVar[tuple[str, ...]] = ("router_z",)
    group_matters: ClassVar[bool] = True

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """The keys of a config section `model.router` for this router, with their defaults."""
        fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in _NOT_CONFIGURED]
        for field in fields:
            if not isinstance(field.default, bool | int | float | str | tuple):
                raise UserError(
                    f"field {field.name!r} of router {cls.__name__} cannot stand in a config: give "
                    "it a default that is a bool, a number, a text or a tuple"
                )
        return {field.name: field.default for field in fields}

    @classmethod
    def check(cls, config: Any, num_experts: int, group_tokens: int | None) -> None:
        """Checks the values of a config; a subclass extends it for fields of its own.

        Args:
          config: the section `model.router`, with a value for every field.
          group_tokens: tokens of a routing group; None where only the number of devices will tell.

        Raises:
          UserError: at the first value or combination that is not possible.
        """
        del num_experts, group_tokens
        check_values(config, "model.router.", choices={"kernel_init": INITIALIZERS})

    @property
    def experts_per_token(self) -> float:
        """How many experts a token meets, on average."""
        return self.capacity

    def kernel(self, width: int, outputs: int) -> jax.Array:
        """The weights of the gate, f32[D, outputs]."""
        init = nn.with_logical_partitioning(INITIALIZERS[self.kernel_init], ("embed", None))
        return self.param("kernel", init, (width, outputs), jnp.float32)

    def logits(self, x: jax.Array) -> jax.Array:
        """The output of the gate, x[G, T, D] -> f32[G, T, E]."""
        return exact_matmul(x.astype(jnp.float32), self.kernel(x.shape[-1], self.num_experts))

    def asked(self, **makers) -> Scalars:
        """Evaluates only the losses named in `self.losses`; makers are functions by name."""
        return {name: make() for name, make in makers.items() if name in self.losses}

    def next_state(self, state: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
        """router_state after a step that saw `stats`; elementwise, so layers may be stacked."""
        del stats
        return dict(state)


def exact_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in full f32: the choice of an expert is discrete, and bf16 passes would flip it."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def balance(scores: jax.Array, load: jax.Array) -> jax.Array:
    """Load balance, E * sum_e f_e P_e: 1 when balanced, E when one expert has everything.

    Args:
      scores: f32[G, T, E], summing to 1 over the experts. P_e is their mean over all tokens.
      load: f32[E], assignments of each expert. f_e is its share of them, without a gradient.

    Source: GShard (2006.16668) section 2.2, Switch (2101.03961) Eq. 4-6; so in TC-DiT's code.
    """
    share = load / load.sum()
    return scores.shape[-1] * jnp.sum(share * scores.mean((0, 1)))


def router_z(logits: jax.Array) -> jax.Array:
    """Mean squared logsumexp of the router logits f32[G, T, E]. ST-MoE (2202.08906) Eq. 5."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
