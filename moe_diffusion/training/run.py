"""What a run consists of before anything is allocated: `prepare_run(config)`.

Training, planning and benchmarks prepare their step in this one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_diffusion.conditions import IMAGE
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.models import build
from moe_diffusion.models.stack import (
    Model,
    abstract_inputs,
    abstract_weights,
    init_variables,
    next_router_state,
)
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh, num_batch_shards
from moe_diffusion.training.optim import init_emas, make_optimizer, make_schedule
from moe_diffusion.training.state import TrainState, merge, split
from moe_diffusion.training.step import TrainStep, make_train_step

Tree = Any


@dataclass(frozen=True)
class Run:
    """A config's model, mesh and step; trees are of ShapeDtypeStructs with shardings.

    Attributes:
      state: the TrainState.
      untrained: the parameters that are not trained.
      grads: the gradients, each where its part of the update is computed.
    """

    config: ConfigDict
    model: Model
    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    untrained: Tree
    grads: Tree
    loss_fn: Callable

    @property
    def variables(self) -> dict[str, Tree]:
        """What the model is applied to, trained or not: {"params", "router_state"}."""
        params = merge(self.state.params, self.untrained)
        return {"params": params, "router_state": self.state.router_state}

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Sets the mesh and the layout of the weights."""
        with jax.set_mesh(self.mesh), rules.use_preset(self.config.parallel.preset):
            yield

    def create(self, seed: int, variables: Tree | None = None) -> tuple[TrainState, Tree]:
        """The state before step 0 and the untrained parameters.

        Args:
          seed: the values depend on it alone, not on the mesh.
          variables: {"params", "router_state"} to begin with instead; their memory is used up.
        """
        variables = variables or unflatten_dict(self.initial(seed), sep="/")
        begin = partial(initial_state, self.optimizer, self.config)
        places = shardings((self.state, self.untrained))
        return jax.jit(begin, out_shardings=places, donate_argnums=0)(variables)

    def initial(self, seed: int, paths: Sequence[str] | None = None) -> dict[str, jax.Array]:
        """Path -> initial value of the variables, or of those at some paths.

        A path is like "params/final/linear/kernel". Each device makes its own part.
        """
        places = flatten_dict(shardings(self.variables), sep="/")
        places = {path: places[path] for path in (places if paths is None else paths)}

        def init(key: jax.Array) -> dict[str, jax.Array]:
            variables = nn.meta.unbox(init_variables(self.model, key, num_batch_shards()))
            leaves = flatten_dict(variables, sep="/")
            return {path: leaves[path] for path in places}

        with self.on_mesh():
            return jax.jit(init, out_shardings=places)(jax.random.key(seed))

    def step(self) -> TrainStep:
        """The compiled training step, see `make_train_step`."""
        schedule = make_schedule(self.config.optim, self.config.train.num_steps)
        update = partial(next_router_state, self.model.routers())
        places = shardings((self.state, self.grads))
        return make_train_step(self.loss_fn, self.optimizer, schedule, self.config, update, *places)

    def batch(self, *lead: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch with the leading axes (B,) or, of micro-batches, (A, B / A)."""
        image, _, cond = abstract_inputs(self.model, *lead)
        sharding = rules.batch_sharding(self.mesh, micro_batches=len(lead) > 1)
        return jax.tree.map(lambda x: x.update(sharding=sharding), {IMAGE: image, **cond})


def prepare_run(
    config: ConfigDict,
    model: Model | None = None,
    loss_fn: Callable | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Prepares the run of `config`.

    Args:
      model: None builds that of `config.model`.
      loss_fn: None takes that of `config.diffusion`.
      devices: all of all processes by default; they need not exist.

    Raises:
      UserError: a pattern of `optim.trainable` matches nothing.
    """
    mesh, preset = make_mesh(config.parallel, devices), config.parallel.preset
    model = model or build(config.model, losses=sorted(config.loss_weights))
    loss_fn = loss_fn or make_loss(model, config)
    optimizer = make_optimizer(config.optim, model.is_stacked)
    with tracing_for(mesh, preset):
        variables, axes = abstract_weights(model, num_batch_shards())
        begin = partial(initial_state, optimizer, config)
        state, untrained = jax.eval_shape(begin, variables)

    def place(shapes: Tree, table: rules.Table) -> Tree:
        places = rules.shardings_of(mesh, table, shapes, axes)
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), shapes, places)

    of_params, of_update = rules.PRESETS[preset]
    grads, untrained = place(state.params, of_update), place(untrained, of_params)
    state = place(state, of_update).replace(params=place(state.params, of_params))
    return Run(config, model, mesh, optimizer, state, untrained, grads, loss_fn)


@contextmanager
def tracing_for(mesh: Mesh, preset: str) -> Iterator[None]:
    """What is traced inside is for this mesh, whose devices need not exist; nothing can run."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), rules.use_preset(preset):
        yield


def initial_state(
    optimizer: optax.GradientTransformation, config: Any, variables: dict[str, Any]
) -> tuple[TrainState, Tree]:
    """The state before step 0 of {"params", "router_state"}, and the untrained parameters."""
    router_state = variables.get("router_state", {})
    params, untrained = split(variables["params"], config.optim.trainable)
    emas = init_emas(params, router_state, config.ema)
    step = jnp.zeros([], jnp.int32)
    return TrainState(step, params, router_state, emas, optimizer.init(params)), untrained


def shardings(tree: Tree) -> Tree:
    """The sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)


def on_every_device(mesh: Mesh, tree: Tree) -> Tree:
    """Puts arrays whole on every device of the mesh; those that lie on this mesh stay as they are.

    Every process brings all values, from the host or its own devices. They are not compared over
    the processes, as `jax.device_put` would do: a teacher may have gigabytes.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        if getattr(getattr(leaf, "sharding", None), "mesh", None) == mesh:
            return leaf
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda part: leaf[part])

    return jax.tree.map(put, tree)
