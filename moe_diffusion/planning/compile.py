"""Compiles the program of `train`, `distill` or `sample` for devices that need not exist.

Nothing is allocated: the arguments are shapes with shardings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_diffusion.conditions import IMAGE, cond_of
from moe_diffusion.dense2moe import stages
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import first_line
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh, num_batch_shards
from moe_diffusion.planning.memory import sharded_bytes
from moe_diffusion.training.run import Run, prepare_run, tracing_for
from moe_diffusion.training.step import Frozen


@dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, XLA's memory analysis and the seconds that it took."""

    text: str
    memory: Any
    seconds: float


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal of a program that needs more memory than a device has.

    Attributes:
      bytes_needed: on one device; None if the compiler did not say.
      message: the first line of its message.
      seconds: the time that it took.
    """

    bytes_needed: int | None
    message: str
    seconds: float


def compile_program(
    config: ConfigDict, what: str, devices: Sequence[Any]
) -> Compiled | OutOfMemory:
    """Compiles the "train" step, that of a stage of "distill", or the "sample" loop of `config`."""
    start = time.perf_counter()
    if what == "sample":
        lowered = lower_sample(config, devices)
    else:
        lowered = lower_train(config, devices, what)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error))
        return OutOfMemory(needed, first_line(error), time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Compiled(compiled.as_text(), compiled.memory_analysis(), seconds)


def prepare(config: ConfigDict, what: str, devices: Sequence[Any]) -> tuple[Run, Any]:
    """The run that is planned, and shapes of what its loss is given: a teacher to "distill"."""
    if what == "distill":
        return stages.planned(config, devices)
    return prepare_run(config, devices=devices), None


def lower_train(config: ConfigDict, devices: Sequence[Any], what: str = "train") -> Any:
    """Lowers the training step of `training.loop` with its shardings."""
    (run, given), accumulate = prepare(config, what, devices), config.optim.accumulate
    lead = (accumulate,) if accumulate > 1 else ()
    batch = run.batch(*lead, config.data.batch_size // accumulate)
    with tracing_for(run.mesh, config.parallel.preset):
        return run.step().lower(run.state, batch, _key(run.mesh), Frozen(run.untrained, given))


def lower_sample(config: ConfigDict, devices: Sequence[Any]) -> Any:
    """Lowers the whole loop of the sampler for a batch of `data.batch_size` images."""
    run = prepare_run(config, devices=devices)
    batch, keys = run.batch(config.data.batch_size), _keys(run.mesh, config.data.batch_size)
    with tracing_for(run.mesh, config.parallel.preset):
        sampler = make_sampler(run.model, config)
        return sampler.lower(run.variables, batch[IMAGE], cond_of(batch), keys)


def drawn_together(config: ConfigDict, devices: Sequence[Any]) -> int:
    """How many images `sample` draws for a batch of `data.batch_size`: it fills every group up."""
    groups = num_batch_shards(make_mesh(config.parallel, devices))
    return -(-config.data.batch_size // groups) * groups


def state_bytes(config: ConfigDict, what: str, devices: Sequence[Any]) -> int:
    """Bytes that the state alone takes on one device; every program for `config` needs more.

    For "train" this is the training state and the gradients, to "distill" also the teacher's
    weights, for "sample" it is the weights.
    """
    run, given = prepare(config, what, devices)
    if what == "sample":
        return sharded_bytes((run.state.params, run.untrained))
    return sharded_bytes((run.state, run.untrained, run.grads, given))


def needed_bytes(message: str) -> int | None:
    """Bytes that a program needs, from the TPU compiler's out-of-memory message."""
    sizes = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not sizes:
        return None
    number, unit = (group for group in sizes.groups() if group is not None)
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _key(mesh: Any) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _keys(mesh: Any, number: int) -> jax.ShapeDtypeStruct:
    """One random key for each image, on the device that holds the image."""
    return jax.ShapeDtypeStruct((number,), _key(mesh).dtype, sharding=rules.batch_sharding(mesh))
