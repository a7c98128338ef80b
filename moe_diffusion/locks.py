"""One writer at a time: a file in the folder that says who writes there.

The file `in_use.lock` has the host, the process and the time of its start. Its owner touches it
every `BEAT` seconds and deletes it at the end. Who finds a file whose owner is gone takes it over:
at once if the owner was a process of this machine, or else after `SILENCE` seconds without a touch.

On remote folders (gs://) nothing can be created exclusively. There the file is read back after a
moment, so that two runs started within the same second can still miss each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from moe_diffusion.errors import UserError, explained
from moe_diffusion.writing import save_text

NAME = "in_use.lock"
BEAT, SILENCE = 20.0, 300.0  # seconds
_MOMENT = 1.0  # seconds; for a file in a remote folder to settle, or for its writer to fill it
_log = logging.getLogger(__name__)


class Lock:
    """Held by the main process; the others have one that does nothing."""

    def __init__(self, path: epath.Path | None = None, text: str = ""):
        self.path, self._text, self._ended = path, text, threading.Event()
        if path is not None:
            threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Raises a UserError if another run has taken the folder, as while this one was stopped."""
        if self.path is not None and _text_of(self.path) not in (self._text, ""):
            owner = _named(_owner(_text_of(self.path)))
            raise UserError(
                f"{self.path.parent} was taken over by {owner}, because this run gave no sign of "
                "life: leave the folder to that run, or stop it and start this one again"
            )

    def release(self) -> None:
        self._ended.set()
        if self.path is not None and _text_of(self.path) == self._text:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # the next run sees that this one has ended
                _log.warning("%s cannot be deleted (%s)", self.path, error.strerror)
        self.path = None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if _is_remote(self.path) and _text_of(self.path) == self._text:
                    self.path.write_text(self._text)
                else:
                    os.utime(self.path)


@contextlib.contextmanager
def held(folder: str | os.PathLike, what: str) -> Iterator[Lock]:
    """Makes a folder and keeps other runs out of it; all processes of a run call this.

    The lock is released at the end of the body, after an error too, and by SIGTERM. If nothing was
    written, the folder disappears again.

    Args:
      what: the folder is used for, such as "training".

    Raises:
      UserError: on every process, if another run uses the folder. It names that run.
    """
    lock, refusal, folder = Lock(), None, epath.Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if jax.process_index() == 0:
        try:
            lock = _take(folder, what)
        except UserError as error:
            refusal = error
    if jax.process_count() > 1:
        free = multihost_utils.broadcast_one_to_all(np.int32(refusal is None))
        if not free and not refusal:
            refusal = UserError(f"{folder} is in use: see what the first process says")
    if refusal:
        raise refusal
    try:
        with _released_by_sigterm(lock):
            yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # it is not empty, and stays
            for path in made if not _is_remote(folder) else ():
                os.rmdir(path)


def _take(folder: epath.Path, what: str) -> Lock:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    me = {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
    me |= {"machine": _machine(), "born": _born(os.getpid()), "token": uuid.uuid4().hex}
    text = json.dumps(me) + "\n"
    for _ in range(3):  # who was slower than a third run looks at that one's lock
        with explained(f"cannot write {path}", "make room or choose another folder", (OSError,)):
            created = _create(path, text)
        if created:
            return Lock(path, text)
        found = _text_of(path)
        if not found:  # its owner is about to fill it, or to delete it
            time.sleep(_MOMENT)
            found = _text_of(path)
        owner, age = _owner(found), _age(path)
        if age is None:
            continue
        if not _is_gone(owner, age):
            raise UserError(
                f"{folder} is in use by {_named(owner)}, which gave a sign of life {age:.0f} s "
                f"ago: wait for it, stop it or choose another folder; if it no longer exists, "
                f"delete {path}"
            )
        if _replace(path, found, text):
            _log.warning("%s: took over from %s, which has ended", folder, _named(owner))
            return Lock(path, text)
    raise UserError(f"{folder} is in use: other runs are starting there at this moment")


def _create(path: epath.Path, text: str) -> bool:
    """Creates a file with a text unless it exists; False if it does."""
    if _is_remote(path):
        if path.exists():
            return False
        path.write_text(text)
        time.sleep(_MOMENT)
        return _text_of(path) == text
    try:
        file = open(path, "x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: epath.Path, found: str, text: str) -> bool:
    """Gives a file another text if it still has the one that was found.

    Of several processes one succeeds. The file is there all the time, so that nobody creates it.
    """
    if _is_remote(path):
        path.write_text(text)
    else:
        with _alone(path.parent) as alone:
            if not path.exists() or _text_of(path) != found:
                return False
            save_text(text, path)
        if alone:
            return True
    time.sleep(_MOMENT)
    return _text_of(path) == text


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[bool]:
    """Keeps others out of this body while it runs; False where the file system cannot do that."""
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(number)


def _is_gone(owner: dict[str, Any], age: float) -> bool:
    if owner.get("machine") == _machine() and isinstance(owner.get("pid"), int):
        return _born(owner["pid"]) != owner.get("born")
    return age > SILENCE


def _machine() -> str:
    """A name of this machine, since its start, and of the container, whose pids are its own."""
    parts = [platform.system(), socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process of this machine was born, which a later one of its number was not; or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"


def _age(path: epath.Path) -> float | None:
    """Seconds since a file was touched, by the clock of its file system; None if it is gone."""
    try:
        touched, now = path.stat().mtime, time.time()
        if not _is_remote(path):
            with tempfile.NamedTemporaryFile(prefix=f".{NAME}.", dir=path.parent) as file:
                touched, now = os.stat(path).st_mtime, os.stat(file.name).st_mtime
        return max(0.0, now - touched)
    except OSError:
        return None


def _owner(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
        return owner if isinstance(owner, dict) else {}
    except ValueError:
        return {}


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "a run that does not say who it is"
    return (
        f"{owner.get('what')} (process {owner.get('pid')} on {owner.get('host')}, started "
        f"{owner.get('started')})"
    )


def _text_of(path: epath.Path) -> str:
    try:
        return path.read_text() if path.is_file() else ""  # reading a pipe would never end
    except (OSError, ValueError):
        return ""


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def _released_by_sigterm(lock: Lock) -> Iterator[None]:
    """SIGTERM, where nobody handles it, releases the lock and then ends the process as usual.

    With several processes it is left to jax's preemption service.
    """
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if not (alone and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL):
        yield
        return

    def end(number: int, _: Any) -> None:
        lock.release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
