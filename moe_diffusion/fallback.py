"""Goes on from the checkpoint before, where the newest is damaged (`--on-damage=previous`)."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
from etils import epath
from jax.experimental import multihost_utils

from moe_diffusion import digests, locks
from moe_diffusion.parallel.distributed import is_main_process


def set_aside(workdir: str | os.PathLike, tell: Callable[[str], None]) -> None:
    """Renames damaged checkpoints of a run that are newer than a whole one; nothing is deleted.

    Where none is whole, all stay, and who reads the newest says what is damaged. Stages of a
    distillation, which are folders of the workdir, are treated alike. All processes call this.

    Args:
      tell: prints a line; on the main process.

    Raises:
      UserError: another run uses the folder.
    """
    folder = epath.Path(workdir)
    for checkpoints in sorted([folder / "checkpoints", *folder.glob("*/checkpoints")]):
        if not checkpoints.is_dir():
            continue
        with locks.held(checkpoints.parent, "looking for damage"):
            for path, file in _damaged(checkpoints):
                aside = path.with_name(f"{path.name}.damaged")
                if is_main_process():
                    if aside.exists():
                        aside.rmtree()  # of the same step of an earlier time
                    path.rename(aside)
                    tell(f"checkpoint {path} is damaged ({file} is not what was written): kept as "
                         f"{aside.name}, going on from the one before")  # fmt: skip
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"looked for damage in {checkpoints}")


def _damaged(checkpoints: epath.Path) -> list[tuple[epath.Path, str]]:
    """The damaged checkpoints after the newest whole one, each with its first damaged file."""
    found: list[tuple[epath.Path, str]] = []
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    for step in sorted(steps, reverse=True):
        path = checkpoints / str(step)
        try:
            digests.check(path / "state", path / "data")
            return found
        except digests.Damaged as error:
            found.append((path, error.file))
    return []
