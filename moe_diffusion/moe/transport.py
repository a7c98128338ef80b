"""Expert parallelism: tokens travel to the devices that hold their experts, and back.

Runs inside the shard_map of `dispatch`, on a mesh whose axis `expert` has n > 1 devices. Each of
them has E / n experts and T tokens of its own. A device sends or receives in a forward pass, in
elements:

| transport    | moves                                                | drops                     |
|--------------|------------------------------------------------------|---------------------------|
| `none`       | 3 E D H: every device gets the weights of all        | nothing                   |
|              | experts                                              |                           |
| `gather`     | 2 n T D: every device gets all tokens and returns    | nothing                   |
|              | sums                                                 |                           |
| `a2a_slots`  | 2 C E D, C slots per expert and source device        | what is beyond C, unless  |
|              |                                                      | the router fixes C        |
| `ragged_a2a` | 2 K T D: only the rows that are wanted (TPU only)    | what is beyond twice a    |
|              |                                                      | device's average load     |

`default_transport` takes the cheapest of those that drop nothing, and `none` if two cost the same:
where parameters are sharded their weights are gathered anyway, and a gather of weights hides better
behind computation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import combine, gather, plan_rows
from moe_diffusion.moe.routing import Routing, expert_slots, flatten, slots_of
from moe_diffusion.parallel.mesh import num_batch_shards, num_expert_shards
from moe_diffusion.parallel.weights import Specs

TRANSPORTS = ("none", "gather", "a2a_slots", "ragged_a2a")
AXIS = "expert"
RAGGED_BOUND = 2.0  # `ragged_a2a` has room for so many times a device's average load

EXPERT_AXES = {  # logical axes of the experts' weights
    "up": ("expert", "embed", "mlp"),
    "gate": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
    "up_bias": ("expert", "mlp"),
    "gate_bias": ("expert", "mlp"),
    "down_bias": ("expert", "embed"),
}

# (x [G, T, D], routing of the local experts, their params) -> [G, T, D]
Local = Callable[[jax.Array, Routing, Params], jax.Array]


def experts_are_whole(specs: Specs) -> bool:
    """Whether every device has all experts, although the mesh has an axis to split them over.

    specs: of the experts' weights. Two models on one mesh may follow different presets, and only
    the preset `fsdp_ep` splits experts.
    """
    return num_expert_shards() > 1 and AXIS not in (specs["up"][0] or ())


def default_transport(x: jax.Array, routing: Routing, params: Params) -> str:
    """The transport where none is named; the arguments are those of all devices: x [G, T, D]."""
    num_experts, _, hidden = params["up"].shape
    return choose(
        devices=num_expert_shards(),
        tokens=x.shape[0] * x.shape[1] // num_batch_shards(),
        assignments=routing.expert.size // num_batch_shards(),
        num_experts=num_experts,
        hidden=hidden,
        fixed_slots=routing.slots_per_expert is not None,
    )


def choose(
    *,
    devices: int,
    tokens: int,
    assignments: int,
    num_experts: int,
    hidden: int,
    fixed_slots: bool,
) -> str:
    """The cheapest transport in the table above that drops nothing.

    tokens and assignments: of one device. Weights cost less than tokens from K T ~ 3/2 E H on. With
    DSMoE-L-E48's 48 x 448 that is 6,450 tokens on a device, so models of up to 3B parameters on a
    pod with a usual batch want no other transport than `none`.
    """
    if devices == 1:
        return "none"
    elements = {"none": 3 * num_experts * hidden, "gather": 2 * devices * tokens}
    if fixed_slots:  # C slots for each expert: as many rows as assignments
        elements["a2a_slots"] = 2 * assignments
    return min(elements, key=elements.get)


def send(
    transport: str,
    local: Local,
    x: jax.Array,
    routing: Routing,
    params: Params,
    *,
    kind: str,
    capacity_factor: float,
    dropout: Dropout | None,
) -> jax.Array:
    """Dispatches x[G, T, D] of this device to any of the E experts: [G, T, D].

    params: of this device's own E / n experts. `local` dispatches to those alone.
    """
    if transport == "gather":
        return _gather(local, x, routing, params)
    tokens, width = x.shape[1:]
    flat = x.reshape(-1, width)
    if transport == "ragged_a2a":
        y = _ragged(local, flat, *flatten(routing, tokens), params)
    else:
        num_experts = params["up"].shape[0] * lax.axis_size(AXIS)
        slots = expert_slots(routing, tokens, num_experts, capacity_factor)
        y = _all_to_all(flat, *slots, params, kind, dropout)
    return y.reshape(x.shape)


def restrict(routing: Routing, first: jax.Array, count: int, num_experts: int) -> Routing:
    """The assignments to the experts first, ..., first + count - 1, which are numbered from 0."""
    slots = routing.slots_per_expert
    groups = routing.token.shape[0]
    if slots:

        def own(array):
            array = array.reshape(groups, num_experts, slots)
            return lax.dynamic_slice_in_dim(array, first, count, axis=1).reshape(groups, -1)

        routing = jax.tree.map(own, routing)
    expert = routing.expert - first
    mine = (expert >= 0) & (expert < count)
    return Routing(
        token=routing.token,
        expert=jnp.where(mine, expert, count),
        weight=jnp.where(mine, routing.weight, 0.0),
        slots_per_expert=slots,
    )


def _gather(local: Local, x: jax.Array, routing: Routing, params: Params) -> jax.Array:
    count = params["up"].shape[0]
    all_tokens = lax.all_gather(x, AXIS, axis=0, tiled=True)
    routing = jax.tree.map(lambda a: lax.all_gather(a, AXIS, axis=0, tiled=True), routing)
    num_experts = count * lax.axis_size(AXIS)
    mine = restrict(routing, lax.axis_index(AXIS) * count, count, num_experts)
    partial_sums = local(all_tokens, mine, params)
    return lax.psum_scatter(partial_sums, AXIS, scatter_dimension=0, tiled=True)


def _all_to_all(flat, token, weight, params, kind, dropout):
    """flat[T, D]; slots of every expert in the world: token, weight [E, C] -> [T, D]."""
    devices, count = lax.axis_size(AXIS), params["up"].shape[0]
    slots, width = token.shape[1], flat.shape[1]
    plan = plan_rows(token.reshape(-1), flat.shape[0])
    rows = gather(flat, plan).reshape(devices, count, slots, width)
    rows = lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0)  # source device first
    rows = rows.swapaxes(0, 1).reshape(count, devices * slots, width)
    drop = None
    if dropout is not None:  # a row's number stands for its token's, which stayed at home
        row, expert = jnp.arange(devices * slots), jnp.arange(count)[:, None]
        drop = partial(dropout, token=row, expert=expert)
    out = mlp.apply(rows, params, kind, drop)
    out = out.reshape(count, devices, slots, width).swapaxes(0, 1)
    out = lax.all_to_all(out, AXIS, split_axis=0, concat_axis=0)
    out = out.reshape(-1, width) * weight.reshape(-1, 1).astype(flat.dtype)
    return combine(out, plan)


def _ragged(local: Local, flat, token, expert, weight, params):
    """flat[T, D]; assignments [N] to any expert of the world -> [T, D]."""
    devices, count = lax.axis_size(AXIS), params["up"].shape[0]
    num, me = expert.shape[0], lax.axis_index(AXIS)
    order = jnp.argsort(expert, stable=True)
    bounds = jnp.searchsorted(expert[order], jnp.arange(devices * count + 1))
    room = int(RAGGED_BOUND * num)
    sent, begin = ragged_sizes(
        lax.all_gather(jnp.diff(bounds).astype(jnp.int32), AXIS), devices, room
    )
    ours = sent[:, :, 0]  # rows from device i to device j, i32[n, n]
    within = jnp.cumsum(ours, axis=0) - ours  # where i's rows start in j's buffer
    starts = bounds[:-1].reshape(devices, count)[:, 0].astype(jnp.int32)
    plan = plan_rows(jnp.where(expert[order] < devices * count, token[order], flat.shape[0]),
                     flat.shape[0])  # fmt: skip
    rows = gather(flat, plan)

    received = lax.ragged_all_to_all(
        rows,
        jnp.zeros((room, flat.shape[1]), flat.dtype),
        starts,
        ours[me],
        within[me],
        ours[:, me],
        axis_name=AXIS,
    )
    # The expert of each received row: rows lie by sender, and those of a sender by expert.
    edges = jnp.cumsum(begin[:, me].reshape(-1))
    owner = jnp.searchsorted(edges, jnp.arange(room), side="right")
    owner = jnp.where(jnp.arange(room) < edges[-1], owner % count, count)
    routing = Routing(
        token=jnp.arange(room, dtype=jnp.int32)[None],
        expert=owner.astype(jnp.int32)[None],
        weight=jnp.ones((1, room), jnp.float32),
    )
    out = local(received[None], routing, params)[0]
    # Every device tells where its rows for each other device begin: they come back to there.
    home = lax.all_gather(starts, AXIS)
    back = lax.ragged_all_to_all(
        out,
        jnp.zeros_like(rows),
        within[:, me],
        ours[:, me],
        home[:, me],
        ours[me],
        axis_name=AXIS,
    )
    return combine(back * weight[order][:, None].astype(flat.dtype), plan)


def ragged_sizes(counts: jax.Array, devices: int, room: int) -> tuple[jax.Array, jax.Array]:
    """How many rows travel if every device has room for `room` of them.

    counts i32[n, E]: the assignments of device i to expert e. What a receiver has no room for stays
    at home: the rows of the last senders first, and of those the rows for the last experts.

    Returns the rows from device i to device j, i32[n, n, 1], and the same by expert of device j,
    i32[n, n, E / n].
    """
    wanted = counts.reshape(devices, devices, -1).swapaxes(0, 1)  # [receiver, sender, expert]
    flat = wanted.reshape(devices, -1)
    before = jnp.cumsum(flat, axis=1) - flat
    kept = jnp.clip(room - before, 0, flat).reshape(wanted.shape).swapaxes(0, 1)
    return kept.sum(-1, keepdims=True), kept


def dropped_share(
    backend_drops: bool,
    transport: str | None,
    routing: Routing,
    num_experts: int,
    factor: float,
) -> jax.Array | None:
    """The share of all assignments that a dispatch drops, f32[]; None where it never drops any.

    backend_drops: the backend drops what finds no slot. transport: as named; None chooses one that
    drops nothing. factor: `capacity_factor`. A transport that stays unused (on one device, or
    because a group spans devices) drops 0.
    """
    open_ended = routing.slots_per_expert is None
    if backend_drops and open_ended:
        return _beyond_slots(routing, num_experts, factor)
    if transport == "ragged_a2a" or (transport == "a2a_slots" and open_ended):
        shards = num_batch_shards()
        if shards == 1 or routing.expert.shape[0] % shards:
            return jnp.float32(0)
        if transport == "ragged_a2a":
            return _beyond_room(routing, num_experts)
        return _beyond_slots(routing, num_experts, factor)
    return None


def _beyond_slots(routing: Routing, num_experts: int, factor: float) -> jax.Array:
    """Where an expert has C = factor * N / E slots for the assignments of a device."""
    one_hot = jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.float32)
    load = one_hot.sum(1)  # [G, E]
    shards = num_batch_shards()
    if load.shape[0] % shards == 0:
        load = load.reshape(shards, -1, num_experts)
    load = load.sum(-2)
    slots = slots_of(routing.expert.size // max(1, load.size // num_experts), num_experts, factor)
    return jnp.maximum(load - slots, 0).sum() / jnp.maximum(load.sum(), 1)


def _beyond_room(routing: Routing, num_experts: int) -> jax.Array:
    """Where a device has room for RAGGED_BOUND times its average load."""
    shards, devices = num_batch_shards(), num_expert_shards()
    one_hot = jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.int32)
    counts = one_hot.reshape(shards // devices, devices, -1, num_experts).sum(2)
    room = int(RAGGED_BOUND * (routing.expert.size // shards))
    kept = jax.vmap(lambda counts: ragged_sizes(counts, devices, room)[1])(counts)
    return 1 - kept.sum() / jnp.maximum(counts.sum(), 1)
