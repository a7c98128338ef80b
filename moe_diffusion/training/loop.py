"""The training loop, read from top to bottom. Every kind of training is this loop with its loss."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.conditions import check_fields, fields_of
from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.models.stack import Model
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.training import warm_start
from moe_diffusion.training.allocator import host_memory, return_freed_memory
from moe_diffusion.training.checkpoint import Checkpointer, is_started
from moe_diffusion.training.logging import MetricWriter, Progress
from moe_diffusion.training.run import Run, on_every_device, prepare_run
from moe_diffusion.training.state import TrainState, matches, merge, whole
from moe_diffusion.training.step import Frozen, Metrics, large_constants

Tree = Any
_LARGEST_CONSTANT = 100 << 20  # bytes; tables of positions are smaller
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
) -> TrainState:
    """Trains until step `config.train.num_steps`; called again on the same workdir, it resumes.

    Step n is a function of the state, batch n and fold_in(key(config.seed), n), so an interrupted
    run ends with the numbers of an undisturbed one. SIGTERM or SIGINT saves and returns early.

    Args:
      model: see `models.stack.Model`.
      loss_fn: see `step.make_train_step`.
      iterator_fn: makes this process's iterator over batches of numpy arrays [B, ...], where all
        processes' batches together are `data.batch_size` images; with `get_state() -> dict` (JSON,
        the same on every process), `set_state` and `close`; see `data.pipeline`.
      hooks: called as hook(step, state) every `train.sample_every` steps on every process; the
        state has the untrained parameters, too. A hook may return images for TensorBoard,
        name -> [H, W, C], and numbers for the metrics.
      frozen: arrays that loss_fn reads and nothing trains, like a teacher's weights. They are not
        saved. Those that lie on the run's mesh stay as they are; others go whole to every device.

    Returns:
      The last state; its `step` is less than `train.num_steps` if a signal stopped the run.

    Raises:
      UserError: before anything is written if config, workdir, devices or checkpoint do not fit;
        later if the loss is not finite (see `train.stop_on_nan`) or a checkpoint cannot be written.
    """
    _check(config, workdir)
    if config.init_from and not is_started(workdir):
        warm_start.check(config, model)
    _use_compile_cache(config.compile_cache)
    run = prepare_run(config, model, loss_fn)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(run.on_mesh())
        iterator = iterator_fn()
        stack.callback(iterator.close)
        checkpoints = Checkpointer(workdir, config.checkpoint)
        stack.callback(checkpoints.close)
        state, untrained = _restore_or_create(run, checkpoints, iterator)
        start, num_steps = int(state.step), config.train.num_steps
        progress = Progress(start, num_steps, config.data.batch_size)
        stack.callback(progress.close)
        if start >= num_steps:
            progress.write(f"already trained: {workdir} is at step {start} of {num_steps}")
            return state

        key, held = (
            jax.random.key(config.seed),
            Frozen(untrained, on_every_device(run.mesh, frozen)),
        )
        place = partial(_to_device, mesh=run.mesh, accumulate=config.optim.accumulate)
        first = next(iterator)
        _check_batch(model, first)
        batch, train_step = place(first), run.step()
        # A wrong loss fails here, before anything is written.
        _check_constants(train_step.trace(state, batch, key, held))
        writer = _open_workdir(config, workdir, start)
        checkpoints.save_untrained(untrained)
        stack.callback(writer.close)
        verb = "resuming after" if start else "starting at"
        progress.write(f"{verb} step {start} of {num_steps}")
        _tell_trainable(config, run, progress)
        monitor = Monitor(config.train, writer, progress, checkpoints)
        for step in range(start + 1, num_steps + 1):
            state, metrics = train_step(state, batch, key, held)
            monitor.follow(step, metrics)
            stopping = stop.requested(step)
            if step % config.checkpoint.every == 0 or step == num_steps or stopping:
                monitor.finish()  # raises before a state past a bad step is saved
                with progress.paused():
                    checkpoints.save(step, state, iterator.get_state())
            if stopping:
                checkpoints.wait()
                progress.write(stop.farewell(step, num_steps))
                break
            if config.train.sample_every and step % config.train.sample_every == 0:
                monitor.finish()
                with progress.paused():
                    for hook in hooks:
                        _write_outputs(writer, step, hook(step, whole(state, untrained)) or {})
            if step < num_steps:
                # After the checkpoint, which keeps the iterator where batch step + 1 begins.
                batch = place(next(iterator))
        return state


class Monitor:
    """Reports a step once the next is under way, so that the device never waits for the host."""

    def __init__(
        self,
        train_config: ConfigDict,
        writer: MetricWriter,
        progress: Progress,
        checkpoints: Checkpointer,
    ):
        self._config = train_config
        self._writer = writer
        self._progress = progress
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None

    def follow(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that has just been started and finishes the one before."""
        self.finish()
        self._pending = (step, metrics)

    def finish(self) -> None:
        """Waits for the step that is under way and reports it. Raises UserError if it failed."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        if not metrics["finite"]:
            self._complain(step, metrics)
        self._progress.update(step)
        if step % self._config.log_every == 0 or step == self._config.num_steps:
            values = jax.device_get({k: v for k, v in metrics.items() if k != "finite"})
            loss = float(values.pop("loss"))
            rate = self._progress.report(step, loss)
            self._writer.write_scalars(step, {"loss": loss, **values, "images_per_sec": rate})

    def _complain(self, step: int, metrics: Metrics) -> None:
        values = f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
        if not self._config.stop_on_nan:
            self._progress.write(f"step {step}: {values}; this step is skipped")
            return
        self._checkpoints.wait()
        raise UserError(
            f"training stopped at step {step}: {values}. Last good checkpoint: "
            f"{self._checkpoints.newest() or 'none yet'}. Resume with train.stop_on_nan=false to "
            "skip such steps, or start anew with a lower optim.learning_rate or optim.clip_norm=1"
        )


class StopSignal:
    """Turns SIGTERM and SIGINT into a question; a second signal ends the process as usual.

    With several processes only SIGTERM counts, and jax's preemption service, which listens to it,
    makes them stop at the same step, whichever of them is told.
    """

    name = "SIGTERM"

    def __enter__(self) -> StopSignal:
        self._received = False
        self._previous = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _: Any) -> None:
        self._received = True
        self.name = signal.Signals(number).name
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def farewell(self, step: int, num_steps: int) -> str:
        """What to tell the user once the state of `step` is saved."""
        return (
            f"stopped by {self.name} after step {step} of {num_steps}, which is saved; "
            "run the same command again to resume"
        )


def _check(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Raises a UserError for what would fail later; writes nothing."""
    configs.validate_devices(config, jax.device_count())
    folder = epath.Path(workdir)
    if (folder / "config.json").exists():
        differences = configs.compare(configs.load_json(folder / "config.json"), config)
        if differences:
            raise UserError(
                f"{workdir} belongs to a run with another config ({'; '.join(differences)}): "
                "choose another workdir, or set these back to resume"
            )
    if "://" not in os.fspath(workdir):
        check_writable(workdir)


def _tell_trainable(config: ConfigDict, run: Run, progress: Progress) -> None:
    """What each pattern of `optim.trainable` matches, where it leaves something out."""
    if not run.untrained:
        return
    leaves = flatten_dict(run.state.params, sep="/")
    for pattern, paths in matches(leaves, config.optim.trainable).items():
        count = sum(math.prod(leaves[path].shape) for path in paths)
        progress.write(f"trained: {pattern}: {len(paths)} arrays, {count:,} parameters")


def _check_memory(run: Run) -> None:
    """On CPU, where the kernel would kill the process without a word: does the state fit?"""
    memory = host_memory()
    if memory is None:
        return
    size = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((run.state, run.grads, run.untrained))
    )
    if size > memory / 3:
        return_freed_memory()
    if size + 1e9 > memory:
        raise UserError(
            f"parameters, gradients, moments and averages take {size / 1e9:.1f} GB, and the "
            f"machine has {memory / 1e9:.1f} GB: save with optim.mu_dtype=bfloat16, "
            "ema.decays=() or a smaller model"
        )


def _use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs: in `folder`, "" the default one, "off" nowhere."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder or jax.config.jax_compilation_cache_dir is None:
        default = Path.home() / ".cache" / "moe_diffusion" / "jax"
        jax.config.update("jax_compilation_cache_dir", folder or str(default))


def _restore_or_create(
    run: Run, checkpoints: Checkpointer, iterator: Any
) -> tuple[TrainState, Tree]:
    """The state of the newest checkpoint, with the iterator set to match, or a new one.

    And the untrained parameters, which are saved once.
    """
    _check_memory(run)
    if checkpoints.newest() is None:
        variables = None
        if run.config.init_from:
            shapes = {"params": merge(run.state.params, run.untrained)}
            shapes["router_state"] = run.state.router_state
            shardings = jax.tree.map(lambda x: x.sharding, shapes)
            variables = warm_start.read(run.config, shardings)
        return run.create(run.config.seed, variables)
    state, data_state = checkpoints.restore(run.state)
    iterator.set_state(data_state)
    return state, checkpoints.restore_untrained(run.untrained)


def _check_batch(model: Model, batch: Mapping[str, Any]) -> None:
    """Raises a UserError unless a batch [B, ...] has the fields that the model takes."""
    check_fields(fields_of(batch), model.cond_spec(), "the data")


def _check_constants(traced: Any) -> None:
    """Raises a UserError if a loss brought weights into the program other than as arguments."""
    for size, shape in large_constants(traced, _LARGEST_CONSTANT):
        raise UserError(
            f"the loss holds an array of shape {shape} ({size / 1e6:.0f} MB) as a constant of the "
            "program: hand it to train as frozen"
        )


def _open_workdir(config: ConfigDict, workdir: str | os.PathLike, start: int) -> MetricWriter:
    if is_main_process():
        configs.save_json(config, epath.Path(workdir) / "config.json")
    writer = MetricWriter(workdir, start)
    writer.write_hparams(config.to_dict())
    return writer


def _write_outputs(writer: MetricWriter, step: int, outputs: dict[str, Any]) -> None:
    """Of a hook: numbers and images."""
    numbers = {name: value for name, value in outputs.items() if np.ndim(value) == 0}
    if numbers:
        writer.write_scalars(step, numbers)
    writer.write_images(step, {k: v for k, v in outputs.items() if k not in numbers})


def _to_device(batch: Any, mesh: Mesh, accumulate: int) -> Any:
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
