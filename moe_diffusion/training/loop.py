"""The training loop, read from top to bottom. Every kind of training is this loop with its loss."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_diffusion import caches, locks, time_buckets, trackers
from moe_diffusion import config as configs
from moe_diffusion.buckets import CompiledPerShape
from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.conditions import check_fields, fields_of
from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.kernels.cpu.heap import make_room
from moe_diffusion.models.accounting import training_flops
from moe_diffusion.models.stack import Model
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.profiling import Profiled
from moe_diffusion.progress import Progress
from moe_diffusion.signals import StopSignal
from moe_diffusion.training import warm_start
from moe_diffusion.training.checkpoint import Checkpointer, saved_steps
from moe_diffusion.training.logging import MetricWriter
from moe_diffusion.training.run import Run, on_every_device, prepare_run
from moe_diffusion.training.state import TrainState, matches, whole
from moe_diffusion.training.step import Frozen, Metrics, large_constants

Tree = Any
_LARGEST_CONSTANT = 100 << 20  # bytes; tables of positions are smaller
# (step, state with the untrained parameters, too) -> images for TensorBoard, name -> [H, W, C], and
# numbers for the metrics
Hook = Callable[[int, TrainState], "dict[str, np.ndarray | float] | None"]


def train(
    config: ConfigDict,
    model: Model,
    loss_fn: Callable,
    iterator_fn: Callable[[], Any],
    workdir: str | os.PathLike,
    *,
    hooks: Sequence[Hook] = (),
    frozen: Any = None,
    known: Classes = NOTHING,
    allow_change: Sequence[str] = (),
    flops: float | None = None,
) -> TrainState:
    """Trains until step `config.train.num_steps`; called again on the same workdir, it resumes.

    Step n is a function of the state, batch n and fold_in(key(config.seed), n), so an interrupted
    run ends with the numbers of an undisturbed one. SIGTERM or SIGINT saves and returns early.

    Args:
      model, loss_fn: see `models.stack.Model` and `step.make_train_step`.
      iterator_fn: makes this process's `BatchIterator`, see `data.pipeline.make_iterator`.
      hooks: see `Hook`; called on every process every `train.sample_every` steps.
      frozen: what loss_fn reads and nothing trains or saves; see `run.on_every_device`.
      known: the classes of the data, which the workdir's data.json keeps.
      allow_change: keys that may differ from the run that is resumed, see `config.changes`.
      flops: of an image in training, on average; None: of one of the model's `input_shape`.

    Returns:
      The last state; its `step` is less than `train.num_steps` if a signal stopped the run.

    Raises:
      UserError: before anything is written if config, workdir, devices or checkpoint do not fit or
        another run is at work; later if a loss is not finite (`train.stop_on_nan`) or a save fails.
    """
    changes = _check(config, model, workdir, allow_change)
    caches.keep_programs(config.compile_cache)
    run, flops = prepare_run(config, model, loss_fn), flops or training_flops(model)
    with locks.held(workdir, "training") as lock, contextlib.ExitStack() as stack:
        opened = partial(_open, stack)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(run.on_mesh())
        iterator = opened(iterator_fn())
        checkpoints = opened(Checkpointer(workdir, config.checkpoint))
        state, untrained = _restore_or_create(run, checkpoints, iterator, known)
        start, num_steps, size = int(state.step), config.train.num_steps, config.data.batch_size
        progress = opened(Progress(start, num_steps, size, workdir, flops))
        if start >= num_steps:
            progress.write(f"already trained: {workdir} is at step {start} of {num_steps}")
            return state
        key, first = jax.random.key(config.seed), next(iterator)
        check_fields(fields_of(first), model.cond_spec(), "the data")
        place = partial(to_device, mesh=run.mesh, accumulate=config.optim.accumulate)
        held = Frozen(untrained, on_every_device(run.mesh, frozen))
        batch, train_step = place(first), CompiledPerShape(run.step(), progress)
        traced = _checked(train_step.trace(state, batch, key, held))  # nothing is written yet
        writer = opened(_open_workdir(run, workdir, start, changes, known))
        checkpoints.save_untrained(untrained)
        _start(run, start, changes, traced, progress)
        train_step = opened(Profiled(train_step, start, config.profile, workdir))
        monitor = Monitor(config.train, writer, progress, checkpoints)
        for step in range(start + 1, num_steps + 1):
            state, metrics = train_step(state, batch, key, held)
            monitor.follow(step, metrics)
            stopping = stop.requested(step)
            if step % config.checkpoint.every == 0 or step == num_steps or stopping:
                monitor.finish()  # raises before a state past a bad step is saved
                lock.check()
                with progress.paused():
                    checkpoints.save(step, state, iterator.get_state())
            if stopping:
                checkpoints.wait()
                progress.write(stop.farewell(step, num_steps))
                break
            if config.train.sample_every and step % config.train.sample_every == 0:
                monitor.finish()
                monitor.call(hooks, step, whole(state, untrained))
            if step < num_steps:
                # After the checkpoint, which keeps the iterator where batch step + 1 begins.
                batch = place(progress.next_of(iterator))
        return state


@dataclass
class Monitor:
    """Reports a step once the next is under way, so that the device never waits for the host."""

    config: ConfigDict  # its section `train`
    writer: MetricWriter
    progress: Progress
    checkpoints: Checkpointer
    _pending: tuple[int, Metrics] | None = None

    def follow(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that has just been started and finishes the one before."""
        self.finish(later=metrics)
        self._pending = (step, metrics)

    def finish(self, later: Metrics | None = None) -> None:
        """Waits for the step that is under way and reports it. Raises UserError if it failed.

        later: the metrics of the step after it, which may have ended, too.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        if not metrics.pop("finite"):
            self._complain(step, metrics)
        ended = step + (later is not None and later["finite"].is_ready())
        self.progress.update(step, ended)
        if step % self.config.log_every == 0 or step == self.config.num_steps:
            values = time_buckets.spread(jax.device_get(metrics))
            self.writer.write_scalars(step, self.progress.report(step, values))

    def call(self, hooks: Sequence[Hook], step: int, state: TrainState) -> None:
        """Calls the hooks with the whole state after a step, which takes no time of training."""
        with self.progress.paused("sampling"):
            for hook in hooks:
                self.writer.write_outputs(step, hook(step, state) or {})

    def _complain(self, step: int, metrics: Metrics) -> None:
        values = f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
        if not self.config.stop_on_nan:
            self.progress.write(f"step {step}: {values}; this step is skipped")
            return
        self.checkpoints.wait()
        raise UserError(
            f"training stopped at step {step}: {values}. Last good checkpoint: "
            f"{self.checkpoints.newest() or 'none yet'}. Resume with train.stop_on_nan=false to "
            "skip such steps, or start anew with a lower optim.learning_rate or optim.clip_norm=1"
        )


def _check(
    config: ConfigDict, model: Model, workdir: str | os.PathLike, allow_change: Sequence[str]
) -> list[configs.Change]:
    """Raises a UserError for what would fail later; writes nothing. Returns what changes."""
    configs.validate_devices(config, jax.devices())
    path = epath.Path(workdir) / "config.json"
    before = configs.load_json(path) if path.exists() else config
    changes = configs.allowed_changes(before, config, allow_change, workdir)
    if "://" not in os.fspath(workdir):
        check_writable(workdir)
    if config.init_from and not saved_steps(workdir):
        warm_start.check(config, model)
    trackers.check(config.train.wandb)
    return changes


def _open(stack: contextlib.ExitStack, resource: Any) -> Any:
    return stack.enter_context(contextlib.closing(resource))


def _start(
    run: Run, start: int, changes: list[configs.Change], traced: Any, progress: Progress
) -> None:
    """Says where training begins, what changes and what `optim.trainable` matches; compiles."""
    verb = "resuming after" if start else "starting at"
    progress.write(f"{verb} step {start} of {run.config.train.num_steps}")
    for line in configs.consequences(changes):
        progress.write(line)
    leaves = flatten_dict(run.state.params, sep="/")
    patterns = run.config.optim.trainable if run.untrained else ()
    for pattern, paths in matches(leaves, patterns).items():
        count = sum(leaves[path].size for path in paths)
        progress.write(f"trained: {pattern}: {len(paths)} arrays, {count:,} parameters")
    with progress.compiling():
        traced.lower().compile()  # jax keeps it for the first call


def _restore_or_create(
    run: Run, checkpoints: Checkpointer, iterator: Any, known: Classes
) -> tuple[TrainState, Tree]:
    """The state of the newest checkpoint, with the iterator set to match, or a new one.

    Returns:
      The state and the untrained parameters.
    """
    arrays = jax.tree.leaves((run.state, run.grads, run.untrained))
    make_room(sum(x.size * x.dtype.itemsize for x in arrays))
    if checkpoints.newest() is None:
        variables = warm_start.read(run, known) if run.config.init_from else None
        return run.create(run.config.seed, variables)
    state, data_state = checkpoints.restore(run.state)
    iterator.set_state(data_state)
    return state, checkpoints.restore_untrained(run.untrained)


def _checked(traced: Any) -> Any:
    """The program; raises a UserError if a loss brought weights into it but as arguments."""
    for size, shape in large_constants(traced, _LARGEST_CONSTANT):
        raise UserError(
            f"the loss holds an array of shape {shape} ({size / 1e6:.0f} MB) as a constant of the "
            "program: hand it to train as frozen"
        )
    return traced


def _open_workdir(
    run: Run,
    workdir: str | os.PathLike,
    start: int,
    changes: list[configs.Change],
    known: Classes,
) -> MetricWriter:
    if is_main_process():
        configs.record_changes(workdir, start, changes)
        configs.save_json(run.config, epath.Path(workdir) / "config.json")
        known.save(workdir)
    writer = MetricWriter(workdir, start, run.config.train.wandb)
    writer.write_setup(run.config.to_dict(), run.variables["params"])
    return writer


def to_device(batch: Any, mesh: Mesh, accumulate: int) -> Any:
    """This process's part [b, ...] of a batch becomes its part of [B, ...] or [A, B / A, ...].

    Micro-batch i takes every A-th image from the i-th on, cut on the host: no array moves between
    devices, and the number of processes does not change which images are together.
    """
    sharding = rules.batch_sharding(mesh, accumulate > 1)

    def place(array: np.ndarray) -> jax.Array:
        if accumulate > 1:
            array = array.reshape(-1, accumulate, *array.shape[1:]).swapaxes(0, 1)
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(place, batch)
