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
_FREE = ("dtype", "residual_dtype", "param_dtype", "remat", "unroll", "attention")
_FREE += ("jit.dropout", "moe.", "router.")


def check(config: ConfigDict, model: Model) -> None:
    """Checks that config.init_from is of the same model; reads no weights.

    Raises:
      UserError: it is of another model; the message lists the differences.
    """
    there = _config(config)
    with StoredWeights(config.init_from, ema=first_average(there)) as stored:
        misfits = stored.misfits(flatten_dict(abstract_variables(model), sep="/"))
    arrays = [f"{name}: {found} there, {ours} here" for name, (found, ours) in misfits.items()]
    ours, theirs = (flatten_dict(c.model.to_dict(), sep=".") for c in (config, there))
    differences = [
        f"model.{key}: {theirs.get(key)} there, {ours[key]} here"
        for key in sorted(ours)
        if ours[key] != theirs.get(key) and (arrays or not key.startswith(_FREE))
    ] + arrays
    if differences:
        more = len(differences) - _LISTED
        raise UserError(
            f"init_from = {config.init_from} is another model: {'; '.join(differences[:_LISTED])}"
            f"{f'; ... ({more} more)' if more > 0 else ''}: use its model, or another folder"
        )


def read(config: ConfigDict, shardings: Any) -> dict[str, Any]:
    """Reads {"params": ..., "router_state": ...} of config.init_from, after `check`.

    shardings: trees of the same structure.
    """
    with StoredWeights(config.init_from, ema=first_average(_config(config))) as stored:
        tree = stored.read_tree(flatten_dict(shardings, sep="/"))
    dtype = config.model.param_dtype
    return tree | {"params": jax.tree.map(lambda x: x.astype(dtype), tree["params"])}


def _config(config: ConfigDict) -> ConfigDict:
    """Of the run, or of the conversion, that config.init_from names."""
    path = epath.Path(config.init_from) / "config.json"
    if not path.exists():
        raise UserError(
            f"init_from = {config.init_from} is no workdir (it has no config.json): name a run's "
            "workdir, or a folder that convert wrote"
        )
    return configs.load_json(path)
