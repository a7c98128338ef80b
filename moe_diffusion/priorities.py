"""Threads that write a checkpoint take only what training leaves of the CPU."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

LOWEST = 19  # Linux: a 70th of the weight of an ordinary thread
_WRITERS = "ts_pool_worker"  # how tensorstore names the threads that compress and write


def lower_writers() -> None:
    """Gives way with tensorstore's threads; on Linux alone, where threads have priorities."""
    if sys.platform != "linux":
        return
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text().strip() == _WRITERS:
                os.setpriority(os.PRIO_PROCESS, int(task.name), LOWEST)


def lower_own() -> None:
    """Gives way with this thread, and those that it starts, unless it is the one that trains."""
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
