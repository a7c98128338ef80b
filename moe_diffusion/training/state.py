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

from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model, abstract_inputs
from moe_diffusion.parallel.mesh import num_batch_shards
from moe_diffusion.training.optim import init_emas

Tree = Any


@flax.struct.dataclass
class TrainState:
    """A pytree of plain dicts and arrays.

    step: i32[], how many steps are done, which is also the number of the next (0, 1, ...).
    params: the parameters that are trained, see `split`.
    router_state: a collection of the model; {} where the routers keep no state.
    emas: decay as text -> {"params", "router_state"}, averages over what is trained.
    opt_state: the state of the optimizer.
    """

    step: jax.Array
    params: Any
    router_state: Any
    emas: dict[str, dict[str, Any]]
    opt_state: Any


def split(params: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """Splits parameters into (trained, untrained).

    Args:
      patterns: `optim.trainable`, like "layers_0/*/adaLN/*"; * stands for any text. A parameter is
        trained if one of the patterns matches its whole path.

    Raises:
      UserError: a pattern matches nothing.
    """
    leaves = flatten_dict(params, sep="/")
    matched = matches(leaves, patterns)
    for pattern, paths in matched.items():
        if not paths:
            raise UserError(
                f"optim.trainable = {pattern!r} matches no parameter: the model has "
                f"{', '.join(sorted({path.split('/')[0] for path in leaves}))}, and a path is like "
                f"{next(iter(leaves))}"
            )
    trained = {path: leaves[path] for paths in matched.values() for path in paths}
    rest = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return unflatten_dict(trained, sep="/"), unflatten_dict(rest, sep="/")


def matches(leaves: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> the paths that it matches."""
    return {p: [path for path in leaves if fnmatchcase(path, p)] for p in patterns}


def merge(trained: Tree, untrained: Tree) -> Tree:
    """Joins the two trees of `split` into the parameters of the model."""
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


def abstract_weights(model: Model) -> tuple[dict[str, Any], Tree]:
    """Shapes of params and router_state, and the logical axes of params; nothing is allocated.

    The axes are a tree like params with a PartitionSpec of names (or None) for every parameter.
    """
    variables = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    return nn.meta.unbox(variables), nn.get_partition_spec(variables["params"])


def init_variables(model: Model, key: jax.Array) -> dict[str, Any]:
    """New params and router_state (if there is one) with their metadata.

    The inputs of the model only give shapes: they have one sample for every device.
    """
    inputs = abstract_inputs(model, num_batch_shards())
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    variables = model.init(key, *zeros, False)
    return {name: variables[name] for name in ("params", "router_state") if name in variables}


def initial_state(
    optimizer: optax.GradientTransformation, config: Any, variables: dict[str, Any]
) -> tuple[TrainState, Tree]:
    """The state before step 0 of {"params", "router_state"}, and the untrained parameters."""
    router_state = variables.get("router_state", {})
    params, untrained = split(variables["params"], config.optim.trainable)
    emas = init_emas(params, router_state, config.ema)
    step = jnp.zeros([], jnp.int32)
    return TrainState(step, params, router_state, emas, optimizer.init(params)), untrained
