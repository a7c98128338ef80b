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
from moe_diffusion.kernels import blocked, ragged, reference, slots
from moe_diffusion.kernels.cpu import cpu, library
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.kernels.gpu import gpu
from moe_diffusion.kernels.mlp import Params
from moe_diffusion.kernels.tpu import tpu
from moe_diffusion.moe import transport as transports
from moe_diffusion.moe.routing import Routing, Work
from moe_diffusion.moe.transport import AXIS, Run
from moe_diffusion.parallel.mesh import (
    batch_axes,
    current_mesh,
    num_batch_shards,
    num_expert_shards,
    platform,
)
from moe_diffusion.parallel.weights import gather, weight_specs

# --- the backends --------------------------------------------------------------------------------

ANYWHERE = ("cpu", "tpu", "gpu")


class Backend(NamedTuple):
    """One way to compute the sum above.

    run: work -> [G, T, D].
    what: what it is, in a few words.
    source: the file or folder of moe_diffusion/kernels/ that its operations come from.
    default_on: the platforms where it is taken without being named, if it suits.
    runs_on: the platforms where it can run.
    dropout: it can drop hidden units inside experts.
    lacks: dtype -> None, or what else is missing for it; completes the sentence "<backend> ...".
    drops: it drops assignments where the router fixes no slots, so it must be named there.
    """

    run: Run
    what: str
    source: str
    default_on: tuple[str, ...] = ()
    runs_on: tuple[str, ...] = ANYWHERE
    dropout: bool = False
    lacks: Callable[[str], str | None] = lambda dtype: None
    drops: bool = False

    def refuses(self, platform: str, dtype: str, dropout: bool) -> str | None:
        """None where it can compute; else what completes the sentence "<backend> ..."."""
        if platform not in self.runs_on:
            return f"does not run on a {platform.upper()}"
        if dropout and not self.dropout:
            return "has no dropout inside experts"
        return self.lacks(dtype)


def _cpu(work: Work) -> jax.Array:
    if work.routing.slots_per_expert:
        return work.by_slot(cpu.cpu_slots)
    return work.by_assignment(cpu.cpu, slots_per_token=work.routing.slots_per_token)


def _cpu_lacks(dtype: str) -> str | None:
    if dtype != "float32":
        return f"computes in float32, not {dtype}"
    return None if library.available() else library.NEEDS


def _tpu(work: Work) -> jax.Array:
    interpret = platform() == "cpu"  # slow, for tests
    if work.routing.slots_per_expert:
        return work.by_slot(tpu.tpu_slots, interpret=interpret)
    per_token = work.routing.slots_per_token
    return work.by_assignment(tpu.tpu, slots_per_token=per_token, interpret=interpret)


def _gpu(work: Work) -> jax.Array:
    interpret, per_token = platform() == "cpu", work.routing.slots_per_token
    return work.by_assignment(gpu.gpu, slots_per_token=per_token, interpret=interpret)


def _slots(work: Work) -> jax.Array:
    return work.by_slot(slots.fixed_slots, dropout=work.dropout)


def _blocked(work: Work) -> jax.Array:
    per_token = work.routing.slots_per_token
    return work.by_assignment(blocked.blocked, slots_per_token=per_token, dropout=work.dropout)


def _reference(work: Work) -> jax.Array:
    return work.by_assignment(reference.reference, dropout=work.dropout)


def _ragged_dot(work: Work) -> jax.Array:
    return work.by_assignment(ragged.ragged_dot)


# The first that is a default on the platform and suits is taken; the last two only by name.
BACKENDS = {
    "cpu": Backend(_cpu, "C++ kernels, float32", "cpu/", ("cpu",), ("cpu",), lacks=_cpu_lacks),
    "tpu": Backend(_tpu, "Pallas kernels", "tpu/", ("tpu",), ("tpu", "cpu")),
    "slots": Backend(
        _slots, "plain XLA, fixed slots", "slots.py", ANYWHERE, dropout=True, drops=True
    ),
    "gpu": Backend(_gpu, "Pallas kernels", "gpu/", ("gpu",), ("gpu", "cpu")),
    "blocked": Backend(_blocked, "plain XLA, sorted rows", "blocked.py", ANYWHERE, dropout=True),
    "reference": Backend(_reference, "every expert on every token", "reference.py", dropout=True),
    "ragged_dot": Backend(_ragged_dot, "XLA's grouped product", "ragged.py"),
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
    question = (device, dtype, dropout)
    if name is not None:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise UserError(f"model.moe.backend = {name} is unknown: choose auto or one of {known}")
        if reason := BACKENDS[name].refuses(*question):
            others = ", ".join(n for n, b in BACKENDS.items() if not b.refuses(*question))
            raise UserError(f"model.moe.backend = {name} {reason}: choose auto or {others}")
        return name, f"{BACKENDS[name].what}; named by model.moe.backend"
    passed = []
    for name, backend in BACKENDS.items():
        if device in backend.default_on:
            reason = backend.refuses(*question)
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
      transport: a name of `transport.TRANSPORTS`; None: see `default_transport`.
      dropout: of the experts' hidden units; its masks depend on the number of devices.

    Returns:
      y [G, T, D], with gradients to x, routing.weight and params; and the share of the assignments
      that was dropped, f32[], or None where this backend and transport never drop any.

    Raises:
      UserError: `backend` is unknown or cannot compute this.
    """
    name, _ = choose_backend(platform(), routing, x.dtype.name, dropout is not None, backend)
    if transports.experts_are_whole(params):
        transport = "none"
    params = {name: value.astype(x.dtype) for name, value in params.items()}
    work, chosen = Work(x, routing, params, kind, capacity_factor, dropout), BACKENDS[name]
    dropped = transports.dropped_share(work, transport, chosen.drops)
    if current_mesh().size <= 1:
        return chosen.run(work), dropped
    if x.shape[0] % num_batch_shards():
        return _one_group_over_devices(chosen.run, work), dropped
    # Every device has whole groups: it dispatches those, by itself or with help.
    how, by_group = transport or transports.default_transport(work), PartitionSpec(batch_axes())
    send = partial(transports.TRANSPORTS[how], chosen.run)
    return _on_devices(send, work, by_group, by_group, "" if how == "none" else AXIS), dropped


def _on_devices(
    function: Run, work: Work, x: PartitionSpec, routing: PartitionSpec, keep: str
) -> jax.Array:
    """function(work) on every device, with its part of x and routing and masks of its own.

    The experts' weights are gathered first, but over the mesh axis `keep` they stay split.
    """
    specs = weight_specs(work.params, transports.EXPERT_AXES)

    def on_a_device(work):
        params = gather(work.params, specs, keep=keep)
        dropout = work.dropout and work.dropout.fold_in(lax.axis_index(batch_axes()))
        return function(work.replace(params=params, dropout=dropout))

    split = work.replace(x=x, routing=routing, params=specs, dropout=PartitionSpec())
    return jax.shard_map(on_a_device, in_specs=(split,), out_specs=x, check_vma=False)(work)


def _one_group_over_devices(run: Run, work: Work) -> jax.Array:
    """One group over all devices, with fixed slots: x [1, T, D] -> [1, T, D].

    A device serves its own experts, and of each expert a share of the slots, for all tokens.
    Anything else is left to XLA's partitioner, which is correct but slow: several groups that the
    devices do not divide, a router without fixed slots, tokens or experts that do not divide.
    """
    slots, shards = work.routing.slots_per_expert, num_batch_shards()
    groups, tokens, _ = work.x.shape
    uneven = tokens % shards or work.num_experts % num_expert_shards()
    if slots is None or groups > 1 or uneven:
        return run(work)
    axes = batch_axes()
    by_expert = "" if transports.experts_are_whole(work.params) else AXIS  # what splits experts
    others = tuple(axis for axis in axes if axis != by_expert)
    parts = shards // num_expert_shards() if by_expert else shards
    share = -(-slots // parts)
    spare = ((0, 0), (0, share * parts - slots))

    def serve(work):
        count, first = work.num_experts, lax.axis_index(others) * share
        first_expert = lax.axis_index(AXIS) * count if by_expert else 0
        mine = transports.restrict(work.routing, first_expert, count)

        def part(array, unused):
            array = jnp.pad(array.reshape(count, slots), spare, constant_values=unused)
            return lax.dynamic_slice_in_dim(array, first, share, axis=1).reshape(1, -1)

        token, expert, weight = part(mine.token, 0), part(mine.expert, count), part(mine.weight, 0)
        mine = Routing(token, expert, weight, slots_per_expert=share)
        all_tokens = lax.all_gather(work.x, axes, axis=1, tiled=True)
        sums = run(work.replace(x=all_tokens, routing=mine))
        return lax.psum_scatter(sums, axes, scatter_dimension=1, tiled=True)

    return _on_devices(serve, work, PartitionSpec(None, axes), PartitionSpec(), by_expert)
