"""Starts of one training of `configs/digits.py`: what a start prints, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from moe_diffusion.signals import RUN_AGAIN
from tests import cli

NUM_STEPS, SAVED_EVERY = 30, 5
LIMIT = 180  # seconds that one start may take, on a machine that does other things, too
MOMENT = 20  # seconds in which processes that lost their parent must be gone
_TOKEN = "DISTURBED_RUN"  # variable of the environment by which all processes of a case are found
ARGS = cli.digits(
    "diffmoe",
    data__source="tests.campaign.slow:Slow",
    data__prefetch=1,
    train__num_steps=NUM_STEPS,
    checkpoint__every=SAVED_EVERY,
)


class Fault(Exception):
    """A run did something that it must not do."""


class LeftOut(Exception):
    """This machine does not let a kind of disturbance happen."""


class Start:
    """A started command; its process group is its own, like that of a terminal's job.

    Attributes:
      process: the Popen of the command itself.
    """

    def __init__(self, folder: Path, number: int, args: list[str], environment: dict[str, str]):
        self.output, self.error = (folder / f"{number}.{name}" for name in ("out", "err"))
        with self.output.open("wb") as output, self.error.open("wb") as error:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moe_diffusion.train", *args],
                cwd=cli.ROOT, env=environment, stdout=output, stderr=error, start_new_session=True,
            )  # fmt: skip
        self._ends_by = time.monotonic() + LIMIT

    def wait_for(self, moment: Callable[[], bool]) -> bool:
        """Waits for a moment; False if the run ended before."""
        while not moment():
            if self.process.poll() is not None:
                return False
            self.check_time()
            time.sleep(0.001)
        return True

    def wait_for_line(self, beginning: str) -> bool:
        """Waits for a line of the output; False if the run ended without it."""
        line = re.compile("^" + re.escape(beginning), re.MULTILINE)
        return self.wait_for(lambda: line.search(self.output.read_text(errors="replace")))

    def send(self, number: int, group: bool = False) -> None:
        """Sends a signal, if the process still lives; to its group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    def end(self) -> int:
        """Waits until it has ended; returns the exit status, negative after a signal.

        Raises:
          Fault: it takes too long, prints a traceback, or a refusal is not one line.
        """
        while self.process.poll() is None:
            self.check_time()
            time.sleep(0.01)
        status, text = self.process.returncode, self.error.read_text(errors="replace")
        if "Traceback" in text or "Traceback" in self.output.read_text(errors="replace"):
            raise Fault(f"status {status} with a traceback: ...{text[-1500:]}")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if status == 2 and (len(errors) != 1 or not text.endswith(errors[0] + "\n")):
            raise Fault(f"the refusal is not one last line: {text[-1500:]}")
        return status

    @property
    def refusal(self) -> str:
        """The line that a start with status 2 ended with."""
        return self.error.read_text(errors="replace").splitlines()[-1].removeprefix("error: ")

    def check_time(self) -> None:
        """Raises a Fault, and kills the start, if it takes too long."""
        if time.monotonic() > self._ends_by:
            self.send(signal.SIGKILL, group=True)
            self.process.wait()
            raise Fault(f"it did not end within {LIMIT} s, the limit of a start")


class Case(contextlib.ExitStack):
    """One disturbed run: its workdir, its random numbers, and all that was started and said.

    Args:
      folder: for this case alone.
      kind: its name.
      turn: the number of this case among those of its kind.
      seed: of the campaign.

    Attributes:
      workdir: of the run; a disturbance may move it.
      notes: what was done.
      refusals: what starts that were refused said.
      lost: steps whose lines in metrics.jsonl the disturbance has destroyed.
      reference: workdir of the undisturbed run, where it is one of this case alone.
    """

    def __init__(self, folder: Path, kind: str, turn: int = 0, seed: int = 0):
        super().__init__()
        self.folder, self.workdir, self.turn = folder, folder / "run", turn
        self.rng = Random(f"{seed}/{kind}/{turn}")
        self.notes, self.refusals, self.starts = [], [], 0
        self.lost, self.reference = set(), None
        self._token = uuid.uuid4().hex
        self.mark = {_TOKEN: self._token}  # in the environment of all processes
        folder.mkdir(parents=True)
        self.callback(self._kill_all)

    def note(self, text: str) -> None:
        self.notes.append(text.replace(str(self.folder) + "/", ""))

    def start(self, devices: int = 1, compile_anew: bool = False, **changes: object) -> Start:
        """Starts the command, as a user would; `data__num_workers=2` changes a key."""
        keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
        environment = cli.environment(devices) | self.mark | {"PYTHONPATH": str(cli.ROOT)}
        if compile_anew:
            environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        self.starts += 1
        args = [*ARGS, *keys, "--workdir", str(self.workdir)]
        return Start(self.folder, self.starts, args, environment)

    def at_random_step(self, least: int = 1, **how: object) -> Start:
        """A start that has just told about a random step."""
        start, step = self.start(**how), self.rng.randint(least, NUM_STEPS - 3)
        if not start.wait_for_line(f"step {step}/"):
            raise Fault(f"status {start.end()} before step {step}: {start.error.read_text()}")
        self.note(f"step {step}")
        return start

    def stopped_with_a_checkpoint(self, **how: object) -> Path:
        """A run that was killed or stopped when it had a checkpoint; returns the newest."""
        start, kill = self.at_random_step(SAVED_EVERY + 2, **how), self.rng.random() < 0.5
        start.wait_for(lambda: bool(cli.saved_steps(self.workdir)))
        self.send(start, signal.SIGKILL if kill else signal.SIGTERM)
        if start.end() not in (0, RUN_AGAIN, -signal.SIGKILL):
            raise Fault(f"status {start.process.returncode}: {start.error.read_text()}")
        return self.workdir / "checkpoints" / str(max(cli.saved_steps(self.workdir)))

    def send(self, start: Start, number: int, group: bool = False) -> None:
        self.note(signal.Signals(number).name + (" to the group" if group else ""))
        start.send(number, group)

    def finish(self, follow: Callable[[str], None] | None = None, **how: object) -> str:
        """Starts the same command until it succeeds, and follows what a refusal advises.

        Returns what the last start printed on stderr.

        follow: does what the refusal says, or raises a Fault because that names the wrong thing.
        """
        for _ in range(4):
            start = self.start(**how)
            if (status := start.end()) == 0:
                return start.error.read_text(errors="replace")
            if status != 2 or follow is None:
                raise Fault(f"status {status} of a rerun: {start.error.read_text()[-1500:]}")
            self.refusals.append(start.refusal)
            follow(start.refusal)
        raise Fault("the advice was followed, and the run is still refused")

    def check_gone(self) -> None:
        """Raises a Fault if a process of this case outlives it."""
        ends_by = time.monotonic() + MOMENT
        while left := list(self._processes()):
            if time.monotonic() > ends_by:
                raise Fault(f"{len(left)} processes stay for more than {MOMENT} s: {left}")
            time.sleep(0.05)

    def _processes(self) -> Iterator[int]:
        mark = f"{_TOKEN}={self._token}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)

    def _kill_all(self) -> None:
        """Returns when they are gone, or after ten seconds."""
        until = time.monotonic() + 10
        while (left := list(self._processes())) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def workers(self, start: Start) -> list[int]:
        """The processes that read data for a start."""
        found = []
        for pid in self._processes():
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if parent == start.process.pid and b"resource_tracker" not in command:
                    found.append(pid)
        return found

    def on_small_disk(self, megabytes: int) -> bool:
        """Puts the workdir on a disk of its own, if this machine lets us."""
        disk = self.folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        self.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        self.callback(self._kill_all)  # before it is taken away
        self.workdir = disk / "run"
        return True

    def lock_folders(self) -> Callable[[], None]:
        """Nobody can make or remove files in the folders of the run until the result is called."""
        folders = [self.workdir, self.workdir / "checkpoints"]
        if os.geteuid():
            lock, free = (["chmod", mode] for mode in ("a-w", "u+w"))
        else:  # modes do not bind root
            lock, free = (["chattr", mode] for mode in ("+i", "-i"))
        if shutil.which(lock[0]) is None:
            raise LeftOut(f"no {lock[0]} here")
        release = lambda: subprocess.run([*free, *folders], check=True)  # noqa: E731
        if subprocess.run([*lock, *folders], capture_output=True).returncode:
            subprocess.run([*free, *folders], capture_output=True)
            raise LeftOut("the file system knows no immutable folders")
        self.callback(release)
        return release


def limit_files(start: Start, size: int) -> None:
    """No file of a running command may grow beyond `size` bytes: writing fails with EFBIG."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(start.process.pid, resource.RLIMIT_FSIZE, (size, size))
