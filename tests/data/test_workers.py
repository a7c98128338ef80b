"""Processes that read data: they end with their parent, leave Ctrl-C to it, say what is short."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_diffusion import workers
from moe_diffusion.data import pipeline, sources
from moe_diffusion.errors import UserError
from tests import cli

READ = """
import contextlib, signal, sys, time
from types import SimpleNamespace
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.data import pipeline, sources

@exits_on_user_error
def main():
    told = []  # as in a run, a signal is a question that is answered after a step
    signal.signal(signal.SIGINT, lambda *_: told.append(1))
    data = SimpleNamespace(batch_size=int(sys.argv[1]), augment="none", num_workers=2, prefetch=2)
    source = sources.Synthetic((16, 16, 3), sources.TEN_CLASSES)
    with contextlib.closing(pipeline.make_iterator(source, data, seed=0)) as batches:
        next(batches)
        print("reading", flush=True)
        while len(sys.argv) < 3 and not told:
            next(batches)
            time.sleep(0.01)
        next(batches)
        print("stopped", flush=True)

if __name__ == "__main__":
    main()
"""


def test_the_number_of_workers_is_bounded_by_the_cores():
    data = SimpleNamespace(batch_size=4, augment="none", num_workers=100_000, prefetch=2)
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(
        UserError, match=rf"num_workers = 100000 exceeds .* set at most {8 * cores}$"
    ):
        pipeline.make_iterator(sources.Digits("train"), data, seed=0)
    workers.check_count(8 * cores)
    with pytest.raises(UserError):
        workers.check_count(8 * cores + 1)


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full: make it larger"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -7."), "/dev/shm"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -9."),
            "want of m",
        ),
    ],
)
def test_what_is_short_is_said(error, message):
    with pytest.raises(UserError, match=f"{message}.*data.num_workers"):
        with workers.shortages_explained():
            raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("Worker process was terminated unexpectedly with exit code 1."),
        RuntimeError("something else"),
    ],
)
def test_other_failures_pass(error):
    with pytest.raises(type(error)) as caught:
        with workers.shortages_explained():
            raise error
    assert caught.value is error


# Real processes


@contextlib.contextmanager
def reading(folder: Path, *args: str):
    """A process group of its own that reads digits with two workers; yields its parent."""
    script = folder / "read.py"
    script.write_text(READ)
    process = subprocess.Popen(
        [sys.executable, str(script), *args],
        cwd=cli.ROOT,
        env=os.environ | {"PYTHONPATH": str(cli.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def signal_children(group: int, number: int) -> None:
    """Sends a signal to all of a group but its first process."""
    for pid in set(members(group)) - {group}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def waits_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    with reading(tmp_path, "16") as process:
        assert process.stdout.readline() == "reading\n"
        assert len(members(process.pid)) >= 3  # with two workers
        process.kill()
        process.wait()
        assert waits_for(lambda: not members(process.pid), 10), members(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["begin", "middle"])
def test_workers_leave_ctrl_c_to_the_parent(tmp_path, when):
    """SIGINT reaches the whole group, as from a terminal, when workers begin or when they read."""
    with reading(tmp_path, "16") as process:
        while when == "begin" and not select.select([process.stdout], [], [], 0.02)[0]:
            signal_children(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "reading\n"
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=cli.HANGS_AFTER)
        assert rest == "stopped\n"
        assert process.returncode == 0


@pytest.mark.slow
def test_workers_outlive_a_stop_signal_for_all_until_the_parent_ends(tmp_path):
    with reading(tmp_path, "16") as process:
        assert process.stdout.readline() == "reading\n"
        signal_children(process.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=cli.HANGS_AFTER)
        assert rest == "stopped\n" and process.returncode == 0


def mounts() -> bool:
    """Whether this process may give a command a /dev/shm of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and not subprocess.call(command)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "1m"])  # no room for a lock; none for a batch of 3 MB
def test_a_small_dev_shm_is_one_line(tmp_path, size):
    if not mounts():
        pytest.skip("may not mount another /dev/shm")
    (tmp_path / "read.py").write_text(READ)
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "
    command = f"{mount}{sys.executable} {tmp_path / 'read.py'} 1024 once"
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        cwd=cli.ROOT,
        env=os.environ | {"PYTHONPATH": str(cli.ROOT)},
        capture_output=True,
        text=True,
        timeout=cli.HANGS_AFTER,
    )
    assert ran.returncode == 2, ran.stderr
    errors = [line for line in ran.stderr.splitlines() if "resource_tracker" not in line]
    assert errors[0].startswith("error: /dev/shm is full: make it larger"), ran.stderr
    assert "Traceback" not in ran.stderr


LEAVES_MEMORY = """
import os
from multiprocessing import shared_memory
from moe_diffusion import workers
workers.start_tracker()
print(shared_memory.SharedMemory(create=True, size=10).name, flush=True)
os.abort()
"""


def test_memory_of_a_killed_process_is_removed_without_a_word():
    command = [sys.executable, "-c", LEAVES_MEMORY]
    result = subprocess.run(
        command, cwd=cli.ROOT, capture_output=True, text=True, timeout=cli.HANGS_AFTER
    )
    assert result.returncode == -signal.SIGABRT and result.stderr == ""
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(result.stdout.strip())
