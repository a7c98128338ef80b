"""The stages of Dense2MoE, one run of the training loop each (2510.09094, section 3.2, Figure 4).

    student/    the teacher's weights in the student's model
    shared/     (a) the shared experts alone, a pruned model
    experts/    (b) the whole mixture of experts; the shared ones are frozen
    groups1/    (c) a Mixture of Blocks in the blocks of the first kind that has groups
    groups2/    (c) and in those of the next kind

Each is a workdir: it can be sampled, judged and exported. A stage of 0 steps is left out. Each
begins with the weights of the one before it. A folder that has what it should is not made again, so
the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.checks import require
from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.config.defaults import COMPUTATION
from moe_diffusion.config.sizes import SIZES
from moe_diffusion.dense2moe import convert, importance
from moe_diffusion.dense2moe.blocks import numbers, ranges, standing_for
from moe_diffusion.dense2moe.losses import make_distillation_loss
from moe_diffusion.dense2moe.stage_configs import (
    GROUPS,
    SHARED,
    Stage,
    dense_of,
    has_experts,
    stages,
    ungrouped,
)
from moe_diffusion.empty_prompt import told
from moe_diffusion.models import build
from moe_diffusion.models.parts import compute_dtype
from moe_diffusion.models.stack import Model, abstract_weights, init_variables
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.parallel.mesh import num_batch_shards
from moe_diffusion.sampling.load import load_config, load_workdir
from moe_diffusion.training.checkpoint import Checkpointer, saved_steps
from moe_diffusion.training.loop import train
from moe_diffusion.training.run import (
    Run,
    on_every_device,
    prepare_run,
    shardings,
    tracing_for,
)
from moe_diffusion.training.state import TrainState

Tree = Any
STUDENT = "student"


def planned(config: ConfigDict, devices: Sequence[Any]) -> tuple[Run, Tree]:
    """The run of a stage on devices that need not exist, and shapes of the frozen teacher.

    config: of a stage (`Stage.config`); the teacher is `dense_of` it.
    """
    teacher = build(dense_of(config).model).clone(preset=config.parallel.preset)
    model = build(config.model, losses=sorted(config.loss_weights))
    kind = SHARED if config.model.mob.groups == ("none",) else GROUPS
    layers = features(kind, model, teacher, range(len(teacher.blocks())))
    weight = config.distill.feature_weight
    loss = make_distillation_loss(teacher, model, config, layers, weight)
    run = prepare_run(config, model, loss, devices)
    with tracing_for(run.mesh, config.parallel.preset):
        variables, axes = abstract_weights(teacher, num_batch_shards())
    dtype = config.distill.teacher_dtype
    dtype = jnp.dtype(config.model.dtype if dtype == "auto" else dtype)
    shapes = jax.tree.map(lambda x: x.update(dtype=dtype), variables["params"])
    places = rules.shardings_of(
        run.mesh, rules.PRESETS[config.parallel.preset].params, shapes, axes
    )
    frozen = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
    return run, {"params": frozen}


def teacher_overrides(config: ConfigDict) -> tuple[str, ...]:
    """How the teacher is built differently from its own config: for the student's images."""
    keys = (*SIZES, *(k for k in COMPUTATION if k.startswith("model.") and "moe" not in k))
    flat = flatten_dict(config.to_dict(), sep=".")
    return tuple(f"{key}={flat[key]}" for key in keys if key in flat)


def load_teacher(config: ConfigDict, run: Run) -> tuple[ConfigDict, Model, Tree]:
    """The teacher's config, its model and its params on the run's mesh, after `check`."""
    found, model, variables, _ = load_workdir(
        config.distill.teacher,
        teacher_overrides(config),
        mesh=run.mesh,
        preset=config.parallel.preset,
    )
    dtype = compute_dtype(config.distill.teacher_dtype)
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), donate_argnums=0)
    with run.on_mesh():
        return found, model, cast(variables["params"])


def check(config: ConfigDict) -> list[Stage]:
    """The stages; raises a UserError for what would fail later, before anything is computed."""
    configs.validate_devices(config, jax.devices())
    require(
        bool(config.distill.teacher),
        "distill.teacher names no folder: --config.distill.teacher=runs/flux_dev",
    )
    require(
        not has_experts(config) or config.model.router.name == "token_choice",
        f"model.router.name = {config.model.router.name} has no top_k = 0, which the stage of the "
        "shared experts needs: set model.router.name=token_choice",
    )
    convert.check(config, load_config(config.distill.teacher, teacher_overrides(config)))
    found = stages(config)
    require(
        bool(found),
        "distill has no stage with steps: set distill.shared.steps, distill.experts.steps or "
        "distill.groups.steps",
    )
    for stage in found:
        configs.validate(stage.config)
        prepare_run(stage.config)  # its patterns match something
    return found


# --- the way -------------------------------------------------------------------------------------


def distill(
    config: ConfigDict,
    workdir: str | os.PathLike,
    open_iterator: Callable[[], Any],
    *,
    hooks: Callable[[ConfigDict, Model, str], Sequence[Callable]] = lambda *_: (),
    known: Classes = NOTHING,
    allow_change: Sequence[str] = (),
    tell: Callable[[str], None] = print,
) -> str:
    """Runs all stages that are not done; returns the folder of the last.

    Args:
      config: with a section `distill`; see `check`, which is called first.
      open_iterator: makes a new iterator of training batches, see `training.loop.train`.
      hooks: (config of a stage, model, its workdir) -> hooks of `train`.
      known: the classes of the data.
      allow_change: keys that may differ from those that the distillation began with.
      tell: prints a line.
    """
    found, folder = check(config), epath.Path(workdir)
    _claim(config, folder, allow_change)
    run = prepare_run(ungrouped(config))
    described, teacher, params = load_teacher(config, run)
    taken = _student(config, described, teacher, params, run, folder, open_iterator)
    before = folder / STUDENT
    for stage in found:
        at, steps = folder / stage.name, saved_steps(folder / stage.name)
        tell(f"stage {stage.name}: {stage.config.train.num_steps:,} steps in {at}")
        if not steps or steps[-1] < stage.config.train.num_steps:
            values = stage.config.to_dict()
            values["distill"]["blocks"] = ranges(taken)
            start = load_config(at).init_from if steps else _start(stage.config, before, at)
            settled = configs.settle(values | {"init_from": os.fspath(start)})
            model = told(build(settled.model, losses=sorted(settled.loss_weights)), known.empty)
            layers = features(stage.kind, model, teacher, taken)
            weight = config.distill.feature_weight
            loss = make_distillation_loss(teacher, model, settled, layers, weight)
            options = {"hooks": hooks(settled, model, os.fspath(at)), "frozen": {"params": params}}
            options |= {"known": known, "allow_change": allow_change}
            state = train(settled, model, loss, open_iterator, os.fspath(at), **options)
            if int(state.step) < settled.train.num_steps:  # stopped by a signal
                return os.fspath(at)
        before = at
    return os.fspath(before)


def features(kind: str, model: Model, teacher: Model, taken: Sequence[int]) -> dict[int, int]:
    """Layer of the student -> layer of the teacher whose feature it shall have (Eq. 8).

    In the stage `groups` these are the groups alone (group feature loss, section 3.2).
    """
    targets = standing_for(model, taken, teacher)
    layers = range(len(targets))
    if kind == GROUPS:
        layers = sorted({block.layer for block in model.blocks() if block.share < 1})
    return {layer: targets[layer] for layer in layers}


def _claim(config: ConfigDict, folder: epath.Path, allow_change: Sequence[str]) -> None:
    """Writes the config of the whole distillation; it must be the one that began here."""
    path = folder / "config.json"
    if path.exists():
        configs.allowed_changes(configs.load_json(path), config, allow_change, folder)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        configs.save_json(config, path)


def _student(
    config: ConfigDict,
    described: ConfigDict,
    teacher: Model,
    params: Tree,
    run: Run,
    folder: epath.Path,
    open_iterator: Callable[[], Any],
) -> tuple[int, ...]:
    """Makes folder/student; returns the teacher's blocks that the student is made of.

    run: of the student's model without groups.
    """
    place, how = folder / STUDENT, config.distill
    if (place / "config.json").exists():
        return numbers(load_config(place).distill.blocks)
    scores, taylor = None, how.importance == "taylor" and config.model.router.name != "dense"
    if taylor or tuple(how.blocks) == ("lite",):
        path, mark = folder / importance.FILE, importance.fingerprint(described, how.teacher)
        scores = importance.load(path, mark) if path.exists() else importance.Importance(mark)
        with run.on_mesh(), contextlib.closing(open_iterator()) as iterator:
            plain = configs.settle(described.to_dict() | _drawn(config))
            scores = importance.measure(plain, teacher, params, iterator, scores, path)
    taken = convert.taken_blocks(config, teacher, run.model, scores and scores.changes)
    blocks = teacher.blocks()

    def units(number: int, name: str, size: int) -> np.ndarray:
        rated = scores.units[f"{blocks[number].path}/{name}"] if taylor else None
        own = None if rated is None else rated[blocks[number].index]
        return convert.order_of(own, size, config.seed + number)

    def make(params: Tree) -> Tree:
        return convert.make_student(config, teacher, run.model, params, _new(run), units, taken)

    with run.on_mesh():
        made = jax.jit(make, out_shardings=shardings(run.variables["params"]))(params)
    values = ungrouped(config).to_dict()
    values["distill"]["blocks"] = ranges(taken)
    save_weights(configs.settle(values), made, place, run.mesh)
    return taken


def _drawn(config: ConfigDict) -> dict[str, Any]:
    """What a run draws and how: sections that the importance of the teacher's units shares."""
    names = ("data", "diffusion", "distill", "seed")
    return {name: config.to_dict()[name] for name in names}


def _new(run: Run) -> Tree:
    """The params of a new model, for use inside jit, where those that are not used cost nothing."""
    key = jax.random.key(run.config.seed)
    return nn.meta.unbox(init_variables(run.model, key, num_batch_shards()))["params"]


def _start(config: ConfigDict, before: epath.Path, at: epath.Path) -> epath.Path:
    """The folder whose weights a stage begins with: the one before, or its blocks in groups."""
    if load_config(before).model.mob.groups == config.model.mob.groups:
        return before
    place = at / "start"
    if (place / "config.json").exists():
        return place
    run = prepare_run(config)
    preset = config.parallel.preset
    _, old, variables, _ = load_workdir(before, mesh=run.mesh, preset=preset)

    def make(params: Tree) -> Tree:
        return convert.regroup(old, run.model, params, _new(run))

    with run.on_mesh():
        places = shardings(run.variables["params"])
        params = jax.jit(make, out_shardings=places)(variables["params"])
    save_weights(config, params, place, run.mesh)
    return place


def save_weights(
    config: ConfigDict, params: Tree, folder: epath.Path, mesh: Mesh | None = None
) -> None:
    """Writes a folder like those of `convert`: weights without averages, and config.json last.

    mesh: where the params lie, if they are those of several processes.
    """
    values = config.to_dict()
    values["ema"]["decays"], values["init_from"] = (), ""
    values["checkpoint"]["asynchronous"] = False
    plain = configs.settle(values)
    if is_main_process() and folder.exists():
        folder.rmtree()  # what a killed process left; whole folders have a config.json
    _together(f"begin {folder.name}")
    with contextlib.closing(Checkpointer(folder, plain.checkpoint)) as checkpoints:
        step = jnp.zeros([], jnp.int32)
        step = step if mesh is None else on_every_device(mesh, step)
        checkpoints.save(0, TrainState(step, params, {}, {}, {}), {})
    if is_main_process():
        configs.save_json(plain, folder / "config.json")
    _together(f"end {folder.name}")


def _together(what: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
