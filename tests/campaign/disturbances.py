"""The kinds of disturbance: each takes a case, disturbs its run once, and has it finished."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from moe_diffusion import locks
from moe_diffusion.signals import RUN_AGAIN
from tests import cli
from tests.campaign.started import NUM_STEPS, SAVED_EVERY, Case, Fault, Start, limit_files

# What a start may end with after a signal.
STOPS = (0, RUN_AGAIN, -signal.SIGTERM, -signal.SIGKILL, 130)


def _stopped(case: Case, start: Start, *allowed: int) -> None:
    status = start.end()
    case.note(f"ended with {status}")
    if status not in (allowed or STOPS):
        raise Fault(f"status {status}: {start.error.read_text()[-1500:]}")
    case.check_gone()


# --- signals -------------------------------------------------------------------------------------


def killed(case: Case) -> None:
    """SIGKILL at any time, the first seconds included; every second time during training."""
    if case.turn % 2:
        start = case.at_random_step()
    else:
        start, seconds = case.start(), case.rng.uniform(0, 20)
        case.note(f"after {seconds:.2f} s")
        ends_at = time.monotonic() + seconds
        start.wait_for(lambda: time.monotonic() > ends_at)
    case.send(start, signal.SIGKILL)
    _stopped(case, start)
    case.finish()


def killed_during_a_save(case: Case) -> None:
    """SIGKILL within a moment after the temporary folder of a checkpoint appeared."""
    start, step = case.start(), case.rng.choice(range(SAVED_EVERY, NUM_STEPS + 1, SAVED_EVERY))
    name, seconds = f"{step}.orbax-checkpoint-tmp*", case.rng.choice((0, 0.01, 0.03, 0.06))
    start.wait_for(lambda: any((case.workdir / "checkpoints").glob(name)))
    time.sleep(seconds)
    case.send(start, signal.SIGKILL)
    left = [path.name for path in (case.workdir / "checkpoints").glob("*tmp*")]
    case.note(f"{seconds} s after the save of step {step} began; left: {', '.join(left) or '-'}")
    _stopped(case, start)
    case.finish()


def terminated(case: Case) -> None:
    """SIGTERM, as a scheduler sends it."""
    start = case.at_random_step()
    case.send(start, signal.SIGTERM, group=bool(case.turn % 2))
    _stopped(case, start)
    case.finish()


def interrupted(case: Case) -> None:
    """SIGINT, as Ctrl-C sends it to all processes of a terminal's job; at any time at first."""
    start, seconds = case.start(data__num_workers=2), case.rng.uniform(1, 20)
    if case.turn % 2:
        ends_at = time.monotonic() + seconds
        start.wait_for(lambda: time.monotonic() > ends_at)
        case.note(f"after {seconds:.2f} s")
    else:
        start.wait_for_line(f"step {case.rng.randint(1, NUM_STEPS - 3)}/")
    case.send(start, signal.SIGINT, group=True)
    _stopped(case, start)
    case.finish()


def told_twice(case: Case) -> None:
    """SIGTERM, or Ctrl-C, and again before the first had its effect."""
    start, seconds = case.at_random_step(), case.rng.uniform(0, 0.1)
    number = signal.SIGINT if case.turn % 2 else signal.SIGTERM
    case.send(start, number)
    time.sleep(seconds)
    case.note(f"{seconds:.3f} s")
    case.send(start, number)
    _stopped(case, start)
    case.finish()


def paused(case: Case) -> None:
    """SIGSTOP, some seconds of nothing, SIGCONT: the run itself must end as if nothing had been."""
    start, seconds = case.at_random_step(), case.rng.uniform(1, 6)
    case.send(start, signal.SIGSTOP, group=True)
    time.sleep(seconds)
    case.send(start, signal.SIGCONT, group=True)
    case.note(f"{seconds:.1f} s later")
    _stopped(case, start, 0)


def stopped_in_the_first_compile(case: Case) -> None:
    """A signal while the step is compiled, which nothing has compiled before."""
    start = case.start(compile_anew=True)
    start.wait_for_line("compiling")
    time.sleep(case.rng.uniform(0, 1))
    case.send(start, (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[case.turn % 3])
    _stopped(case, start)
    case.finish()


# --- processes -----------------------------------------------------------------------------------


def worker_killed(case: Case) -> None:
    """A process that reads data is killed, as for want of memory: the run says so, or needs it not.

    The same command resumes.
    """
    start = case.at_random_step(data__num_workers=2)
    workers = case.workers(start)
    if workers:
        os.kill(case.rng.choice(workers), signal.SIGKILL)
    case.note(f"one of {len(workers)} workers killed")
    _stopped(case, start, 0, 2)
    if start.process.returncode == 2:
        _must_name(start.refusal, "a process that reads data was killed")
        case.refusals.append(start.refusal)
    case.finish(data__num_workers=2)


def parent_of_workers_killed(case: Case) -> None:
    """SIGKILL of the run while processes read data for it: none of them may stay."""
    start = case.at_random_step(data__num_workers=2)
    case.note(f"{len(case.workers(start))} workers")
    case.send(start, signal.SIGKILL)
    _stopped(case, start)
    case.finish(data__num_workers=2)


def second_run(case: Case) -> None:
    """The same command again while the first is at work: refused by name, the first unharmed."""
    if case.turn % 2:  # at the same moment; whoever is faster trains
        starts = [case.start(), case.start()]
    else:
        starts = [case.at_random_step()]
        case.send(starts[0], signal.SIGSTOP, group=True)  # until the second looks
        starts.append(case.start())
        statuses = [starts[1].end()]
        case.send(starts[0], signal.SIGCONT, group=True)
        if statuses != [2]:
            raise Fault(f"the second run ended with {statuses[0]} while the first is at work")
    statuses = sorted(start.end() for start in starts)
    case.note(f"ended with {statuses}")
    if statuses not in ([0, 2], [0, 0]):
        raise Fault(f"two runs at the same time ended with {statuses}")
    for start in starts:
        if start.process.returncode == 2:
            _must_name(start.refusal, "is in use by training (process ")
            case.refusals.append(start.refusal)


# --- disk ----------------------------------------------------------------------------------------


def full_disk(case: Case) -> None:
    """No room from a random step on; then there is room again.

    Every second time, and where no disk can be mounted, it is a limit of the size of a file.
    """
    disk = not case.turn % 2 and case.on_small_disk(megabytes=32)
    start = case.at_random_step()
    if disk:
        room, filler = case.rng.randrange(0, 200_000), case.workdir.parent / "filler"
        with filler.open("wb") as file:
            while True:  # the run takes room, too, between the question and the answer
                with contextlib.suppress(OSError):
                    size = max(shutil.disk_usage(filler.parent).free - room, 1)
                    os.posix_fallocate(file.fileno(), 0, size)
                    break
        case.note(f"{room} bytes left on the disk")
    else:
        # What the run prints goes to files, too. A refusal must have room, a checkpoint not.
        size = case.rng.choice((8_000, 15_000, 30_000))
        limit_files(start, size)
        case.note(f"files of at most {size} bytes")
    _stopped(case, start, 0, 2)
    if start.process.returncode == 2:
        _must_name(start.refusal, str(case.workdir))
        case.refusals.append(start.refusal)
    if disk:
        filler.unlink()
    case.finish()


def not_writable(case: Case) -> None:
    """From a random step on nobody can make or remove files in the folders of the run."""
    start = case.at_random_step()
    release = case.lock_folders()
    _stopped(case, start, 0, 2)
    if start.process.returncode == 2:
        _must_name(start.refusal, str(case.workdir))
        case.refusals.append(start.refusal)
    release()
    case.finish()


def moved(case: Case) -> None:
    """The workdir lies somewhere else when the run goes on."""
    case.stopped_with_a_checkpoint()
    place = case.folder / "another place" / "of the run"
    place.parent.mkdir()
    case.workdir = case.workdir.rename(place)
    case.finish()


# --- damaged files -------------------------------------------------------------------------------


def _must_name(refusal: str, *names: str) -> None:
    missing = [name for name in names if name not in refusal]
    if missing:
        raise Fault(f"the refusal does not name {missing}: {refusal}")


def _damaged_checkpoint(case: Case, damage: Callable[[Case, Path], None], whole: bool) -> None:
    """Damages a file of the newest checkpoint. A refusal must name it; then it is followed."""
    folder = case.stopped_with_a_checkpoint()
    files = [path for path in folder.rglob("*") if path.is_file()]
    file = case.rng.choice(sorted(path for path in files if whole or path.stat().st_size))
    before = file.read_bytes()
    damage(case, file)
    name = str(file.relative_to(folder))
    case.note(f"checkpoint {folder.name}, {name} of {len(before)} bytes")

    def follow(refusal: str) -> None:
        _must_name(refusal, str(folder), name)
        if case.rng.random() < 0.3:
            case.note("the file was restored")
            file.write_bytes(before)
        else:
            case.note("the folder was deleted")
            shutil.rmtree(folder)

    case.finish(follow)


def flipped_bit(case: Case) -> None:
    """One bit of one file of the newest checkpoint is another."""

    def flip(case: Case, file: Path) -> None:
        data = bytearray(file.read_bytes())
        bit = case.rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        case.note(f"bit {bit}")

    _damaged_checkpoint(case, flip, whole=False)


def cut_file(case: Case) -> None:
    """One file of the newest checkpoint ends too early."""

    def cut(case: Case, file: Path) -> None:
        os.truncate(file, case.rng.randrange(file.stat().st_size))

    _damaged_checkpoint(case, cut, whole=False)


def deleted_file(case: Case) -> None:
    """One file of the newest checkpoint is gone."""
    _damaged_checkpoint(case, lambda case, file: file.unlink(), whole=True)


def _damage_text(case: Case, file: Path) -> bytes:
    """Cuts a text file in its middle, or puts bytes there that are no text; returns what it was."""
    before = file.read_bytes()
    at = case.rng.randrange(len(before) // 4, len(before) * 3 // 4)
    if case.turn % 2:
        file.write_bytes(before[:at] + case.rng.randbytes(16) + b"\n" + before[at:])
    else:
        file.write_bytes(before[:at])
    case.note(f"{file.name}, {'garbage' if case.turn % 2 else 'cut'} at {at} of {len(before)}")
    return before


def _damaged_table(case: Case, name: str) -> None:
    case.stopped_with_a_checkpoint()
    file = case.workdir / name
    before = _damage_text(case, file)

    def follow(refusal: str) -> None:
        _must_name(refusal, str(file))
        if case.rng.random() < 0.5:
            file.write_bytes(before)
        else:
            file.unlink()
        case.note("deleted" if not file.exists() else "restored")

    case.finish(follow)


def config_damaged(case: Case) -> None:
    """config.json is cut, or has garbage."""
    _damaged_table(case, "config.json")


def data_damaged(case: Case) -> None:
    """data.json is cut, or has garbage."""
    _damaged_table(case, "data.json")


def metrics_damaged(case: Case) -> None:
    """metrics.jsonl is cut, or has garbage: the run names it, goes on, and lacks those lines alone.

    It is a log. Nothing is computed from it.
    """
    newest = int(case.stopped_with_a_checkpoint().name)
    file = case.workdir / "metrics.jsonl"
    _damage_text(case, file)
    told = set()
    for line in file.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            told.add(json.loads(line)["step"])
    case.lost = set(range(1, newest + 1)) - told
    case.note(f"lost: {sorted(case.lost)}")
    warnings = [line for line in case.finish().splitlines() if str(file) in line]
    if case.lost and not warnings:
        raise Fault("nothing is said of the lines that are lost")
    case.refusals += warnings


def foreign_files(case: Case) -> None:
    """Something that is no checkpoint lies among them; also what looks like one."""
    folder = case.stopped_with_a_checkpoint().parent
    (folder / "notes.txt").write_text("the learning rate was too high")
    (folder / "old").mkdir()
    foreign = folder / str(case.rng.randint(NUM_STEPS, 99))
    if case.turn % 2:
        foreign.write_text("a file with a number for a name")
    else:
        foreign.mkdir()
    case.note(f"{'file' if foreign.is_file() else 'folder'} {foreign.name}")

    def follow(refusal: str) -> None:
        _must_name(refusal, str(foreign))
        foreign.unlink() if foreign.is_file() else shutil.rmtree(foreign)

    case.finish(follow)


def left_lock(case: Case) -> None:
    """A lock of a run on another machine lies there: silent for an hour, or touched just now."""
    case.stopped_with_a_checkpoint()
    lock = case.workdir / locks.NAME
    owner = {"what": "training", "host": "elsewhere", "pid": 1, "machine": "another", "born": "1"}
    lock.write_text(json.dumps(owner | {"started": "2026-01-01 00:00:00", "token": "0"}))
    silent = not case.turn % 2
    if silent:
        os.utime(lock, (time.time() - 3600,) * 2)
    case.note("silent for an hour" if silent else "touched just now")

    def follow(refusal: str) -> None:
        _must_name(refusal, "process 1 on elsewhere", f"delete {lock}")
        if silent:
            raise Fault(f"a lock that was silent for an hour is not taken over: {refusal}")
        lock.unlink()

    case.finish(follow)


# --- machine -------------------------------------------------------------------------------------


def other_devices(case: Case) -> None:
    """Eight devices at first, four when the run goes on.

    Sums are added in another order on another number of devices. What is compared with is therefore
    an undisturbed run that goes from eight to four where the newest checkpoint was.
    """
    undisturbed = case.folder / "undisturbed"
    disturbed, case.workdir = case.workdir, undisturbed
    case.finish(devices=8, checkpoint__keep_last=NUM_STEPS)
    case.workdir = disturbed
    start = case.at_random_step(2 * SAVED_EVERY, devices=8, checkpoint__keep_last=NUM_STEPS)
    case.send(start, signal.SIGKILL)
    _stopped(case, start)
    newest = max(cli.saved_steps(disturbed), default=0)
    case.note(f"from checkpoint {newest} on")
    for step in cli.saved_steps(undisturbed):
        if step > newest:
            shutil.rmtree(undisturbed / "checkpoints" / str(step))
    for case.workdir in (undisturbed, disturbed):
        case.finish(devices=4, checkpoint__keep_last=NUM_STEPS)
    case.reference = undisturbed


# name -> what happens. In the order in which a campaign takes them, again and again.
KINDS: dict[str, Callable[[Case], None]] = {
    "killed": killed,
    "killed during a save": killed_during_a_save,
    "flipped bit in a checkpoint": flipped_bit,
    "full disk": full_disk,
    "second run": second_run,
    "SIGINT": interrupted,
    "cut file of a checkpoint": cut_file,
    "deleted file of a checkpoint": deleted_file,
    "SIGTERM": terminated,
    "told to stop twice": told_twice,
    "paused": paused,
    "data worker killed": worker_killed,
    "killed with data workers": parent_of_workers_killed,
    "folders not writable": not_writable,
    "config.json damaged": config_damaged,
    "data.json damaged": data_damaged,
    "metrics.jsonl damaged": metrics_damaged,
    "lock left behind": left_lock,
    "workdir moved": moved,
    "other number of devices": other_devices,
    "foreign files": foreign_files,
    "stopped in the first compile": stopped_in_the_first_compile,
}
