"""The Routing record: which tokens go to which experts, with what weight.

Every router returns one and the dispatch reads nothing else. Shape letters of this package:

    B batch           S tokens of a sample    G routing groups   T tokens of a group
    D model width     H expert width          E experts          K experts per token
    C slots per expert                        N assignments of a group
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

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


def by_token(expert: jax.Array, weight: jax.Array) -> Routing:
    """Routing of tokens that chose: expert i32[G, T, K], weight f32[G, T, K]."""
    groups, tokens, top_k = expert.shape
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], expert.shape)
    flat = (groups, tokens * top_k)
    return Routing(
        token=token.reshape(flat),
        expert=expert.reshape(flat).astype(jnp.int32),
        weight=weight.reshape(flat).astype(jnp.float32),
        slots_per_token=top_k,
    )


def by_expert(
    token: jax.Array, weight: jax.Array, used: jax.Array | None = None, fixed_slots: bool = True
) -> Routing:
    """Routing of experts that chose: token i32[G, E, C], weight f32[G, E, C].

    used bool[G, E, C] marks the slots that count (all by default). fixed_slots says that C slots
    are worth computing whether used or not; without it the list promises nothing.
    """
    groups, num_experts, slots = token.shape
    expert = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[:, None], token.shape)
    if used is not None:
        expert = jnp.where(used, expert, num_experts)
        weight = jnp.where(used, weight, 0.0)
    flat = (groups, num_experts * slots)
    return Routing(
        token=token.reshape(flat).astype(jnp.int32),
        expert=expert.reshape(flat),
        weight=weight.reshape(flat).astype(jnp.float32),
        slots_per_expert=slots if fixed_slots else None,
    )


def top_experts(scores: jax.Array, top_k: int) -> jax.Array:
    """The K best experts of every token: f32[G, T, E] -> i32[G, T, K]."""
    return by_group(lambda scores: lax.top_k(scores, top_k)[1], scores)


def top_tokens(scores: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """The C best tokens of every expert: f32[G, T, E] -> weight, token of [G, E, C]."""

    def best(scores):
        return lax.top_k(scores.swapaxes(1, 2), slots)

    groups, tokens, _ = scores.shape
    shards = num_batch_shards()
    if groups > 1 or shards == 1 or tokens % shards:
        return by_group(best, scores)
    return _top_tokens_of_all(scores, slots, tokens // shards)


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

    everywhere = PartitionSpec()
    return jax.shard_map(
        best,
        in_specs=PartitionSpec(None, axes),
        out_specs=(everywhere, everywhere),
        check_vma=False,
    )(scores)


def slots_per_expert(tokens: int, num_experts: int, capacity: float) -> int:
    """C = int(T / E * capacity): an expert's share of a group, `capacity` experts a token."""
    return int(tokens / num_experts * capacity)


def expert_load(routing: Routing, num_experts: int) -> jax.Array:
    """Assignments of each expert over all groups, f32[E]; unused slots do not count."""
    one_hot = jax.nn.one_hot(routing.expert.reshape(-1), num_experts, dtype=jnp.float32)
    return one_hot.sum(0)


def flatten(routing: Routing, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """token, expert, weight [G N] of all groups as one; token ids count through all groups."""
    offset = jnp.arange(routing.token.shape[0], dtype=jnp.int32)[:, None] * tokens
    return tuple(a.reshape(-1) for a in (routing.token + offset, routing.expert, routing.weight))


def expert_slots(
    routing: Routing, tokens: int, num_experts: int, factor: float
) -> tuple[jax.Array, jax.Array]:
    """All groups as slots of the experts: token i32[E, C], weight f32[E, C].

    Token ids are those of `flatten`, past the last in an empty slot. A routing without fixed slots
    fills them by `first_come` with `factor`.
    """
    token, expert, weight = flatten(routing, tokens)
    if not routing.slots_per_expert:
        return first_come(token, expert, weight, num_experts, factor)
    groups = routing.token.shape[0]
    token = jnp.where(expert < num_experts, token, groups * tokens)
    slots = (groups, num_experts, routing.slots_per_expert)
    return tuple(a.reshape(slots).swapaxes(0, 1).reshape(num_experts, -1) for a in (token, weight))


def slots_of(num: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor * N / E), the slots of an expert when `slots` serves N assignments."""
    return min(num, -(-int(factor * num) // num_experts))


def first_come(
    token: jax.Array, expert: jax.Array, weight: jax.Array, num_experts: int, factor: float
) -> tuple[jax.Array, jax.Array]:
    """Fixed slots for any routing: an expert keeps the first C of its assignments in list order.

    token, expert, weight [G, N] with token ids unique over the groups -> token i32[E, C], weight
    f32[E, C]; C = slots_of(G N, E, factor). An empty slot has a token id past the last, weight 0.
    """
    num = expert.size
    slots = slots_of(num, num_experts, factor)
    order = jnp.argsort(expert.reshape(-1), stable=True)
    bounds = jnp.searchsorted(expert.reshape(-1)[order], jnp.arange(num_experts + 1))
    place = bounds[:-1, None] + jnp.arange(slots)
    assignment = jnp.where(place < bounds[1:, None], order[jnp.minimum(place, num - 1)], num)
    past = jnp.iinfo(jnp.int32).max
    return (
        jnp.take(token.reshape(-1), assignment, mode="fill", fill_value=past),
        jnp.take(weight.reshape(-1), assignment, mode="fill", fill_value=0.0),
    )
