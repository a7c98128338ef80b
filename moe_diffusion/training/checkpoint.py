"""Checkpoints of a run: `workdir/checkpoints/<step>/{state,data}`, and `workdir/untrained`.

`state` is the TrainState (orbax, every process writes its own shards), `data` the state of the data
iterator (JSON). `untrained` has the parameters that `optim.trainable` leaves out, once for all
steps. Each is written under a temporary name and renamed when it is whole, so that nobody takes
what a killed process leaves behind for a checkpoint. Each holds the digests of its files, which are
compared before the files are read.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from moe_diffusion import digests
from moe_diffusion.errors import UserError
from moe_diffusion.handlers import json_handler, tree_handler
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.training.state import TrainState

_UNFINISHED = "*.orbax-checkpoint-tmp*"
_Place = tuple[str, ...]  # of an array in a stored tree


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    The newest `keep_last` are kept, and for ever those whose step is a multiple of `keep_every`
    (0 = none). With `asynchronous`, `save` returns once the state is copied to host memory.
    """

    def __init__(self, workdir: str | os.PathLike, checkpoint_config: Any):
        self.folder, self._untrained = _folder(workdir), _folder(workdir, "untrained")
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            leftovers = [*self.folder.glob(_UNFINISHED), *self.folder.parent.glob(_UNFINISHED)]
            for leftover in leftovers:
                leftover.rmtree()
        keep = [checkpoint_managers.LatestN(checkpoint_config.keep_last)]
        if checkpoint_config.keep_every:
            keep.append(checkpoint_managers.EveryNSteps(checkpoint_config.keep_every))
        options = ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            enable_async_checkpointing=checkpoint_config.asynchronous,
            # Otherwise threads wait minutes for a folder that could not be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {"state": tree_handler(), "data": json_handler()}
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def newest(self) -> epath.Path | None:
        """Folder of the newest checkpoint, also while it is being written; None without one."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any]) -> None:
        """Saves, unless a checkpoint of this step exists. Raises UserError if writing fails."""
        if step == self._manager.latest_step():
            return
        state, data = ocp.args.PyTreeSave(state), ocp.args.JsonSave(dict(data_state))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(state=state, data=data))

    def restore(self, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint: the state and the data iterator's state.

        Args:
          target: TrainState of ShapeDtypeStructs with shardings.

        Raises:
          UserError: the checkpoint is damaged or belongs to another model. Nothing is deleted.
        """
        step = self._manager.latest_step()
        folder = self.folder / str(step)
        args = ocp.args.Composite(state=_restore_args(target), data=ocp.args.JsonRestore())

        def read() -> tuple[TrainState, dict[str, Any]]:
            items = self._manager.restore(step, args=args)
            if int(items.state.step) != step or not isinstance(items.data, dict):
                raise ValueError("its content is that of another step")
            return items.state, items.data

        check = partial(digests.check, folder / "state", folder / "data")
        return _read(check, read, folder, self._manager.all_steps())

    def save_untrained(self, untrained: Any) -> None:
        """Saves the parameters that are not trained, before the first checkpoint of a run.

        It replaces those of an earlier start without a checkpoint, which may have begun elsewhere.
        """
        if not untrained or self.newest():
            return
        with self._writing(), ocp.Checkpointer(tree_handler()) as checkpointer:
            checkpointer.save(self._untrained, args=ocp.args.PyTreeSave(untrained), force=True)

    def restore_untrained(self, target: Any) -> Any:
        """Reads what `save_untrained` saved; raises UserError if it is damaged or does not fit."""
        if not target:
            return {}
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            check = partial(digests.check, self._untrained)
            read = partial(checkpointer.restore, self._untrained, args=_restore_args(target))
            return _read(check, read, self._untrained)

    def wait(self) -> None:
        """Waits until what was saved is whole on disk. Raises UserError if writing failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does and ends the threads."""
        with contextlib.closing(self._manager):
            self.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({_in_short(error)}): make "
                "room or mend the access, then run the same command again to resume"
            ) from error


def first_average(config: Any) -> str | None:
    """The average that is used where none is named: the run's first; None for the live weights."""
    return str(config.ema.decays[0]) if config.ema.decays else None


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of a run's whole checkpoints, ascending; what is being written is none of them."""
    found = [path for path in _folder(workdir).glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(int(path.name) for path in found)


class StoredWeights(contextlib.AbstractContextManager):
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
        folder, untrained = _folder(workdir), _folder(workdir, "untrained")
        if not folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoints: train into it first, or name another")
        self._steps = sorted(ocp.utils.checkpoint_steps(folder))
        if not self._steps or (step is not None and step not in self._steps):
            raise UserError(
                f"{folder} has no checkpoint{'' if step is None else f' of step {step}'};"
                f" it has: {', '.join(map(str, self._steps)) or 'none'}"
            )
        self.step = self._steps[-1] if step is None else step
        self._handler, self._check = tree_handler(), cache(digests.check)
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._places: dict[str, tuple[epath.Path, _Place]] = {}
        self._find(folder / str(self.step) / "state", partial(_roots, ema))
        if untrained.exists():
            self._find(untrained, lambda _: {"params": ()})

    def _find(
        self, folder: epath.Path, roots: Callable[[Mapping[str, Any]], dict[str, _Place]]
    ) -> None:
        """Notes every array of a stored tree that lies below one of its roots."""
        read = lambda: dict(self._handler.metadata(folder).tree)  # noqa: E731
        stored = self._read(folder, read, digests.SMALL)
        for name, root in roots(stored).items():
            for place, array in flatten_dict(stored).items():
                if place[: len(root)] == root:
                    path = "/".join((name, *place[len(root) :]))
                    self._places[path] = folder, place
                    self.shapes[path] = jax.ShapeDtypeStruct(array.shape, array.dtype)

    def __exit__(self, *_: Any) -> None:
        self._handler.close()

    def misfits(self, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Path -> (shape here, shape wanted or "absent") of every array that is not as wanted.

        The checkpoint may hold the state of a router which the model's router does not keep.

        wanted: path -> an array of the model's variables, or its ShapeDtypeStruct.
        """
        names = wanted.keys() | {name for name in self.shapes if name.startswith("params/")}

        def shape(arrays: Mapping[str, Any], name: str) -> Any:
            return tuple(arrays[name].shape) if name in arrays else "absent"

        pairs = {name: (shape(self.shapes, name), shape(wanted, name)) for name in sorted(names)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def read(self, shardings: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
        """Reads the arrays that are named onto the devices of their sharding.

        None as sharding gives a numpy array.
        """
        found: dict[str, Any] = {}
        for folder in sorted({self._places[name][0] for name in shardings}):
            names = {self._places[n][1]: n for n in shardings if self._places[n][0] == folder}
            target = {p: self.shapes[n].update(sharding=shardings[n]) for p, n in names.items()}
            args = _restore_args(unflatten_dict(target), partial_restore=True)
            arrays = self._read(folder, partial(self._handler.restore, folder, args=args))
            found |= {names[place]: array for place, array in flatten_dict(arrays).items()}
        return found

    def read_tree(self, shardings: Mapping[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
        """Reads as `read` does; returns {"params": ..., "router_state": ...}."""
        return {"router_state": {}} | unflatten_dict(self.read(shardings), sep="/")

    def read_blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Reads an array that is never whole in memory: yields (i, array[i : i + n]).

        n is what a chunk on disk holds of the first axis, so that no chunk is read twice.
        """
        folder, place = self._places[name]
        files: Any = f"{folder}/"
        if "://" not in files:
            files = {"driver": "file", "path": files}
        if (folder / "manifest.ocdbt").exists():
            files = {"driver": "ocdbt", "base": files}
        spec = {"driver": "zarr", "kvstore": files, "path": ".".join(place)}
        store = self._read(folder, lambda: tensorstore.open(spec, open=True).result())
        size = store.chunk_layout.read_chunk.shape[0]
        for i in range(0, store.shape[0], size):
            yield i, self._read(folder, store[i : min(i + size, store.shape[0])].read().result)

    def _read(self, folder: epath.Path, read: Callable[[], Any], largest: int | None = None) -> Any:
        """read(), after the files of at most `largest` bytes were found whole, once each."""
        check = partial(self._check, folder, largest=largest)
        return _read(check, read, folder.parent if folder.name == "state" else folder, self._steps)


def _roots(ema: str | None, stored: Mapping[str, Any]) -> dict[str, _Place]:
    """Where "params" and "router_state" lie in a stored TrainState."""
    roots = {"params": ("params",), "router_state": ("router_state",)}
    if ema is None:
        return roots
    if ema not in stored["emas"]:
        raise UserError(
            f"the run keeps no average of decay {ema}; it keeps: "
            f"{', '.join(stored['emas']) or 'none'}"
        )
    # An average without a router state of its own ({}) takes the live one.
    return roots | {name: ("emas", ema, name) for name in roots if stored["emas"][ema][name]}


def _folder(workdir: str | os.PathLike, name: str = "checkpoints") -> epath.Path:
    remote = "://" in os.fspath(workdir)
    return epath.Path(workdir if remote else os.path.abspath(workdir)) / name


def _restore_args(target: Any, partial_restore: bool = False) -> ocp.args.PyTreeRestore:
    """Asks for arrays with the sharding of each leaf, or for numpy arrays where that is None.

    partial_restore: allows that more is stored than `target` names.
    """

    def how(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.checkpoint_utils.construct_restore_args(leaf)

    return ocp.args.PyTreeRestore(
        target, jax.tree.map(how, target), partial_restore=partial_restore
    )


def _read(
    check: Callable[[], None],
    read: Callable[[], Any],
    folder: epath.Path,
    steps: Sequence[int] = (),
) -> Any:
    """read(), or a UserError about the folder, whatever a damaged file makes orbax raise.

    When one array cannot be read, orbax drops the reads of all others, and each prints a traceback
    when it ends or is collected. That is silenced, also after a failure, which ends the program
    anyhow. The error has no cause, which would keep these reads alive until the program exits.

    Args:
      check: compares the digests of the files, before.
      folder: of a checkpoint, or `untrained`.
      steps: of all checkpoints.
    """
    hook = sys.unraisablehook
    reason = ""
    try:
        check()
        sys.unraisablehook = lambda _: None
        return read()
    except digests.Damaged as error:
        wrong = f"damaged ({error.file} is not what was written): restore that file"
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = _in_short(error)
        wrong = f"damaged or of another model ({reason}): use the code and config that wrote it"
    finally:
        if not reason:
            sys.unraisablehook = hook
    if reason:
        gc.collect()
    remedy = "begin anew in another workdir, since every checkpoint of this one needs that folder"
    if folder.name.isdigit():
        older = [step for step in steps if step < int(folder.name)]
        fallback = f"step {max(older)}" if older else "a fresh start"
        remedy = f"delete that folder to fall back on {fallback}"
    raise UserError(f"checkpoint {folder} is {wrong}, or {remedy}")


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
