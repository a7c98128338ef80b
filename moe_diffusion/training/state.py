"""TrainState: everything that a run carries from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model, abstract_inputs
from moe_diffusion.parallel.mesh import num_batch_shards
from moe_diffusion.training.optim import init_emas

Tree = Any


@flax.struct.dataclass
class TrainState:
    """A pytree of plain dicts and arrays.

    step: i32[], optimizer steps done, which is also the number of the next (0, 1, ...).
    params: the parameters that are trained, see `split`.
    router_state: a collection of the model; {} where the router keeps no state.
    emas: decay as text -> {"params", "router_state"}.
    opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    router_state: Any
    emas: dict[str, dict[str, Any]]
    opt_state: Any


def split(params: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """(trained, untrained): the parameters whose path one of the patterns matches, and the others.

    Args:
      patterns: `optim.trainable`, like "layers_0/*/adaLN/*"; * stands for any text.

    Raises:
      UserError: a pattern matches nothing.
    """
    leaves = flatten_dict(params, sep="/")
    trained: dict[str, Any] = {}
    for pattern, paths in matches(leaves, patterns).items():
        if not paths:
            raise UserError(
                f"optim.trainable = {pattern!r} matches no parameter: the model has "
                f"{', '.join(sorted({path.split('/')[0] for path in leaves}))}, and a path is like "
                f"{next(iter(leaves))}"
            )
        trained |= {path: leaves[path] for path in paths}
    rest = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(rest, sep="/")


def matches(leaves: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> the paths that it matches."""
    return {p: [path for path in leaves if fnmatchcase(path, p)] for p in patterns}


def merge(trained: Tree, untrained: Tree) -> Tree:
    """The whole parameters again, of which `split` made two trees."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(untrained))


def whole(state: TrainState, untrained: Tree) -> TrainState:
    """The state with the untrained parameters, too, in `params` and in every average."""
    if not untrained:
        return state
    emas = {
        decay: ema | {"params": merge(ema["params"], untrained)}
        for decay, ema in state.emas.items()
    }
    return state.replace(params=merge(state.params, untrained), emas=emas)


def weights(state: TrainState, ema: str | None = None) -> tuple[Tree, Tree]:
    """(params, router_state) of the live model or of the average with decay `ema`, to sample with.

    Raises KeyError for a decay that the state does not keep.
    """
    if ema is None:
        return state.params, state.router_state
    return state.emas[ema]["params"], state.emas[ema]["router_state"] or state.router_state


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, config: Any
) -> tuple[TrainState, Tree, Tree]:
    """Shapes without memory, trees of ShapeDtypeStructs.

    Returns:
      The state; the untrained parameters; and the logical axes of all parameters, a tree like them
      with a tuple of names (or None) per parameter.
    """
    variables, axes = abstract_weights(model)
    return *jax.eval_shape(partial(initial_state, optimizer, config), variables), axes


def abstract_weights(model: Model) -> tuple[dict[str, Any], Tree]:
    """Shapes of params and router_state, and the logical axes of params; nothing is allocated."""
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    variables = {name: shapes[name] for name in ("params", "router_state") if name in shapes}
    axes = jax.tree.map(
        tuple,
        nn.get_partition_spec(variables["params"]),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    return nn.meta.unbox(variables), axes


def init_variables(model: Model, key: jax.Array) -> dict[str, Any]:
    """Variables with their metadata; the inputs only give shapes, one sample per device."""
    inputs = abstract_inputs(model, num_batch_shards())
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    return model.init(key, *zeros, False)


def initial_state(
    optimizer: optax.GradientTransformation, config: Any, variables: dict[str, Any]
) -> tuple[TrainState, Tree]:
    """The state before step 0 of {"params", "router_state"}, and the untrained parameters."""
    router_state = variables.get("router_state", {})
    params, untrained = split(variables["params"], config.optim.trainable)
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        router_state=router_state,
        emas=init_emas(params, router_state, config.ema),
        opt_state=optimizer.init(params),
    )
    return state, untrained
