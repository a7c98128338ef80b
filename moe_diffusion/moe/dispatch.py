"""Routing + expert weights -> tokens: one function, several backends, the same numbers.

    y[t] = sum of weight[n] * expert[n](x[t]) over the assignments n of token t

| backend     | what it does                                          | default for                |
|-------------|-------------------------------------------------------|----------------------------|
| `reference` | every expert on every token                           | the oracle of the tests    |
| `cpu`       | C++: tokens gathered while operands are copied        | everything on CPU, f32     |
| `blocked`   | plain XLA: sort by expert, walk over chunks           | token choice, else on CPU  |
| `capacity`  | [E, C, D] products; C fixed by the router, or drops   | expert choice, GPU and CPU |
| `tpu`       | Pallas: up, activation and down projection in one     | everything on TPU          |
| `gpu`       | Pallas-Triton: tokens gathered while they are loaded  | token choice on GPU        |
| `ragged_dot`| XLA's grouped product, which JAX differentiates badly | comparison                 |

On a mesh the groups are split over the devices that split the batch, and every device dispatches
its own. Experts may be split over the axis `expert`, and then tokens or weights travel
(moe/transport.py). Of a group that spans devices (scope `batch`) with fixed slots, every device
serves its experts, and of each its share of the slots, for all tokens; without fixed slots such a
group is left to XLA's partitioner: correct, not fast.

`cpu` is compiled when it is first needed and computes in f32 (kernels/library.py); without a C++
compiler or in bf16 a CPU has `blocked` and `capacity`. Dropout inside the experts is done by
`reference`, `blocked` and `capacity`, which then are the default on every platform.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moe_diffusion.errors import UserError
from moe_diffusion.kernels import library
from moe_diffusion.kernels.blocked import blocked, make_plan
from moe_diffusion.kernels.capacity import capacity
from moe_diffusion.kernels.cpu import cpu, cpu_capacity
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.gpu import gpu
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.ragged import ragged_dot
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.tpu import tpu, tpu_capacity
from moe_diffusion.moe.routing import Routing, expert_slots, flatten, slots_of
from moe_diffusion.moe.transport import AXIS, EXPERT_AXES, Local, choose, restrict, send
from moe_diffusion.parallel.mesh import (
    batch_axes,
    num_batch_shards,
    num_expert_shards,
    platform,
)
from moe_diffusion.parallel.weights import gather, weight_specs

BACKENDS = ("reference", "blocked", "capacity", "cpu", "tpu", "gpu", "ragged_dot")
WITH_DROPOUT = BACKENDS[:3]


def default_backend(
    platform: str, routing: Routing, dropout: bool = False, dtype: str = "float32"
) -> str:
    """The table above, for the platform of the mesh: "cpu", "tpu" or "cuda" / "gpu"."""
    if platform == "tpu" and not dropout:
        return "tpu"
    if platform == "cpu" and not dropout and dtype == "float32" and library.available():
        return "cpu"
    if routing.slots_per_expert:
        return "capacity"
    return "blocked" if platform == "cpu" or dropout else "gpu"


def dispatch(
    x: jax.Array,
    routing: Routing,
    params: Params,
    *,
    kind: str,
    backend: str | None = None,
    capacity_factor: float = 1.25,
    transport: str | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Sends tokens to experts and adds up what comes back.

    x [G, T, D], any float dtype (the experts compute in it); params: see kernels/mlp.py; kind
    "gelu", "silu" or "swiglu". backend None chooses by the table above. capacity_factor counts
    where `capacity` serves a routing without fixed slots: an expert then has
    C = factor * N / E slots and what comes later in the list is dropped. transport None chooses by
    `transport.choose`. dropout acts between the experts' projections; its masks depend on how
    many devices there are.

    Returns [G, T, D]; gradients flow to x, routing.weight and params. Raises ValueError for an
    unknown backend, or one that cannot do this.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"unknown dispatch backend {backend!r}; known: {', '.join(BACKENDS)}")
    backend = backend or default_backend(platform(), routing, dropout is not None, x.dtype.name)
    if dropout is not None and backend not in WITH_DROPOUT:
        raise ValueError(f"backend {backend!r} has no dropout; {', '.join(WITH_DROPOUT)} have")
    if backend == "cpu" and x.dtype != jnp.float32:
        raise UserError(f"backend 'cpu' computes in float32, not {x.dtype}: take 'blocked'")
    if backend == "cpu" and not library.available():
        raise UserError(library.MISSING)
    params = {name: value.astype(x.dtype) for name, value in params.items()}
    local = partial(_dispatch, kind=kind, backend=backend, capacity_factor=capacity_factor)
    shards = num_batch_shards()
    if shards == 1:
        return local(x, routing, params, dropout=dropout)
    if x.shape[0] % shards:
        return _over_slots(local, x, routing, params, dropout)
    how = transport or _choose_transport(x, routing, params)
    specs = weight_specs(params, EXPERT_AXES)

    def on_a_device(x, routing, params, dropout):
        params = gather(params, specs, keep="" if how == "none" else AXIS)
        dropout = dropout and dropout.fold_in(lax.axis_index(batch_axes()))
        mine = partial(local, dropout=dropout)
        if how == "none":
            return mine(x, routing, params)
        options = {"kind": kind, "capacity_factor": capacity_factor, "dropout": dropout}
        return send(how, mine, x, routing, params, **options)

    by_group = PartitionSpec(batch_axes())
    return jax.shard_map(
        on_a_device,
        in_specs=(by_group, by_group, specs, PartitionSpec()),
        out_specs=by_group,
        check_vma=False,
    )(x, routing, params, dropout)


def _choose_transport(x: jax.Array, routing: Routing, params: Params) -> str:
    """See `transport.choose`; x [G, T, D] of all devices."""
    num_experts, _, hidden = params["up"].shape
    return choose(
        devices=num_expert_shards(),
        tokens=x.shape[0] * x.shape[1] // num_batch_shards(),
        assignments=routing.expert.size // num_batch_shards(),
        num_experts=num_experts,
        hidden=hidden,
        fixed_slots=routing.slots_per_expert is not None,
    )


def _over_slots(
    local: Local, x: jax.Array, routing: Routing, params: Params, dropout: Dropout | None
) -> jax.Array:
    """One group over all devices: each takes some experts, and of their slots some."""
    slots, shards, tokens = routing.slots_per_expert, num_batch_shards(), x.shape[1]
    uneven = tokens % shards or params["up"].shape[0] % num_expert_shards()
    if slots is None or x.shape[0] > 1 or uneven:
        return local(x, routing, params, dropout=dropout)
    axes, num_experts = batch_axes(), params["up"].shape[0]
    others = tuple(axis for axis in axes if axis != AXIS)
    share = -(-slots // (shards // num_expert_shards()))
    specs = weight_specs(params, EXPERT_AXES)

    def serve(x, routing, params, dropout):
        dropout = dropout and dropout.fold_in(lax.axis_index(axes))
        params = gather(params, specs, keep=AXIS)
        count = params["up"].shape[0]
        mine = restrict(routing, lax.axis_index(AXIS) * count, count, num_experts)
        spare = share * (shards // num_expert_shards()) - slots
        first = lax.axis_index(others) * share

        def part(array, unused):
            array = jnp.pad(array.reshape(count, slots), ((0, 0), (0, spare)),
                            constant_values=unused)  # fmt: skip
            return lax.dynamic_slice_in_dim(array, first, share, axis=1).reshape(1, -1)

        mine = Routing(
            token=part(mine.token, 0),
            expert=part(mine.expert, count),
            weight=part(mine.weight, 0.0),
            slots_per_expert=share,
        )
        everything = lax.all_gather(x, axes, axis=1, tiled=True)
        partial_sums = local(everything, mine, params, dropout=dropout)
        return lax.psum_scatter(partial_sums, axes, scatter_dimension=1, tiled=True)

    by_token = PartitionSpec(None, axes)
    return jax.shard_map(
        serve,
        in_specs=(by_token, PartitionSpec(), specs, PartitionSpec()),
        out_specs=by_token,
        check_vma=False,
    )(x, routing, params, dropout)


def _dispatch(x, routing, params, *, dropout, kind, backend, capacity_factor):
    """All groups at once on one device: token ids become unique over the groups."""
    tokens, width = x.shape[1:]
    num_experts = params["up"].shape[0]
    flat = x.reshape(-1, width)
    on_cpu = platform() == "cpu"  # there Pallas kernels are interpreted: slow, for tests
    if backend == "capacity" or (backend in ("cpu", "tpu") and routing.slots_per_expert):
        slots = expert_slots(routing, tokens, num_experts, capacity_factor)
        if backend == "tpu":
            y = tpu_capacity(flat, *slots, params, kind, interpret=on_cpu)
        elif backend == "cpu":
            y = cpu_capacity(flat, *slots, params, kind)
        else:
            y = capacity(flat, *slots, params, kind, dropout)
        return y.reshape(x.shape)
    assignments = flatten(routing, tokens)
    if backend == "blocked":
        slots = routing.slots_per_token
        y = blocked_dispatch(flat, *assignments, params, kind, slots, dropout)
    elif backend == "cpu":
        y = cpu(flat, *assignments, params, kind, slots_per_token=routing.slots_per_token)
    elif backend in ("tpu", "gpu"):
        kernel = tpu if backend == "tpu" else gpu
        slots = routing.slots_per_token
        y = kernel(flat, *assignments, params, kind, slots_per_token=slots, interpret=on_cpu)
    elif backend == "reference":
        y = reference(flat, *assignments, params, kind, dropout)
    else:
        y = ragged_dot(flat, *assignments, params, kind)
    return y.reshape(x.shape)


def blocked_dispatch(flat, token, expert, weight, params, kind, slots_per_token, dropout):
    plan = make_plan(
        token,
        expert,
        num_tokens=flat.shape[0],
        num_experts=params["up"].shape[0],
        slots_per_token=slots_per_token,
    )
    return blocked(kind, flat, weight, params, plan, dropout)


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
