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
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.rows import combine, gather, plan_rows
from moe_diffusion.moe.routing import Routing, Work, flatten, slots_of
from moe_diffusion.parallel.mesh import num_batch_shards, num_expert_shards
from moe_diffusion.parallel.weights import weight_specs

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

Run = Callable[[Work], jax.Array]  # a backend: the work of one device -> [G, T, D]


def experts_are_whole(params: Params) -> bool:
    """Whether every device has all experts, although the mesh has an axis to split them over.

    Two models on one mesh may follow different presets, and only `fsdp_ep` splits experts.
    """
    over_experts = weight_specs(params, EXPERT_AXES)["up"][0]
    return num_expert_shards() > 1 and AXIS not in (over_experts or ())


def default_transport(work: Work) -> str:
    """The cheapest transport in the table above that drops nothing; `work` is of all devices.

    Weights cost less than tokens from K T ~ 3/2 E H on. With DSMoE-L-E48's 48 x 448 that is 6,450
    tokens on a device, so models of up to 3B parameters on a pod with a usual batch want no other
    transport than `none`.
    """
    devices, shards = num_expert_shards(), num_batch_shards()
    if devices == 1:
        return "none"
    num_experts, _, hidden = work.params["up"].shape
    tokens = work.x.shape[0] * work.x.shape[1] // shards
    elements = {"none": 3 * num_experts * hidden, "gather": 2 * devices * tokens}
    if work.routing.slots_per_expert is not None:  # as many rows as assignments
        elements["a2a_slots"] = 2 * (work.routing.expert.size // shards)
    return min(elements, key=elements.get)


def restrict(routing: Routing, first: jax.Array, count: int) -> Routing:
    """The assignments to the experts first, ..., first + count - 1, which are numbered from 0."""
    groups, slots = len(routing.token), routing.slots_per_expert
    if slots:

        def own(array):
            array = array.reshape(groups, -1, slots)
            return lax.dynamic_slice_in_dim(array, first, count, axis=1).reshape(groups, -1)

        routing = jax.tree.map(own, routing)
    expert = routing.expert - first
    return routing.replace(expert=expert).only((expert >= 0) & (expert < count), count)


# --- the transports: (backend, work of this device with the params that it holds) -> [G, T, D] ---


def _none(run: Run, work: Work) -> jax.Array:
    return run(work)


def _gather(run: Run, work: Work) -> jax.Array:
    everywhere = partial(lax.all_gather, axis_name=AXIS, axis=0, tiled=True)
    x, routing = jax.tree.map(everywhere, (work.x, work.routing))
    mine = restrict(routing, lax.axis_index(AXIS) * work.num_experts, work.num_experts)
    sums = run(work.replace(x=x, routing=mine))
    return lax.psum_scatter(sums, AXIS, scatter_dimension=0, tiled=True)


def _all_to_all(run: Run, work: Work) -> jax.Array:
    """Slots of every expert in the world travel; `mlp.apply` serves them, not the backend."""
    del run
    flat, devices, count = work.tokens, lax.axis_size(AXIS), work.num_experts
    token, weight = work.slots(devices * count)
    slots, width = token.shape[1], flat.shape[1]
    plan = plan_rows(token.reshape(-1), flat.shape[0])
    rows = gather(flat, plan).reshape(devices, count, slots, width)
    rows = lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0)  # source device first
    rows = rows.swapaxes(0, 1).reshape(count, devices * slots, width)
    # For dropout a row's number stands for its token's, which stayed at home.
    row, expert = jnp.arange(devices * slots), jnp.arange(count)[:, None]
    drop = work.dropout and partial(work.dropout, token=row, expert=expert)
    out = mlp.apply(rows, work.params, work.kind, drop)
    out = out.reshape(count, devices, slots, width).swapaxes(0, 1)
    out = lax.all_to_all(out, AXIS, split_axis=0, concat_axis=0)
    out = out.reshape(-1, width) * weight.reshape(-1, 1).astype(flat.dtype)
    return combine(out, plan).reshape(work.x.shape)


def _ragged(run: Run, work: Work) -> jax.Array:
    flat, devices, count = work.tokens, lax.axis_size(AXIS), work.num_experts
    token, expert, weight = flatten(work.routing, work.x.shape[1])
    me, room = lax.axis_index(AXIS), int(RAGGED_BOUND * expert.size)
    order = jnp.argsort(expert, stable=True)
    token, expert, weight = token[order], expert[order], weight[order]
    bounds = jnp.searchsorted(expert, jnp.arange(devices * count + 1)).astype(jnp.int32)
    sent, begin = ragged_sizes(lax.all_gather(jnp.diff(bounds), AXIS), devices, room)
    ours = sent[:, :, 0]  # rows from device i to device j, i32[n, n]
    within = jnp.cumsum(ours, axis=0) - ours  # where i's rows start in j's buffer
    starts = bounds[:-1].reshape(devices, count)[:, 0]
    travel = partial(lax.ragged_all_to_all, axis_name=AXIS)
    plan = plan_rows(jnp.where(expert < devices * count, token, flat.shape[0]), flat.shape[0])
    rows = gather(flat, plan)
    empty = jnp.zeros((room, flat.shape[1]), flat.dtype)
    received = travel(rows, empty, starts, ours[me], within[me], ours[:, me])
    # The expert of each received row: rows lie by sender, and those of a sender by expert.
    edges, row = jnp.cumsum(begin[:, me].reshape(-1)), jnp.arange(room, dtype=jnp.int32)
    owner = jnp.searchsorted(edges, row, side="right").astype(jnp.int32)
    owner = jnp.where(row < edges[-1], owner % count, count)
    routing = Routing(row[None], owner[None], jnp.ones((1, room), jnp.float32))
    out = run(work.replace(x=received[None], routing=routing))[0]
    # Every device tells where its rows for each other device begin: they come back to there.
    home = lax.all_gather(starts, AXIS)
    back = travel(out, jnp.zeros_like(rows), within[:, me], ours[:, me], home[:, me], ours[me])
    return combine(back * weight[:, None].astype(flat.dtype), plan).reshape(work.x.shape)


TRANSPORTS = {"none": _none, "gather": _gather, "a2a_slots": _all_to_all, "ragged_a2a": _ragged}


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


def dropped_share(work: Work, transport: str | None, backend_drops: bool) -> jax.Array | None:
    """The share of all assignments that a dispatch drops, f32[]; None where it never drops any.

    work: of all devices. transport: as named; None chooses one that drops nothing. A transport that
    stays unused (on one device, or because a group spans devices) drops 0. backend_drops: the
    backend drops what finds no slot.
    """
    open_ended, shards = work.routing.slots_per_expert is None, num_batch_shards()
    if backend_drops and open_ended:
        return _beyond_slots(work)
    if transport != "ragged_a2a" and not (transport == "a2a_slots" and open_ended):
        return None
    if shards == 1 or work.x.shape[0] % shards:
        return jnp.float32(0)
    return _beyond_room(work) if transport == "ragged_a2a" else _beyond_slots(work)


def _beyond_slots(work: Work) -> jax.Array:
    """Where an expert has C = factor * N / E slots for the assignments of a device."""
    expert, num_experts, shards = work.routing.expert, work.num_experts, num_batch_shards()
    load = jax.nn.one_hot(expert, num_experts, dtype=jnp.float32).sum(1)  # [G, E]
    parts = shards if len(load) % shards == 0 else 1
    load = load.reshape(parts, -1, num_experts).sum(1)
    slots = slots_of(expert.size // parts, num_experts, work.capacity_factor)
    return jnp.maximum(load - slots, 0).sum() / jnp.maximum(load.sum(), 1)


def _beyond_room(work: Work) -> jax.Array:
    """Where a device has room for RAGGED_BOUND times its average load."""
    shards, devices = num_batch_shards(), num_expert_shards()
    expert, num_experts = work.routing.expert, work.num_experts
    one_hot = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
    counts = one_hot.reshape(shards // devices, devices, -1, num_experts).sum(2)
    room = int(RAGGED_BOUND * (expert.size // shards))
    kept = jax.vmap(lambda counts: ragged_sizes(counts, devices, room)[1])(counts)
    return 1 - kept.sum() / jnp.maximum(counts.sum(), 1)
