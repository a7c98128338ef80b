"""Routing + expert weights -> tokens: one function, several backends, the same numbers.

    y[t] = sum of weight[n] * expert[n](x[t]) over the assignments n of token t

`BACKENDS` lists the ways to compute this, `choose_backend` says which of them runs, and `dispatch`
does it. On a mesh every device dispatches the groups of its own part of the batch. Where the axis
`expert` has several devices they also share the experts, and then tokens or weights travel
(moe/transport.py). A group that spans devices (`router.group` "batch") is split by experts and
slots, see `_one_group_over_devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moe_diffusion.errors import UserError
from moe_diffusion.kernels.blocked import blocked
from moe_diffusion.kernels.cpu import library
from moe_diffusion.kernels.cpu.cpu import cpu, cpu_slots
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.gpu.gpu import gpu
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.ragged import ragged_dot
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.slots import fixed_slots
from moe_diffusion.kernels.tpu.tpu import tpu, tpu_slots
from moe_diffusion.moe import transport as transports
from moe_diffusion.moe.routing import Routing, expert_slots, flatten
from moe_diffusion.moe.transport import AXIS, EXPERT_AXES, Local, restrict
from moe_diffusion.parallel.mesh import batch_axes, num_batch_shards, num_expert_shards, platform
from moe_diffusion.parallel.weights import Specs, gather, weight_specs

# --- the backends --------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a backend computes on one device; the fields are those of `dispatch`."""

    x: jax.Array
    routing: Routing
    params: Params
    kind: str
    capacity_factor: float
    dropout: Dropout | None

    @property
    def tokens(self) -> jax.Array:
        """Of all groups, one group after the other: [T, D]."""
        return self.x.reshape(-1, self.x.shape[-1])

    def by_assignment(self, kernel: Callable[..., jax.Array], **options) -> jax.Array:
        """kernel(x[T, D], token i32[N], expert i32[N], weight f32[N], params, kind, **options).

        T and N count through all groups.
        """
        tokens, assignments = self.tokens, flatten(self.routing, self.x.shape[1])
        return kernel(tokens, *assignments, self.params, self.kind, **options)

    def by_slot(self, kernel: Callable[..., jax.Array], **options) -> jax.Array:
        """kernel(x[T, D], token i32[E, C], weight f32[E, C], params, kind, **options).

        T and C count through all groups. A routing without fixed slots fills them in the order of
        its list, see `routing.expert_slots`.
        """
        tokens, num_experts = self.tokens, self.params["up"].shape[0]
        slots = expert_slots(self.routing, self.x.shape[1], num_experts, self.capacity_factor)
        return kernel(tokens, *slots, self.params, self.kind, **options)


# (platform "cpu", "tpu" or "gpu", routing, dtype, dropout) -> None where a backend can compute
# this; else what completes the sentence "<backend> ...".
Suits = Callable[[str, Routing, str, bool], str | None]


class Backend(NamedTuple):
    """One way to compute the sum above.

    run: work -> [T, D], the tokens of all groups one after the other.
    suits: whether it can.
    what: what it is, in a few words.
    source: the file or folder of moe_diffusion/kernels/ that its operations come from.
    default_on: the platforms where it is taken without being named, if it suits.
    drops: it drops assignments where the router fixes no slots, so it must be named there.
    """

    run: Callable[[Work], jax.Array]
    suits: Suits
    what: str
    source: str
    default_on: tuple[str, ...] = ()
    drops: bool = False


ANYWHERE = ("cpu", "tpu", "gpu")


def _suits(platforms: tuple[str, ...] = ANYWHERE, dropout: bool = True) -> Suits:
    """For backends that run on these platforms, with dropout inside experts or without."""

    def suits(platform: str, routing: Routing, dtype: str, wanted: bool) -> str | None:
        if platform not in platforms:
            return f"does not run on a {platform.upper()}"
        return "has no dropout inside experts" if wanted and not dropout else None

    return suits


def _suits_cpu(platform: str, routing: Routing, dtype: str, dropout: bool) -> str | None:
    if reason := _suits(("cpu",), dropout=False)(platform, routing, dtype, dropout):
        return reason
    if dtype != "float32":
        return f"computes in float32, not {dtype}"
    return None if library.available() else library.NEEDS


def _cpu(work: Work) -> jax.Array:
    if work.routing.slots_per_expert:
        return work.by_slot(cpu_slots)
    return work.by_assignment(cpu, slots_per_token=work.routing.slots_per_token)


def _tpu(work: Work) -> jax.Array:
    interpret = platform() == "cpu"  # slow, for tests
    if work.routing.slots_per_expert:
        return work.by_slot(tpu_slots, interpret=interpret)
    per_token = work.routing.slots_per_token
    return work.by_assignment(tpu, slots_per_token=per_token, interpret=interpret)


def _gpu(work: Work) -> jax.Array:
    interpret, per_token = platform() == "cpu", work.routing.slots_per_token
    return work.by_assignment(gpu, slots_per_token=per_token, interpret=interpret)


def _slots(work: Work) -> jax.Array:
    return work.by_slot(fixed_slots, dropout=work.dropout)


def _blocked(work: Work) -> jax.Array:
    per_token = work.routing.slots_per_token
    return work.by_assignment(blocked, slots_per_token=per_token, dropout=work.dropout)


def _reference(work: Work) -> jax.Array:
    return work.by_assignment(reference, dropout=work.dropout)


def _ragged_dot(work: Work) -> jax.Array:
    return work.by_assignment(ragged_dot)


_no_dropout, _tpus, _gpus = (
    _suits(platforms, dropout=False) for platforms in (ANYWHERE, ("tpu", "cpu"), ("gpu", "cpu"))
)
# The first that is a default on the platform and suits is taken; the last two only by name.
BACKENDS = {
    "cpu": Backend(_cpu, _suits_cpu, "C++ kernels, float32", "cpu/", ("cpu",)),
    "tpu": Backend(_tpu, _tpus, "Pallas kernels", "tpu/", ("tpu",)),
    "slots": Backend(_slots, _suits(), "plain XLA, fixed slots", "slots.py", ANYWHERE, drops=True),
    "gpu": Backend(_gpu, _gpus, "Pallas kernels", "gpu/", ("gpu",)),
    "blocked": Backend(_blocked, _suits(), "plain XLA, sorted rows", "blocked.py", ANYWHERE),
    "reference": Backend(_reference, _suits(), "every expert on every token", "reference.py"),
    "ragged_dot": Backend(_ragged_dot, _no_dropout, "XLA's grouped product", "ragged.py"),
}


def choose_backend(
    platform: str, routing: Routing, dtype: str, dropout: bool, name: str | None = None
) -> tuple[str, str]:
    """The backend that computes a routing, and why it is this one.

    Args:
      platform: of the mesh's devices: "cpu", "tpu", or anything else for a GPU.
      routing: only its static fields are read.
      dtype: in which the experts compute, for example "bfloat16".
      dropout: whether the experts have dropout in this program.
      name: the backend that the user wants, or None.

    Returns:
      Its name in `BACKENDS`, and one line without that name.

    Raises:
      UserError: `name` is unknown or does not suit.
    """
    device = platform if platform in ANYWHERE else "gpu"
    question = (device, routing, dtype, dropout)
    if name is not None:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise UserError(f"model.moe.backend = {name} is unknown: choose auto or one of {known}")
        if reason := BACKENDS[name].suits(*question):
            others = ", ".join(n for n, b in BACKENDS.items() if not b.suits(*question))
            raise UserError(f"model.moe.backend = {name} {reason}: choose auto or {others}")
        return name, f"{BACKENDS[name].what}; named by model.moe.backend"
    passed = []
    for name, backend in BACKENDS.items():
        if device in backend.default_on:
            reason = backend.suits(*question)
            if backend.drops and not routing.slots_per_expert:
                reason = "drops tokens where the router fixes no slots"
            if not reason:
                return name, "; ".join([backend.what, *passed])
            passed.append(f"not {name}, which {reason}")
    raise AssertionError("blocked suits everything")


# --- the dispatch --------------------------------------------------------------------------------


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
) -> tuple[jax.Array, jax.Array | None]:
    """Sends tokens to experts and adds up what comes back.

    Args:
      x: [G, T, D] of any float dtype; the experts compute in it.
      routing: of the G groups.
      params: of the E experts, see kernels/mlp.py.
      kind: "gelu", "silu" or "swiglu".
      backend: a name of `BACKENDS`; None: see `choose_backend`.
      capacity_factor: where the router fixes no slots, the backend `slots` and the transport
        `a2a_slots` give every expert C = capacity_factor * N / E of them.
      transport: a name of `transport.TRANSPORTS`; None: see `transport.choose`.
      dropout: of the experts' hidden units; its masks depend on the number of devices.

    Returns:
      y [G, T, D], with gradients to x, routing.weight and params; and the share of the assignments
      that was dropped, f32[], or None where this backend and transport never drop any.

    Raises:
      UserError: `backend` is unknown or cannot compute this.
    """
    backend, _ = choose_backend(platform(), routing, x.dtype.name, dropout is not None, backend)
    num_experts, specs = params["up"].shape[0], weight_specs(params, EXPERT_AXES)
    if transports.experts_are_whole(specs):
        transport = "none"
    dropped = transports.dropped_share(
        BACKENDS[backend].drops, transport, routing, num_experts, capacity_factor
    )
    params = {name: value.astype(x.dtype) for name, value in params.items()}
    options = {"kind": kind, "capacity_factor": capacity_factor}
    local = partial(_on_one_device, backend=backend, **options)
    shards = num_batch_shards()
    if shards == 1:
        y = local(x, routing, params, dropout=dropout)
    elif x.shape[0] % shards:
        y = _one_group_over_devices(local, x, routing, params, specs, dropout)
    else:
        how = transport or transports.default_transport(x, routing, params)
        y = _groups_over_devices(local, x, routing, params, specs, dropout, how, **options)
    return y, dropped


def _on_one_device(x, routing, params, *, backend, kind, capacity_factor, dropout):
    work = Work(x, routing, params, kind, capacity_factor, dropout)
    return BACKENDS[backend].run(work).reshape(x.shape)


def _groups_over_devices(
    local: Local, x, routing, params, specs: Specs, dropout, transport: str, **options
) -> jax.Array:
    """Every device has whole groups: it dispatches those, by itself or with help (`transport`)."""

    def on_a_device(x, routing, params, dropout):
        params = gather(params, specs, keep="" if transport == "none" else AXIS)
        dropout = dropout and dropout.fold_in(lax.axis_index(batch_axes()))
        mine = partial(local, dropout=dropout)
        if transport == "none":
            return mine(x, routing, params)
        return transports.send(transport, mine, x, routing, params, dropout=dropout, **options)

    by_group = PartitionSpec(batch_axes())
    return jax.shard_map(
        on_a_device,
        in_specs=(by_group, by_group, specs, PartitionSpec()),
        out_specs=by_group,
        check_vma=False,
    )(x, routing, params, dropout)


def _one_group_over_devices(local: Local, x, routing, params, specs: Specs, dropout) -> jax.Array:
    """One group over all devices, with fixed slots: x [1, T, D] -> [1, T, D].

    A device serves its own experts, and of each expert a share of the slots, for all tokens.
    Anything else is left to XLA's partitioner, which is correct but slow: several groups that the
    devices do not divide, a router without fixed slots, tokens or experts that do not divide.
    """
    slots, shards, tokens = routing.slots_per_expert, num_batch_shards(), x.shape[1]
    uneven = tokens % shards or params["up"].shape[0] % num_expert_shards()
    if slots is None or x.shape[0] > 1 or uneven:
        return local(x, routing, params, dropout=dropout)
    axes, num_experts = batch_axes(), params["up"].shape[0]
    by_expert = "" if transports.experts_are_whole(specs) else AXIS  # the axis that splits experts
    others = tuple(axis for axis in axes if axis != by_expert)
    parts = shards // num_expert_shards() if by_expert else shards
    share = -(-slots // parts)

    def serve(x, routing, params, dropout):
        dropout = dropout and dropout.fold_in(lax.axis_index(axes))
        params = gather(params, specs, keep=by_expert)
        count = params["up"].shape[0]
        mine = lax.axis_index(AXIS) * count if by_expert else 0
        mine = restrict(routing, mine, count, num_experts)
        spare = share * parts - slots
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
        all_tokens = lax.all_gather(x, axes, axis=1, tiled=True)
        partial_sums = local(all_tokens, mine, params, dropout=dropout)
        return lax.psum_scatter(partial_sums, axes, scatter_dimension=1, tiled=True)

    by_token = PartitionSpec(None, axes)
    return jax.shard_map(
        serve,
        in_specs=(by_token, PartitionSpec(), specs, PartitionSpec()),
        out_specs=by_token,
        check_vma=False,
    )(x, routing, params, dropout)
