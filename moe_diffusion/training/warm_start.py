"""`train --config.init_from=<folder>`: a run that begins with the weights of another.

The folder is a workdir or what `convert` wrote. Its weights are those that `sample` would use (the
first average, or the live ones). Step, optimizer and data begin anew; the averages begin at the
weights. What begins anew of a model that differs, `init.reset` says; see models/fitting.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.classes import NOTHING, Classes, of_run
from moe_diffusion.config.defaults import COMPUTATION
from moe_diffusion.errors import UserError
from moe_diffusion.models.fitting import Fit, fit, put_rows
from moe_diffusion.models.stack import Model, abstract_variables
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.training.checkpoint import StoredWeights, first_average
from moe_diffusion.training.run import Run, shardings

# May differ: how to compute and train, and (as long as all arrays fit) how tokens are routed.
_FREE = (*COMPUTATION, "model.param_dtype", "model.moe.", "model.router.")


def check(config: ConfigDict, model: Model) -> None:
    """Raises a UserError, which lists the differences, if config.init_from is of another model."""
    with _opened(config, abstract_variables(model)) as (_, found, changes):
        found.check(changes, _FREE, f"init_from = {config.init_from}")


def read(run: Run, known: Classes = NOTHING) -> dict[str, Any]:
    """{"params": ..., "router_state": ...} to begin with, after `check`; says what is kept.

    known: the classes of the data.
    """
    config, places = run.config, flatten_dict(shardings(run.variables), sep="/")
    with _opened(config, run.variables, known) as (stored, found, _):
        variables = stored.read({path: places[path] for path in found.kept})
        tables = stored.read(dict.fromkeys(found.rows))
    anew = [*found.new, *found.rows]
    variables |= run.initial(config.seed, anew) if anew else {}
    for path, (there, here) in found.rows.items():
        variables[path] = put_rows(variables[path], here, tables[path][there])
    if is_main_process():
        print(*found.told(), sep="\n", flush=True)
    tree, dtype = unflatten_dict(variables, sep="/"), config.model.param_dtype
    params = jax.tree.map(lambda x: x.astype(dtype), tree["params"])
    return {"router_state": {}} | tree | {"params": params}


@contextlib.contextmanager
def _opened(
    config: ConfigDict, variables: Any, known: Classes = NOTHING
) -> Iterator[tuple[StoredWeights, Fit, list[configs.Change]]]:
    """The weights of config.init_from, what becomes of them, and how its model's config differs."""
    path = epath.Path(config.init_from) / "config.json"
    if not path.exists():
        raise UserError(
            f"init_from = {config.init_from} is no workdir (it has no config.json): name a run's "
            "workdir, or a folder that convert wrote"
        )
    there, wanted = configs.load_json(path), flatten_dict(variables, sep="/")
    changes = [c for c in configs.differences(there, config) if c.key.startswith("model.")]
    with StoredWeights(config.init_from, ema=first_average(there)) as stored:
        names = of_run(config.init_from).names, known.names
        fits = fit(wanted, stored.misfits(wanted), changes, config.init.reset, names)
        yield stored, fits, changes
