"""The Routing record: which tokens go to which experts, with what weight; and the Work it makes.

Every router returns a Routing and the dispatch reads nothing else. Shape letters of this package:

    B batch           S tokens of a sample    G routing groups   T tokens of a group
    D model width     H expert width          E experts          K experts per token
    C slots per expert                        N assignments of a group
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.parallel.mesh import batch_axes, by_group, num_batch_shards


@flax.struct.dataclass
class Routing:
    """G groups of T tokens, N assignments each.

    token:  i32[G, N]  index of the token inside its group
    expert: i32[G, N]  expert id; num_experts marks an unused slot
    weight: f32[G, N]  gate value that multiplies the expert's output; 0 in an unused slot
    slots_per_expert: C when the list is expert-major with C slots each, else None
    slots_per_token:  K when the list is token-major with K used slots each, else None
    """

    token: jax.Array
    expert: jax.Array
    weight: jax.Array
    slots_per_expert: int | None = flax.struct.field(pytree_node=False, default=None)
    slots_per_token: int | None = flax.struct.field(pytree_node=False, default=None)

    def only(self, used: jax.Array, num_experts: int) -> Routing:
        """The same list with the slots that `used` bool[G, N] does not mark left unused."""
        expert = jnp.where(used, self.expert, num_experts)
        weight = jnp.where(used, self.weight, 0.0)
        return self.replace(expert=expert, weight=weight, slots_per_token=None)


def by_token(expert: jax.Array, weight: jax.Array) -> Routing:
    """Routing of tokens that chose: expert i32[G, T, K], weight f32[G, T, K]."""
    token = jnp.broadcast_to(jnp.arange(expert.shape[1])[:, None], expert.shape)
    return _listed(token, expert, weight, slots_per_token=expert.shape[2])


def by_expert(
    token: jax.Array, weight: jax.Array, used: jax.Array | None = None, fixed_slots: bool = True
) -> Routing:
    """Routing of experts that chose: token i32[G, E, C], weight f32[G, E, C].

    used bool[G, E, C] marks the slots that count (all by default). fixed_slots says that C slots
    are worth computing whether used or not; without it the list promises nothing.
    """
    groups, num_experts, slots = token.shape
    expert = jnp.broadcast_to(jnp.arange(num_experts)[:, None], token.shape)
    routing = _listed(token, expert, weight, slots_per_expert=slots if fixed_slots else None)
    return routing if used is None else routing.only(used.reshape(groups, -1), num_experts)


def _listed(token: jax.Array, expert: jax.Array, weight: jax.Array, **slots) -> Routing:
    """The record of three arrays [G, ...] of one shape."""
    token, expert, weight = (a.reshape(len(a), -1) for a in (token, expert, weight))
    integers = token.astype(jnp.int32), expert.astype(jnp.int32)
    return Routing(*integers, weight.astype(jnp.float32), **slots)


def taken(routing: Routing, tokens: int, num_experts: int) -> jax.Array:
    """f32[G, T, E]: 1 where a token goes to an expert; experts from num_experts on are left out."""
    groups = jnp.arange(len(routing.token))[:, None]
    mask = jnp.zeros((len(routing.token), tokens, num_experts))
    return mask.at[groups, routing.token, routing.expert].set(1.0, mode="drop")


def top_experts(scores: jax.Array, top_k: int) -> jax.Array:
    """The K best experts of every token: f32[G, T, E] -> i32[G, T, K]."""
    return by_group(lambda scores: lax.top_k(scores, top_k)[1], scores)


def top_tokens(scores: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """The C best tokens of every expert: f32[G, T, E] -> weight, token of [G, E, C]."""
    groups, tokens, _ = scores.shape
    shards = num_batch_shards()
    if groups == 1 and shards > 1 and tokens % shards == 0:
        return _top_tokens_of_all(scores, slots, tokens // shards)
    return by_group(lambda scores: lax.top_k(scores.swapaxes(1, 2), slots), scores)


def _top_tokens_of_all(scores: jax.Array, slots: int, part: int) -> tuple[jax.Array, jax.Array]:
    """One group over all devices: the best of each device's best, of `part` tokens each.

    Equal scores are in the order of the tokens, as in one top-k over all.
    """
    axes = batch_axes()

    def best(scores):
        weight, token = lax.top_k(scores.swapaxes(1, 2), min(slots, part))
        token += lax.axis_index(axes) * part
        weight, token = (lax.all_gather(a, axes, axis=2, tiled=True) for a in (weight, token))
        weight, place = lax.top_k(weight, slots)
        return weight, jnp.take_along_axis(token, place, axis=2)

    split, whole = PartitionSpec(None, axes), PartitionSpec()
    return jax.shard_map(best, in_specs=split, out_specs=whole, check_vma=False)(scores)


def slots_per_expert(tokens: int, num_experts: int, capacity: float) -> int:
    """C = int(T / E * capacity): an expert's share of a group, `capacity` experts a token."""
    return int(tokens / num_experts * capacity)


def expert_load(routing: Routing, num_experts: int) -> jax.Array:
    """Assignments of each expert over all groups, f32[E]; unused slots do not count."""
    return jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.float32).sum((0, 1))


def flatten(routing: Routing, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """token, expert, weight [G N] of all groups as one; token ids count through all groups."""
    offset = jnp.arange(routing.token.shape[0], dtype=jnp.int32)[:, None] * tokens
    return tuple(a.reshape(-1) for a in (routing.token + offset, routing.expert, routing.weight))


def expert_slots(
    routing: Routing, tokens: int, num_experts: int, factor: float
) -> tuple[jax.Array, jax.Array]:
    """All groups as slots of the experts: token i32[E, C], weight f32[E, C].

    Token ids are those of `flatten`, past the last in an empty slot. A routing without fixed slots
    fills them with `factor`: C = slots_of(G N, E, factor), and an expert keeps the first C of its
    assignments in the order of the list.
    """
    token, expert, weight = flatten(routing, tokens)
    if not routing.slots_per_expert:
        return _first_come(token, expert, weight, num_experts, factor)
    groups = routing.token.shape[0]
    token = jnp.where(expert < num_experts, token, groups * tokens)
    slots = (groups, num_experts, routing.slots_per_expert)
    return tuple(a.reshape(slots).swapaxes(0, 1).reshape(num_experts, -1) for a in (token, weight))


def slots_of(num: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor * N / E), the slots of an expert when `slots` serves N assignments."""
    return min(num, -(-int(factor * num) // num_experts))


def _first_come(token, expert, weight, num_experts, factor):
    """`expert_slots` of lists [N] that have no slots of their own; weight 0 in an empty slot."""
    order = jnp.argsort(expert, stable=True)
    bounds = jnp.searchsorted(expert[order], jnp.arange(num_experts + 1))
    num, past = expert.size, jnp.iinfo(jnp.int32).max
    place = bounds[:-1, None] + jnp.arange(slots_of(num, num_experts, factor))
    assignment = jnp.where(place < bounds[1:, None], order[jnp.minimum(place, num - 1)], num)
    token = jnp.take(token, assignment, mode="fill", fill_value=past)
    return token, jnp.take(weight, assignment, mode="fill", fill_value=0.0)


@flax.struct.dataclass
class Work:
    """What a dispatch computes, on one device or on all.

    x [G, T, D]; routing of the G groups; params of the E experts in the dtype of x; kind: one of
    mlp.KINDS; capacity_factor: see `expert_slots`; dropout: of the experts' hidden units.
    """

    x: jax.Array
    routing: Routing
    params: Params
    kind: str = flax.struct.field(pytree_node=False)
    capacity_factor: float = flax.struct.field(pytree_node=False)
    dropout: Dropout | None

    @property
    def tokens(self) -> jax.Array:
        """Those of all groups, one group after the other: [G T, D]."""
        return self.x.reshape(-1, self.x.shape[-1])

    @property
    def num_experts(self) -> int:
        return self.params["up"].shape[0]

    def by_assignment(self, kernel: Callable[..., jax.Array], **options) -> jax.Array:
        """kernel(x[T, D], token i32[N], expert i32[N], weight f32[N], params, kind, **options).

        T and N count through all groups. Returns [G, T, D].
        """
        assignments = flatten(self.routing, self.x.shape[1])
        y = kernel(self.tokens, *assignments, self.params, self.kind, **options)
        return y.reshape(self.x.shape)

    def by_slot(self, kernel: Callable[..., jax.Array], **options) -> jax.Array:
        """kernel(x[T, D], token i32[E, C], weight f32[E, C], params, kind, **options).

        T and C count through all groups. Returns [G, T, D].
        """
        slots = self.slots(self.num_experts)
        y = kernel(self.tokens, *slots, self.params, self.kind, **options)
        return y.reshape(self.x.shape)

    def slots(self, num_experts: int) -> tuple[jax.Array, jax.Array]:
        """The slots of `num_experts` experts, see `expert_slots`."""
        return expert_slots(self.routing, self.x.shape[1], num_experts, self.capacity_factor)
