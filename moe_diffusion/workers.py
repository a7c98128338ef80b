"""The processes that read data beside the training process: how they begin, end and fail."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

from moe_diffusion.errors import UserError

_PER_CORE = 8  # more processes than this only wait for each other
_GRACE = 30.0  # seconds that a worker goes on after SIGTERM, in which the parent ends a step
_MOMENT = 5.0  # seconds
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


class Reader:
    """Reads the elements of a dataset in order with `count` processes, `ahead` in each.

    grain starts its processes when it is asked for the first element. This happens in a thread that
    is not interrupted, and so do the processes begin: Ctrl-C and SIGTERM, which a terminal and a
    scheduler send to all processes, are the parent's matter. Its other threads see them as ever.
    """

    def __init__(self, dataset: grain.IterDataset, count: int, ahead: int):
        flags.FLAGS.mark_as_parsed()  # grain's workers read flags, also outside of absl.app
        options = grain.MultiprocessingOptions(count, ahead)
        self._elements = iter(dataset.mp_prefetch(options, _begin))
        self._first: futures.Future | None = futures.Future()
        start_tracker()  # in Python 3.11 its start lets signals through again
        held = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
        threading.Thread(target=self._ask, args=(self._first,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> Any:
        if self._first is None:
            return next(self._elements)
        element, self._first = self._first.result(), None
        return element

    def close(self) -> None:
        """Ends the processes; those that are just beginning get a moment to do so."""
        if self._first is not None:
            futures.wait([self._first], timeout=_MOMENT)
        self._elements.close()

    def _ask(self, first: futures.Future) -> None:
        try:
            first.set_result(next(self._elements))
        except BaseException as error:
            first.set_exception(error)


def start_tracker() -> None:
    """Starts the process that removes shared memory which a killed worker leaves.

    It does so without a word, which would stand below the one line of the error.
    """
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)  # a flag of the process that is started
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


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
