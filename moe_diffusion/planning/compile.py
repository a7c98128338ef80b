"""The program that `train` or `sample` would run, compiled for devices that need not exist.

Nothing is allocated: the arguments are shapes with shardings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import first_line
from moe_diffusion.models import build
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.planning.memory import sharded_bytes
from moe_diffusion.training.optim import make_optimizer, make_schedule
from moe_diffusion.training.state import abstract_state
from moe_diffusion.training.step import make_train_step


@dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, XLA's memory analysis and the seconds that it took."""

    text: str
    memory: Any
    seconds: float


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal: bytes that the program needs on a device (None: it did not say)."""

    bytes_needed: int | None
    message: str
    seconds: float


def compile_program(
    config: ConfigDict, what: str, devices: Sequence[Any]
) -> Compiled | OutOfMemory:
    """Compiles the "train" step or the "sample" loop of `config` for `devices`."""
    start = time.perf_counter()
    lowered = lower_train(config, devices) if what == "train" else lower_sample(config, devices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error))
        return OutOfMemory(needed, first_line(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Compiled(compiled.as_text(), compiled.memory_analysis(), seconds)


def lower_train(config: ConfigDict, devices: Sequence[Any]) -> Any:
    """The training step of `training.loop`, with its shardings, lowered."""
    mesh, preset = make_mesh(config.parallel, devices), config.parallel.preset
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = build(config.model, losses=sorted(config.loss_weights))
        optimizer = make_optimizer(config.optim)
        shapes, axes = abstract_state(model, optimizer, config)
        shardings = rules.state_shardings(mesh, preset, shapes, axes)
        train_step = make_train_step(
            make_loss(model, config),
            optimizer,
            make_schedule(config.optim, config.train.num_steps),
            config,
            model.update_router_state,
            shardings,
            rules.update_shardings(mesh, preset, shapes.params, axes),
        )
        accumulate = config.optim.accumulate
        lead = (accumulate,) if accumulate > 1 else ()
        batch = _batch(config, mesh, (*lead, config.data.batch_size // accumulate))
        return train_step.lower(_place(shapes, shardings), batch, _key(mesh))


def lower_sample(config: ConfigDict, devices: Sequence[Any]) -> Any:
    """The whole loop of the sampler over a batch of `data.batch_size` images, lowered."""
    mesh, preset = make_mesh(config.parallel, devices), config.parallel.preset
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = build(config.model)
        shapes, axes = abstract_state(model, make_optimizer(config.optim), config)
        state = _place(shapes, rules.state_shardings(mesh, preset, shapes, axes))
        batch = _batch(config, mesh, (config.data.batch_size,))
        variables = {"params": state.params, "router_state": state.router_state}
        keys = _keys(mesh, config.data.batch_size)
        return make_sampler(model, config).lower(variables, batch["image"], batch["label"], keys)


def state_bytes(config: ConfigDict, what: str, devices: Sequence[Any]) -> int:
    """Bytes of a device below which no program for `config` can stay: its part of the state.

    For "train" with the gradients, which are as many as the parameters; for "sample" the weights.
    """
    mesh, preset = make_mesh(config.parallel, devices), config.parallel.preset
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes, axes = abstract_state(build(config.model), make_optimizer(config.optim), config)
        state = _place(shapes, rules.state_shardings(mesh, preset, shapes, axes))
    if what == "sample":
        return sharded_bytes(state.params)
    grads = _place(shapes.params, rules.update_shardings(mesh, preset, shapes.params, axes))
    return sharded_bytes((state, grads))


def needed_bytes(message: str) -> int | None:
    """Bytes that a program needs, from the TPU compiler's out-of-memory message."""
    sizes = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not sizes:
        return None
    number, unit = (group for group in sizes.groups() if group is not None)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _place(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _batch(config: ConfigDict, mesh: Any, lead: tuple[int, ...]) -> dict[str, Any]:
    size = config.model.image_size
    place = partial(
        jax.ShapeDtypeStruct, sharding=rules.batch_sharding(mesh, micro_batches=len(lead) > 1)
    )
    return {
        "image": place((*lead, size, size, config.model.channels), "float32"),
        "label": place(lead, "int32"),
    }


def _key(mesh: Any) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _keys(mesh: Any, number: int) -> jax.ShapeDtypeStruct:
    """One key for every image, beside it."""
    return jax.ShapeDtypeStruct((number,), _key(mesh).dtype, sharding=rules.batch_sharding(mesh))
