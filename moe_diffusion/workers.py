"""The processes that read data beside the training process: how they begin, end and fail."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator

import grain
from absl import flags

from moe_diffusion.errors import UserError

_PER_CORE = 8  # more processes than this only wait for each other
_GRACE = 30.0  # seconds that a worker goes on after SIGTERM, in which the parent ends a step
# The signal that ends a worker -> what was short. Writing to a full /dev/shm is SIGBUS.
_SHORT_OF = {
    signal.SIGBUS: "/dev/shm is full: make it larger (docker run --shm-size=8g) or lower "
    "data.num_workers and data.prefetch; data.num_workers=0 needs none",
    signal.SIGKILL: "a process that reads data was killed, as for want of memory: lower "
    "data.num_workers or data.prefetch",
}


def check_count(count: int) -> None:
    """Raises a UserError about a number of workers that this machine cannot serve."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if count > _PER_CORE * cores:
        raise UserError(
            f"data.num_workers = {count} exceeds {_PER_CORE} processes for each of the {cores} "
            f"cores here: set at most {_PER_CORE * cores}"
        )


def read_in_processes(dataset: grain.IterDataset, count: int, ahead: int) -> grain.IterDataset:
    """The same elements in the same order, read by `count` processes, `ahead` in each."""
    flags.FLAGS.mark_as_parsed()  # grain's workers read flags, also outside of absl.app
    return dataset.mp_prefetch(grain.MultiprocessingOptions(count, ahead), _begin)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Threads and processes that begin in the body see neither Ctrl-C nor SIGTERM.

    A terminal and a scheduler send these to all processes. What is to be done is the parent's
    matter; its threads that began before see them as ever. See also `_begin`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def shortages_explained() -> Iterator[None]:
    """Raises a UserError where workers fail for want of memory or of room in /dev/shm."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(_SHORT_OF[signal.SIGBUS]) from None
    except RuntimeError as error:
        code = re.search(r"terminated unexpectedly with exit code -(\d+)", str(error))
        if not code or int(code[1]) not in _SHORT_OF:
            raise
        raise UserError(_SHORT_OF[signal.Signals(int(code[1]))]) from None


def _begin(*_: int) -> None:
    """Runs first in every worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_follow_parent, daemon=True).start()


def _end_later(*_) -> None:
    """After SIGTERM to all processes the parent may still need batches to end its step."""
    timer = threading.Timer(_GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _follow_parent() -> None:
    """Ends this process when its parent has ended, however that happened."""
    multiprocessing.parent_process().join()
    os._exit(1)
