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
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_diffusion.conditions import IMAGE
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.models import build
from moe_diffusion.models.stack import Model, abstract_inputs, next_router_state
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training.optim import make_optimizer, make_schedule
from moe_diffusion.training.state import TrainState, abstract_state, init_variables, initial_state
from moe_diffusion.training.step import TrainStep, make_train_step

Tree = Any


@dataclass(frozen=True)
class Run:
    """A config's model, mesh and step; shapes are ShapeDtypeStructs with shardings.

    state: shapes of the TrainState. untrained: shapes of the parameters that are not trained.
    grads: shapes of the gradients, each where its part of the update is computed.
    """

    config: ConfigDict
    model: Model
    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    untrained: Tree
    grads: Tree
    loss_fn: Callable

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Sets the mesh and the layout of the weights."""
        with jax.set_mesh(self.mesh), rules.use_preset(self.config.parallel.preset):
            yield

    def create(self, seed: int, variables: Tree | None = None) -> tuple[TrainState, Tree]:
        """The state before step 0 and the untrained parameters, each device making its own part.

        The values depend on the seed alone, not on the mesh.

        variables: {"params", "router_state"} to begin with instead, which are used up.
        """
        shardings = jax.tree.map(lambda x: x.sharding, (self.state, self.untrained))
        jit = partial(jax.jit, out_shardings=shardings)

        def begin(variables: Tree) -> tuple[TrainState, Tree]:
            dtype = self.model.param_dtype
            params = jax.tree.map(lambda p: p.astype(dtype), variables["params"])
            return initial_state(self.optimizer, self.config, {**variables, "params": params})

        if variables is not None:
            return jit(begin, donate_argnums=0)(variables)

        @jit
        def create(key: jax.Array) -> tuple[TrainState, Tree]:
            return begin(nn.meta.unbox(init_variables(self.model, key)))

        with self.on_mesh():
            return create(jax.random.key(seed))

    def step(self) -> TrainStep:
        """The compiled training step, see `make_train_step`."""
        config = self.config
        return make_train_step(
            self.loss_fn,
            self.optimizer,
            make_schedule(config.optim, config.train.num_steps),
            config,
            partial(next_router_state, self.model.routers()),
            jax.tree.map(lambda x: x.sharding, self.state),
            jax.tree.map(lambda x: x.sharding, self.grads),
        )

    def batch(self, *lead: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch with the leading axes (B,) or, of micro-batches, (A, B / A)."""
        image, _, cond = abstract_inputs(self.model, *lead)
        sharding = rules.batch_sharding(self.mesh, micro_batches=len(lead) > 1)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {IMAGE: image, **cond},
        )


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
    optimizer = make_optimizer(config.optim, model.is_stacked)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), rules.use_preset(preset):
        state, untrained, axes = abstract_state(model, optimizer, config)
    of_params, of_update = rules.PRESETS[preset]
    return Run(
        config=config,
        model=model,
        mesh=mesh,
        optimizer=optimizer,
        state=place(state, rules.state_shardings(mesh, preset, state, axes)),
        untrained=place(untrained, rules.shardings_of(mesh, of_params, untrained, axes)),
        grads=place(state.params, rules.shardings_of(mesh, of_update, state.params, axes)),
        loss_fn=loss_fn or make_loss(model, config),
    )


def place(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def on_every_device(mesh: Mesh, tree: Tree) -> Tree:
    """Arrays whole on every device of the mesh; those that lie on this mesh stay as they are."""
    whole = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        placed = isinstance(getattr(leaf, "sharding", None), NamedSharding)
        return leaf if placed and leaf.sharding.mesh == mesh else jax.device_put(leaf, whole)

    return jax.tree.map(put, tree)
