"""TrainState: everything that a run carries from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import flax.struct
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion.errors import UserError

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
    emas = {d: e | {"params": merge(e["params"], untrained)} for d, e in state.emas.items()}
    return state.replace(params=merge(state.params, untrained), emas=emas)


def weights(state: TrainState, ema: str | None = None) -> tuple[Tree, Tree]:
    """(params, router_state) of the live model or of the average with decay `ema`, to sample with.

    Raises KeyError for a decay that the state does not keep.
    """
    if ema is None:
        return state.params, state.router_state
    return state.emas[ema]["params"], state.emas[ema]["router_state"] or state.router_state
