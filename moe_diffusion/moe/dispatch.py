"""Routing + expert weights -> tokens: one function, several backends, the same numbers.

    y[t] = sum of weight[n] * expert[n](x[t]) over the assignments n of token t

| backend     | what it does                                          | default for                |
|-------------|-------------------------------------------------------|----------------------------|
| `reference` | every expert on every token                           | the oracle of the tests    |
| `blocked`   | sort by expert, walk over chunks, never drops         | token choice on CPU        |
| `capacity`  | [E, C, D] products; C fixed by the router, or drops   | expert choice, CPU and GPU |
| `tpu`       | Pallas: up, activation and down projection in one     | everything on TPU          |
| `gpu`       | Pallas-Triton: tokens gathered while they are loaded  | token choice on GPU        |
| `ragged_dot`| XLA's grouped product, which JAX differentiates badly | comparison                 |

On a mesh the groups are split over the devices that split the batch, and every device dispatches
its own; the experts' weights are whole on each of them (no expert parallelism). Groups that span
devices (scope `batch`) are left to XLA's partitioner: correct, not fast.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_diffusion.kernels.blocked import blocked, make_plan
from moe_diffusion.kernels.capacity import capacity
from moe_diffusion.kernels.gpu import gpu
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.ragged import ragged_dot
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.tpu import tpu, tpu_capacity
from moe_diffusion.moe.routing import Routing
from moe_diffusion.parallel.mesh import batch_axes, num_batch_shards, platform

BACKENDS = ("reference", "blocked", "capacity", "tpu", "gpu", "ragged_dot")


def default_backend(platform: str, routing: Routing) -> str:
    """The table above, for the platform of the mesh: "cpu", "tpu" or "cuda" / "gpu"."""
    if platform == "tpu":
        return "tpu"
    if routing.slots_per_expert:
        return "capacity"
    return "blocked" if platform == "cpu" else "gpu"


def dispatch(
    x: jax.Array,
    routing: Routing,
    params: Params,
    *,
    kind: str,
    backend: str | None = None,
    capacity_factor: float = 1.25,
) -> jax.Array:
    """Sends tokens to experts and adds up what comes back.

    x [G, T, D], any float dtype (the experts compute in it); params: see kernels/mlp.py; kind
    "gelu", "silu" or "swiglu". backend None chooses by the table above. capacity_factor counts
    where `capacity` serves a routing without fixed slots: an expert then has
    C = factor * N / E slots and what comes later in the list is dropped.

    Returns [G, T, D]; gradients flow to x, routing.weight and params. Raises ValueError for an
    unknown backend.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"unknown dispatch backend {backend!r}; known: {', '.join(BACKENDS)}")
    params = {name: value.astype(x.dtype) for name, value in params.items()}
    local = partial(
        _dispatch,
        kind=kind,
        backend=backend or default_backend(platform(), routing),
        capacity_factor=capacity_factor,
    )
    shards = num_batch_shards()
    if shards == 1 or x.shape[0] % shards:
        return local(x, routing, params)
    by_group = PartitionSpec(batch_axes())
    return jax.shard_map(
        local,
        in_specs=(by_group, by_group, PartitionSpec()),
        out_specs=by_group,
        check_vma=False,
    )(x, routing, params)


def _dispatch(x, routing, params, *, kind, backend, capacity_factor):
    """All groups at once on one device: token ids become unique over the groups."""
    groups, tokens, width = x.shape
    offset = jnp.arange(groups, dtype=jnp.int32)[:, None] * tokens
    token, expert, weight = routing.token + offset, routing.expert, routing.weight
    num_experts = params["up"].shape[0]
    flat = x.reshape(groups * tokens, width)
    on_cpu = platform() == "cpu"  # there Pallas kernels are interpreted: slow, for tests
    if backend == "capacity" or (backend == "tpu" and routing.slots_per_expert):
        token = jnp.where(expert < num_experts, token, groups * tokens)
        if routing.slots_per_expert:
            slots = (groups, num_experts, routing.slots_per_expert)
            token, weight = (
                a.reshape(slots).swapaxes(0, 1).reshape(num_experts, -1) for a in (token, weight)
            )
        else:
            token, weight = first_come(token, expert, weight, num_experts, capacity_factor)
        if backend == "tpu":
            y = tpu_capacity(flat, token, weight, params, kind, interpret=on_cpu)
        else:
            y = capacity(flat, token, weight, params, kind)
        return y.reshape(x.shape)
    assignments = [a.reshape(-1) for a in (token, expert, weight)]
    if backend == "blocked":
        y = blocked_dispatch(flat, *assignments, params, kind, routing.slots_per_token)
    elif backend in ("tpu", "gpu"):
        kernel = tpu if backend == "tpu" else gpu
        slots = routing.slots_per_token
        y = kernel(flat, *assignments, params, kind, slots_per_token=slots, interpret=on_cpu)
    else:
        oracle = reference if backend == "reference" else ragged_dot
        y = oracle(flat, *assignments, params, kind)
    return y.reshape(x.shape)


def blocked_dispatch(flat, token, expert, weight, params, kind, slots_per_token):
    plan = make_plan(
        token,
        expert,
        num_tokens=flat.shape[0],
        num_experts=params["up"].shape[0],
        slots_per_token=slots_per_token,
    )
    return blocked(kind, flat, weight, params, plan)


def slots_of(num: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor * N / E), the slots of an expert when `capacity` serves N assignments."""
    return min(num, -(-int(factor * num) // num_experts))


def dropped_share(routing: Routing, num_experts: int, factor: float) -> jax.Array:
    """The share of assignments that `capacity` drops from a routing without fixed slots, f32[]."""
    one_hot = jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.float32)
    load = one_hot.sum(1)  # [G, E]
    shards = num_batch_shards()
    if load.shape[0] % shards == 0:
        load = load.reshape(shards, -1, num_experts)
    load = load.sum(-2)
    slots = slots_of(routing.expert.size // max(1, load.size // num_experts), num_experts, factor)
    return jnp.maximum(load - slots, 0).sum() / jnp.maximum(load.sum(), 1)


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
