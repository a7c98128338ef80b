"""Checkpoints of a run: `workdir/checkpoints/<step>/{state,data}`, and `workdir/untrained`.

`state` is the TrainState (orbax, every process writes its own shards), `data` the state of the data
iterator (JSON). `untrained` has the parameters that `optim.trainable` leaves out, once for all
steps. A checkpoint is written under a temporary name and renamed when it is whole, so
what a killed process leaves behind is never taken for a checkpoint.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from moe_diffusion.errors import UserError
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.training.state import TrainState

_UNFINISHED = "*.orbax-checkpoint-tmp*"


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    keep_last of the newest are kept, and for ever those whose step is a multiple of keep_every
    (0 = none). With asynchronous, `save` returns once the state is copied to host memory.
    """

    def __init__(self, workdir: str | os.PathLike, checkpoint_config: Any):
        self.folder = _folder(workdir)
        self._untrained = _untrained_folder(workdir)
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            for leftover in self.folder.glob(_UNFINISHED):
                leftover.rmtree()
        keep = [checkpoint_managers.LatestN(checkpoint_config.keep_last)]
        if checkpoint_config.keep_every:
            keep.append(checkpoint_managers.EveryNSteps(checkpoint_config.keep_every))
        self._manager = _open(
            self.folder,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            enable_async_checkpointing=checkpoint_config.asynchronous,
        )

    def newest(self) -> epath.Path | None:
        """Folder of the newest checkpoint, also while it is being written; None without one."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any]) -> None:
        """Saves, unless a checkpoint of this step exists. Raises UserError if writing fails."""
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(dict(data_state))
        )
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from error

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint: the state and the data iterator's state.

        Args:
          target: TrainState of ShapeDtypeStructs with shardings.

        Raises:
          UserError: the checkpoint is damaged or belongs to another model. Nothing is deleted.
        """
        step = self._manager.latest_step()
        args = ocp.args.Composite(state=_restore_args(target), data=ocp.args.JsonRestore())

        def read() -> tuple[TrainState, dict[str, Any]]:
            items = self._manager.restore(step, args=args)
            if int(items.state.step) != step or not isinstance(items.data, dict):
                raise ValueError("its content is that of another step")
            return items.state, items.data

        return _read(read, self.folder / str(step), self._manager.all_steps())

    def save_untrained(self, untrained: Any) -> None:
        """Saves the parameters that are not trained, if there are any and no run did it before."""
        if not untrained or self._untrained.exists():
            return
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(self._untrained, args=ocp.args.PyTreeSave(untrained))
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from error

    def restore_untrained(self, target: Any) -> Any:
        """What `save_untrained` saved. Raises UserError if it is damaged or of another model."""
        if not target:
            return {}

        def read() -> Any:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self._untrained, args=_restore_args(target))

        return _read(read, self._untrained)

    def wait(self) -> None:
        """Waits until what was saved is whole on disk. Raises UserError if writing failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Waits as `wait` does and ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _cannot_write(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(
            f"a checkpoint could not be written to {self.folder} ({reason}): make room or mend the "
            "access, then run the same command again to resume"
        )


def first_average(config: Any) -> str | None:
    """The average that is used where none is named: the run's first; None for the live weights."""
    return str(config.ema.decays[0]) if config.ema.decays else None


def is_started(workdir: str | os.PathLike) -> bool:
    """Whether a run with this workdir would resume."""
    return any(path.name.isdigit() for path in _folder(workdir).glob("*"))


class StoredWeights:
    """The weights of one checkpoint of a workdir, none of them read yet.

    Attributes:
      step: of the checkpoint.
      shapes: "params/..." or "router_state/..." -> jax.ShapeDtypeStruct.
    """

    def __init__(self, workdir: str | os.PathLike, step: int | None = None, ema: str | None = None):
        """Opens a checkpoint of a workdir.

        Args:
          step: None takes the newest.
          ema: decay of an average as text ("0.9999"); None takes the live weights.

        Raises:
          UserError: there is no such checkpoint or average, or the checkpoint is damaged.
        """
        folder = _folder(workdir)
        if not folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoints: train into it first, or name another")
        self._steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
        if not self._steps or (step is not None and step not in self._steps):
            raise UserError(
                f"{folder} has no checkpoint{'' if step is None else f' of step {step}'};"
                f" it has: {', '.join(map(str, self._steps)) or 'none'}"
            )
        self.step = self._steps[-1] if step is None else step
        self._folder, self._handler = folder / str(self.step), ocp.PyTreeCheckpointHandler()
        stored = self._metadata(self._folder / "state")
        places = {k: (self._folder / "state", place) for k, place in _places(stored, ema).items()}
        arrays, untrained = {place: flatten_dict(stored)[place] for _, place in places.values()}, {}
        folder = _untrained_folder(workdir)
        if folder.exists():
            untrained = flatten_dict(self._metadata(folder))
            places |= {"/".join(("params", *place)): (folder, place) for place in untrained}
        self._places = places
        self.shapes = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype)
            for name, (_, place) in places.items()
            for array in [(arrays | untrained)[place]]
        }

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handler.close()

    def read(self, shardings: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
        """The arrays that are named, on the devices of their sharding; None gives numpy arrays."""
        return {
            name: array
            for folder in {self._places[name][0] for name in shardings}
            for name, array in self._read_from(
                folder, {k: v for k, v in shardings.items() if self._places[k][0] == folder}
            ).items()
        }

    def _read_from(self, folder: epath.Path, shardings: Mapping[str, Any]) -> dict[str, Any]:
        target, restore_args = {}, {}
        for name, sharding in shardings.items():
            shape, place = self.shapes[name], self._places[name][1]
            target[place] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            restore_args[place] = (
                ocp.RestoreArgs(restore_type=np.ndarray)
                if sharding is None
                else ocp.checkpoint_utils.construct_restore_args(target[place])
            )
        args = ocp.args.PyTreeRestore(
            item=unflatten_dict(target),
            restore_args=unflatten_dict(restore_args),
            partial_restore=True,
        )
        arrays = flatten_dict(self._read(lambda: self._handler.restore(folder, args=args)))
        return {name: arrays[self._places[name][1]] for name in shardings}

    def read_tree(self, shardings: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
        """As `read`, but as {"params": ..., "router_state": ...}."""
        return {"router_state": {}} | unflatten_dict(self.read(shardings), sep="/")

    def read_blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(i, array[i : i + n]) along the first axis of an array, which is never whole in memory.

        n is what a chunk on disk holds, so that none is read twice.
        """
        folder, place = self._places[name]
        files: Any = {"driver": "file", "path": f"{folder}/"}
        if "://" in os.fspath(folder):
            files = f"{folder}/"
        path = ".".join(place) + "/"
        if (folder / "manifest.ocdbt").exists():
            files = {"driver": "ocdbt", "base": files, "path": path}
        elif isinstance(files, str):
            files += path
        else:
            files["path"] += path

        def start() -> tensorstore.TensorStore:
            return tensorstore.open({"driver": "zarr", "kvstore": files}, open=True).result()

        store = self._read(start)
        size = store.chunk_layout.read_chunk.shape[0]
        for i in range(0, store.shape[0], size):
            yield i, self._read(store[i : min(i + size, store.shape[0])].read().result)

    def _metadata(self, folder: epath.Path) -> dict[str, Any]:
        return self._read(lambda: dict(self._handler.metadata(folder).tree))

    def _read(self, read: Callable[[], Any]) -> Any:
        return _read(read, self._folder, self._steps)


def _places(stored: Mapping[str, Any], ema: str | None) -> dict[str, tuple[str, ...]]:
    """Name of every weight ("params/...") -> where it lies in a stored TrainState."""
    root: dict[str, tuple[str, ...]] = {"params": ("params",), "router_state": ("router_state",)}
    if ema is not None:
        if ema not in stored["emas"]:
            raise UserError(
                f"the run keeps no average of decay {ema}; it keeps: "
                f"{', '.join(stored['emas']) or 'none'}"
            )
        root["params"] = ("emas", ema, "params")
        if stored["emas"][ema]["router_state"]:  # {}: left to the live one
            root["router_state"] = ("emas", ema, "router_state")
    return {
        "/".join((name, *place[len(prefix) :])): place
        for name, prefix in root.items()
        for place in flatten_dict(dict(stored))
        if place[: len(prefix)] == prefix
    }


def _folder(workdir: str | os.PathLike, name: str = "checkpoints") -> epath.Path:
    remote = "://" in os.fspath(workdir)
    return epath.Path(workdir if remote else os.path.abspath(workdir)) / name


def _untrained_folder(workdir: str | os.PathLike) -> epath.Path:
    return _folder(workdir, "untrained")


def _open(folder: epath.Path, **options: Any) -> ocp.CheckpointManager:
    # Beside the error that orbax raises, asyncio logs one for every array.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return ocp.CheckpointManager(
        folder,
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(create=False, save_root_metadata=False, **options),
    )


def _restore_args(target: Any, **options: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=restore_args, **options)


def _read(read: Callable[[], Any], folder: epath.Path, steps: Sequence[int] = ()) -> Any:
    """read(), or a UserError about the folder, whatever a damaged file makes orbax raise.

    steps: of all checkpoints, where the folder is that of one.

    When one array cannot be read, orbax drops the reads of all others, and each prints a traceback
    when it ends or is collected. That is silenced, also after a failure, which ends the program
    anyhow; and the error has no cause, which would keep them alive until the program exits.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    reason = ""
    try:
        return read()
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    finally:
        if not reason:
            sys.unraisablehook = hook
    gc.collect()
    older = [step for step in steps if step < int(folder.name)]
    fallback = f"step {max(older)}" if older else "a fresh start"
    raise UserError(
        f"checkpoint {folder} is damaged or of another model ({reason}): use the code and config "
        f"that wrote it, or delete that folder to fall back on {fallback}"
    )
