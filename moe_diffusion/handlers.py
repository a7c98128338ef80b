"""How orbax writes the parts of a checkpoint: as its own handlers do, and then with digests.

The digests are written after the files of a part and before its folder takes its final name. Where
saving is asynchronous, this is in its thread. See `digests.py`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moe_diffusion import digests, priorities


def silence() -> None:
    """Keeps orbax from printing what it raises as well: an error for every array and thread."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if getattr(sys.unraisablehook, "of_orbax", False):
        return
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            others(unraisable)

    hook.of_orbax = True
    sys.unraisablehook = hook


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """For a tree of arrays; the options are those of orbax.

    Of several processes, each reads back what it wrote itself, if saving is asynchronous. The
    threads that write give way to training.
    """
    silence()
    handler = _with_digests(ocp.PyTreeCheckpointHandler(**options))
    save = handler.async_save

    async def async_save(directory: Any, *args: Any, **kwargs: Any) -> Any:
        writes = await save(directory, *args, **kwargs)
        priorities.lower_writers()
        return [_Written(writes, directory)] if jax.process_count() > 1 else writes

    handler.async_save = async_save
    return handler


def json_handler() -> ocp.JsonCheckpointHandler:
    """For a JSON object."""
    return _with_digests(ocp.JsonCheckpointHandler())


def _with_digests(handler: Any) -> Any:
    """Changes the instance, because orbax finds the arguments of a handler by its exact class."""
    finalize = handler.finalize

    def finalize_with_digests(directory: epath.Path) -> None:
        # It runs on one process, when all have written their files.
        priorities.lower_own()
        finalize(directory)
        digests.write(directory)

    handler.finalize = finalize_with_digests
    return handler


class _Written:
    """What one process writes. Orbax waits for `result` in a thread."""

    def __init__(self, writes: list[Any], directory: Any):
        self._writes, self._folder = writes, directory

    def result(self, timeout: float | None = None) -> None:
        for write in self._writes:
            write.result(timeout)
        folder = epath.Path(getattr(self._folder, "path", self._folder))
        digests.write_part(folder, f"ocdbt.process_{jax.process_index()}")

    def cancel(self) -> None:
        for write in self._writes:
            write.cancel()
