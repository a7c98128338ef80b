"""The model and the weights of a trained run, on one device or spread over a mesh."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion import digests
from moe_diffusion.empty_prompt import of_run, told
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.stack import Model, abstract_weights
from moe_diffusion.parallel import rules
from moe_diffusion.training.checkpoint import StoredWeights, first_average
from moe_diffusion.training.state import TrainState, weights

CONFIG = "config.json"
Shapes = Mapping[str, jax.ShapeDtypeStruct]


def load_config(workdir: str | os.PathLike, overrides: tuple[str, ...] = ()) -> ConfigDict:
    """The config of a run, with changes; see `config.load_json`. Raises UserError without one."""
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f"{workdir} is not a workdir (it has no {CONFIG}): train into it first")
    return configs.load_json(path, overrides)


def load_workdir(
    workdir: str | os.PathLike,
    overrides: tuple[str, ...] = (),
    *,
    step: int | None = None,
    ema: str | None = None,
    mesh: Mesh | None = None,
    preset: str | None = None,
    before: Callable[[ConfigDict, Model], None] | None = None,
) -> tuple[ConfigDict, Model, dict[str, Any], dict[str, Any]]:
    """Loads a trained run: config, model, variables, and a note {"step", "ema"} on the variables.

    Args:
      overrides: changes to the run's config, see `config.load`.
      step: of the checkpoint; None takes the newest.
      ema: decay of an average as text. None takes the first that the run keeps, "none" takes the
        live weights.
      mesh: each of its devices reads its own part of every array, so no device and no host needs
        room for the whole model. Set this mesh (`jax.set_mesh`) to apply the model. Without a mesh
        the first device of this process reads everything.
      preset: how the weights lie on the mesh, see `parallel/rules.py`. None takes the run's
        `parallel.preset`.
      before: is called when all has been checked and before any weights are read, for what needs
        the devices first and leaves them free, as text encoders do.

    Raises:
      UserError: a file is missing, damaged or of another model. This is known before any weights
        are read.
    """
    config = load_config(workdir, overrides)
    if ema is None:
        ema = first_average(config) or "none"
    model = told(build(config.model), of_run(workdir))
    if mesh is not None:
        model = model.clone(preset=preset or config.parallel.preset)
    variables, axes = abstract_weights(model)
    with StoredWeights(workdir, step, None if ema == "none" else ema) as stored:
        misfits = stored.misfits(flatten_dict(variables, sep="/"))
        if misfits:
            name, (found, wanted) = next(iter(misfits.items()))
            described = epath.Path(workdir) / CONFIG
            raise UserError(
                f"the checkpoint is of another model than {described} and --config describe; "
                f"{len(misfits)} arrays differ: {name} is {found}, should be {wanted}: use the "
                "config that it was trained with"
            )
        if before:
            before(config, model)
        loaded = stored.read_tree(_shardings(stored.shapes, axes, mesh, model.preset))
        return config, model, loaded, {"step": stored.step, "ema": ema}


def rebuilt(model: Model, config: ConfigDict) -> Model:
    """The model of another config, with the empty prompt and the layout of `model`."""
    return told(build(config.model), getattr(model, "empty", None)).clone(preset=model.preset)


def weights_digest(workdir: str | os.PathLike, step: int) -> str:
    """SHA-256 of what a checkpoint says of its files; "" of one that says nothing."""
    path = epath.Path(workdir) / "checkpoints" / str(step) / "state" / digests.NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def averaged_variables(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """The variables that a hook samples with: the first average, or else the live weights."""
    params, router_state = weights(state, first_average(config))
    return {"params": params, "router_state": router_state}


def _shardings(
    shapes: Shapes, axes: Any, mesh: Mesh | None, preset: str | None
) -> dict[str, Sharding]:
    """Path of every array -> where it goes."""
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    params = rules.PRESETS[preset].params
    tree = unflatten_dict(dict(shapes), sep="/")
    placed = rules.shardings_of(mesh, params, tree, axes)
    return flatten_dict(placed, sep="/")
