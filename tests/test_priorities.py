"""What writes a checkpoint gives way to what trains."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from moe_diffusion import priorities

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux alone")


@linux
def test_the_thread_that_trains_keeps_its_priority():
    found = []

    def writer():
        priorities.lower_own()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    priorities.lower_own()
    thread = threading.Thread(target=writer)
    thread.start()
    thread.join()
    assert found == [priorities.LOWEST]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before < priorities.LOWEST


@linux
def test_tensorstores_threads_give_way(tmp_path):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    values = np.arange(8.0)
    tensorstore.open(spec, create=True, dtype=values.dtype, shape=values.shape).result()[:] = values
    priorities.lower_writers()
    tasks = Path("/proc/self/task").iterdir()
    comms = [task / "comm" for task in tasks]
    writers = [int(c.parent.name) for c in comms if c.read_text().strip() == "ts_pool_worker"]
    assert writers
    assert {os.getpriority(os.PRIO_PROCESS, task) for task in writers} == {priorities.LOWEST}
