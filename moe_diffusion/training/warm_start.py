"""`train --config.init_from=<folder>`: a run that begins with the weights of another.

The folder is a workdir or what `convert` wrote. Its weights are those that `sample` would use (the
first average, or the live ones). Step, optimizer and data begin anew; the averages begin at the
weights.
"""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model, abstract_variables
from moe_diffusion.training.checkpoint import StoredWeights, first_average

_LISTED = 10
# May differ: how to compute and train, and (as long as all arrays fit) how tokens are routed.
_FREE = ("dtype", "param_dtype", "remat", "unroll", "attention", "jit.dropout", "moe.", "router.")


def check(config: ConfigDict, model: Model) -> None:
    """Raises a UserError listing what makes config.init_from another model; reads no weights."""
    there = _config(config)
    with _open(config, there) as stored:
        wanted = flatten_dict(abstract_variables(model), sep="/")
        found = stored.shapes
    # What a router keeps beside the weights is not needed by one that keeps nothing.
    names = wanted.keys() | {name for name in found if name.startswith("params/")}
    differences = [
        f"{name}: {_shape(found, name)} there, {_shape(wanted, name)} here"
        for name in sorted(names)
        if _shape(found, name) != _shape(wanted, name)
    ]
    ours, theirs = _leaves(config.model), _leaves(there.model)
    keys = sorted(key for key in ours if ours[key] != theirs.get(key))
    if not differences:
        keys = [key for key in keys if not key.startswith(_FREE)]
    differences = [
        f"model.{key}: {theirs.get(key)} there, {ours[key]} here" for key in keys
    ] + differences
    if differences:
        more = len(differences) - _LISTED
        raise UserError(
            f"init_from = {config.init_from} is another model: {'; '.join(differences[:_LISTED])}"
            f"{f'; ... ({more} more)' if more > 0 else ''}: use its model, or another folder"
        )


def read(config: ConfigDict, shardings: Any) -> dict[str, Any]:
    """{"params": ..., "router_state": ...} of config.init_from, after `check`.

    shardings: of these trees.
    """
    with _open(config, _config(config)) as stored:
        tree = stored.read_tree(flatten_dict(shardings, sep="/"))
    dtype = config.model.param_dtype
    return tree | {"params": jax.tree.map(lambda x: x.astype(dtype), tree["params"])}


def _config(config: ConfigDict) -> ConfigDict:
    path = epath.Path(config.init_from) / "config.json"
    if not path.exists():
        raise UserError(
            f"init_from = {config.init_from} is no workdir (it has no config.json): name a run's "
            "workdir, or a folder that convert wrote"
        )
    return configs.load_json(path)


def _open(config: ConfigDict, there: ConfigDict) -> StoredWeights:
    return StoredWeights(config.init_from, ema=first_average(there))


def _leaves(section: ConfigDict) -> dict[str, Any]:
    return flatten_dict(section.to_dict(), sep=".")


def _shape(arrays: Any, name: str) -> Any:
    return arrays[name].shape if name in arrays else "absent"
