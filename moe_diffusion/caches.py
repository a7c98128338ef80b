"""Where things lie that can be made again: compiled programs and kernels, small classifiers.

Some of them are code that is run as it lies there. So the folder and what lies in it must belong to
the user alone; anybody else who could write there could run code as this user.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

import jax


def cache_folder(name: str) -> Path:
    """The folder of one kind of such things, ~/.cache/moe_diffusion/<name>; made if need be.

    Where that is not possible or not safe (no home, not writable, of another user), it is a
    temporary folder of this process, and a warning says why. Others lose their access to a folder
    of ours.
    """
    try:
        top = Path.home() / ".cache" / "moe_diffusion"
        for folder in (top, top / name):
            folder.mkdir(parents=True, exist_ok=True)
            if problem := _strange(folder):
                return _temporary(f"{folder} {problem}") / name
            if os.stat(folder).st_mode & 0o077 and os.name == "posix":
                folder.chmod(0o700)
        if not os.access(top / name, os.W_OK | os.X_OK):
            return _temporary(f"{top / name} cannot be written") / name
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return _temporary(str(error)) / name
    return top / name


@functools.cache
def _temporary(reason: str) -> Path:
    """A folder of this process alone in place of ~/.cache/moe_diffusion."""
    folder = Path(tempfile.mkdtemp(prefix="moe_diffusion-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("jax", "kernels", "digits"):
        (folder / name).mkdir()
    logging.warning("%s: compiled code is kept in %s until the process ends", reason, folder)
    return folder


def is_ours(file: Path) -> bool:
    """Whether a regular file (no link) belongs to this user, and nobody else can write to it."""
    try:
        found = os.lstat(file)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return False
    return os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def _strange(folder: Path) -> str:
    """Why a folder is not this user's; "" if it is."""
    if os.name == "posix" and os.stat(folder).st_uid != os.geteuid():
        return "belongs to another user"
    return ""


def keep_programs(folder: str) -> None:
    """Keeps compiled programs between runs: in `folder`, "" the default one, "off" nowhere.

    A folder that the user names is taken as it is. If others can write to it, a warning says that
    they can run code here.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder or str(cache_folder("jax")))
    if folder and os.path.isdir(folder) and os.name == "posix":
        found = os.stat(folder)
        if found.st_mode & 0o022 or found.st_uid != os.geteuid():
            logging.warning(
                "compile_cache %s can be written by others, who can so run code as you: "
                "chmod 700, or name another folder",
                folder,
            )
