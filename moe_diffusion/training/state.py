"""TrainState: everything that a run carries from one step to the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import num_batch_shards
from moe_diffusion.training.optim import init_emas


@flax.struct.dataclass
class TrainState:
    """A pytree of plain dicts and arrays.

    step: i32[], optimizer steps done, which is also the number of the next (0, 1, ...).
    params, router_state: collections of the model; {} where the router keeps no state.
    emas: decay as text -> {"params", "router_state"}.
    opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    router_state: Any
    emas: dict[str, dict[str, Any]]
    opt_state: Any


def weights(state: TrainState, ema: str | None = None) -> tuple[Any, Any]:
    """(params, router_state) of the live model or of the average with decay `ema`, to sample with.

    Raises KeyError for a decay that the state does not keep.
    """
    if ema is None:
        return state.params, state.router_state
    return state.emas[ema]["params"], state.emas[ema]["router_state"] or state.router_state


def abstract_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: Any
) -> tuple[TrainState, Any]:
    """Shapes without memory: TrainState of ShapeDtypeStructs, and the params' logical axes.

    The logical axes are a tree like `params` with a tuple of names (or None) per parameter.
    """
    variables = jax.eval_shape(partial(_init_variables, model), jax.random.key(0))
    axes = jax.tree.map(
        tuple,
        nn.get_partition_spec(variables["params"]),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    state = jax.eval_shape(partial(_initial_state, optimizer, config), nn.meta.unbox(variables))
    return state, axes


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Any,
    mesh: Mesh,
    seed: int,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """The state before step 0, each device making only its own part of every array.

    The values depend on the seed alone, not on the mesh.

    variables: {"params", "router_state"} to begin with instead, which are used up.
    """
    shapes, axes = abstract_state(model, optimizer, config)
    shardings = rules.state_shardings(mesh, config.parallel.preset, shapes, axes)

    if variables is not None:
        begin = partial(_initial_state, optimizer, config)
        return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(variables)

    @partial(jax.jit, out_shardings=shardings)
    def create(key: jax.Array) -> TrainState:
        variables = nn.meta.unbox(_init_variables(model, key))
        return _initial_state(optimizer, config, variables)

    with jax.set_mesh(mesh):
        return create(jax.random.key(seed))


def _init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Variables with their metadata; the inputs only give shapes, one sample per device."""
    batch, size = num_batch_shards(), model.image_size
    x = jnp.zeros((batch, size, size, model.channels))
    return model.init(key, x, jnp.zeros(batch), jnp.zeros(batch, jnp.int32), False)


def _initial_state(
    optimizer: optax.GradientTransformation, config: Any, variables: dict[str, Any]
) -> TrainState:
    params, router_state = variables["params"], variables.get("router_state", {})
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        router_state=router_state,
        emas=init_emas(params, router_state, config.ema),
        opt_state=optimizer.init(params),
    )
