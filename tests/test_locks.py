"""One writer a folder: who is refused, who takes over, and what is left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from moe_diffusion import locks
from moe_diffusion.errors import UserError
from tests import cli

HOLDER = """
import sys, time
from moe_diffusion import locks
with locks.held(sys.argv[1], "training"):
    print("held", flush=True)
    if sys.argv[2] == "error":
        raise ValueError("the run fails")
    time.sleep(100)
"""


@contextlib.contextmanager
def holder(folder, how=""):
    """A process that holds the folder and, unless it fails at once, is sent a signal."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how],
        cwd=cli.ROOT,
        env=cli.environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    with locks.held(tmp_path / "new" / "run", "training"):
        (path,) = (tmp_path / "new" / "run").iterdir()
        owner = json.loads(path.read_text())
        assert (owner["pid"], owner["what"]) == (os.getpid(), "training")
        with pytest.raises(UserError) as error, locks.held(path.parent, "prepare"):
            pass
        assert f"{path.parent} is in use by training (process {os.getpid()} on" in str(error.value)
        assert f"if it no longer exists, delete {path}" in str(error.value)
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), locks.held(path.parent, "training"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "new").exists()  # nothing was written
    with locks.held(path.parent, "training"):
        (path.parent / "kept").touch()
    assert [p.name for p in path.parent.iterdir()] == ["kept"]


def test_other_processes_are_seen_alive_and_dead(tmp_path, caplog):
    """SIGTERM and an exception free the folder; kill -9 leaves a lock, which is taken over."""
    path = tmp_path / locks.NAME
    with holder(tmp_path) as process:
        used = f"in use by training .process {process.pid} on"
        with pytest.raises(UserError, match=used), locks.held(tmp_path, "training"):
            pass
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM and not path.exists()
    with holder(tmp_path, "error") as process:
        pass
    assert process.returncode == 1 and not path.exists() and not caplog.records
    with holder(tmp_path) as process:
        process.kill()
    assert path.exists()
    with locks.held(tmp_path, "training"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    (record,) = caplog.records
    assert f"took over from training (process {process.pid} on" in record.getMessage()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"born": "1"},  # another process has the number now
        {"machine": "another", "silent": locks.SILENCE + 10},
        {"text": "", "silent": locks.SILENCE + 10},  # killed before it wrote who it is
        {"text": "[1]", "silent": locks.SILENCE + 10},
    ],
)
def test_what_is_stale_is_taken_over(tmp_path, change, monkeypatch):
    monkeypatch.setattr(locks, "_MOMENT", 0)
    path = left_behind(tmp_path, **change)
    with locks.held(tmp_path, "training"):
        assert json.loads(path.read_text())["token"] != "theirs"
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"machine": "another", "pid": 1 << 30},
        {"machine": "another", "silent": locks.SILENCE - 10},
        {"text": ""},
    ],
)
def test_what_may_be_alive_is_left_alone(tmp_path, change, monkeypatch):
    monkeypatch.setattr(locks, "_MOMENT", 0)
    path = left_behind(tmp_path, **change)
    before = path.read_text()
    with pytest.raises(UserError, match="is in use by"), locks.held(tmp_path, "training"):
        pass
    assert path.read_text() == before


def left_behind(folder, text=None, silent=0.0, **change):
    """A lock like that of this process, but for what is changed."""
    with locks.held(folder, "training"):
        path = folder / locks.NAME
        owner = json.loads(path.read_text()) | {"token": "theirs"} | change
    path.write_text(json.dumps(owner) if text is None else text)
    os.utime(path, (time.time() - silent,) * 2)
    return path


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_one_gets_it(tmp_path, stale):
    """Twenty times eight threads at once, each as if it were a run of its own."""
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        if stale:
            left_behind(folder, born="1")
        with ThreadPoolExecutor(8) as threads:
            tries = [threads.submit(locks._take, epath.Path(folder), "training") for _ in range(8)]
        got = [future.result() for future in tries if not future.exception()]
        refused = [future.exception() for future in tries if future.exception()]
        assert len(got) == 1 and all(isinstance(error, UserError) for error in refused)
        got[0].check()
        got[0].release()
        assert not list(folder.iterdir())


def test_an_owner_gives_signs_of_life_and_notices_a_takeover(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    path = tmp_path / locks.NAME
    with locks.held(tmp_path, "training") as lock:
        os.utime(path, (0, 0))
        until = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.05)
        assert time.time() - path.stat().st_mtime < 20
        lock.check()
        theirs = json.dumps(json.loads(path.read_text()) | {"pid": 7, "host": "there"})
        path.write_text(theirs)
        with pytest.raises(UserError, match=r"taken over by training \(process 7 on there"):
            lock.check()
    assert path.read_text() == theirs  # another's lock stays


def test_a_lock_that_cannot_be_deleted_ends_nothing(tmp_path, caplog, monkeypatch):
    """As where the disk has become read-only; the next run of this machine takes the lock over."""

    def fail(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    with locks.held(tmp_path, "training"), caplog.at_level("WARNING"):
        monkeypatch.setattr(type(epath.Path(tmp_path)), "unlink", fail)
    monkeypatch.undo()
    assert caplog.messages == [
        f"{tmp_path / locks.NAME} cannot be deleted (Operation not permitted)"
    ]
