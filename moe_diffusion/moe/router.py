"""What all routers share: the base class, what a router returns, and the losses of several.

    router(x[G, T, D], is_null bool[G, T], train) -> Routing, Aux

`is_null` marks tokens of unconditional samples, for routers that give them an expert of their own.
Logits and scores are always f32. A router with a memory keeps it in the collection `router_state`
and never writes it. It returns what it saw in `Aux.stats`, under the same names, and the training
step calls `next_state` for the new value once per optimizer step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from moe_diffusion.checks import check_values, require

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
      share: the field that says how many experts a token has on average.
      choices: field -> the texts that are allowed.
      positive, not_negative, fraction (at least 0 and below 1): fields that must be so.
    """

    num_experts: int
    kernel_init: str = "kaiming_normal"
    losses: tuple[str, ...] = ()

    provides: ClassVar[tuple[str, ...]] = ("router_z",)
    group_matters: ClassVar[bool] = True
    share: ClassVar[str] = "capacity"
    choices: ClassVar[Mapping[str, Collection[str]]] = {}
    positive: ClassVar[tuple[str, ...]] = ()
    not_negative: ClassVar[tuple[str, ...]] = ()
    fraction: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """The keys of a config section `model.router` for this router, with their defaults."""
        fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in _NOT_CONFIGURED]
        for field in fields:
            require(
                isinstance(field.default, bool | int | float | str | tuple),
                f"field {field.name!r} of router {cls.__name__} cannot stand in a config: give it "
                "a default that is a bool, a number, a text or a tuple",
            )
        return {field.name: field.default for field in fields}

    @classmethod
    def check(cls, config: Any, num_experts: int, group_tokens: int | None) -> None:
        """Checks the values of a config one by one; a subclass adds the combinations.

        Args:
          config: the section `model.router`, with a value for every field.
          group_tokens: tokens of a routing group; None where only the number of devices will tell.

        Raises:
          UserError: at the first value or combination that is not possible.
        """
        del num_experts, group_tokens
        choices = {"kernel_init": INITIALIZERS, **cls.choices}
        numbers = {name: getattr(cls, name) for name in ("positive", "not_negative", "fraction")}
        check_values(config, "model.router.", choices=choices, **numbers)

    @property
    def experts_per_token(self) -> float:
        """How many experts a token meets, on average."""
        return getattr(self, self.share)

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


class MovingThreshold(Router):
    """What DiffMoE and Expert Race share: a threshold, learned in training and used at inference.

    router_state/threshold is a moving average of what the router returns as a stat of this name.

    threshold_decay: of the average, per optimizer step.
    max_capacity: at inference at most this multiple of the average load is served, so that shapes
      are static. The metric `dropped` is the share that the bound refuses. 0 = no bound.

    Class variables:
      competitors: what the bound counts: tokens | pairs.
    """

    threshold_decay: float = 0.95
    max_capacity: float = 4.0

    competitors: ClassVar[str] = "tokens"
    not_negative = ("max_capacity",)
    fraction = ("threshold_decay",)

    @classmethod
    def check(cls, config, num_experts, group_tokens):
        super().check(config, num_experts, group_tokens)
        require(
            config.max_capacity == 0 or config.max_capacity >= 1,
            f"model.router.max_capacity = {config.max_capacity} would drop {cls.competitors} even "
            "at the average load: use at least 1, or 0 for no bound",
        )

    def bound(self, average: int, most: int) -> int:
        """The most that is served at inference, where `average` are on average and `most` exist."""
        return min(most, max(1, int(average * self.max_capacity)) if self.max_capacity else most)

    def next_state(self, state, stats):
        """threshold = decay * threshold + (1 - decay) * what the batch showed."""
        if "threshold" not in stats:
            return dict(state)
        decay = self.threshold_decay
        return {"threshold": decay * state["threshold"] + (1 - decay) * stats["threshold"]}


def exact_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in full f32: the choice of an expert is discrete, and bf16 passes would flip it."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def gates(logits: jax.Array, kind: str, axis: int = -1) -> jax.Array:
    """Logits or cosines f32[G, T, E] as gates: identity | sigmoid | softmax, over `axis`."""
    if kind == "identity":
        return logits
    return jax.nn.sigmoid(logits) if kind == "sigmoid" else jax.nn.softmax(logits, axis)


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
