"""Rents a TPU VM, trains there until the end, and gives it back.

  python -m launch.tpu_vm --accelerator v5e-16 --zone us-west4-a --spot \\
      --config dsmoe_b --workdir gs://bucket/dsmoe_b --dry_run
  python -m launch.tpu_vm --accelerator v5p:4x4x4 --slices 2 --zone us-east5-a --reserved \\
      --install dist/moe_diffusion-0.1.0-py3-none-any.whl \\
      --config dsmoe_3b --workdir gs://bucket/dsmoe_3b

It creates the TPU, waits until it is there, installs the library on every host, and runs the
command. When training was interrupted it runs the command again, on a new TPU if the old one is
gone. Keep it running, for example in tmux. docs/pods.md has the rest.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import job as jobs
from launch.accelerators import TPUS
from launch.job import MOST_INTERRUPTIONS, PACKAGE, RUN_AGAIN, SHORTEST, USER_ERROR, Job
from moe_diffusion.checks import require
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.errors import UserError

EVERY = 15.0  # seconds between two looks at a TPU that is not there yet
_READY = ("READY", "ACTIVE")
_COMING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING", "ACCEPTED", "PROVISIONING",
           "CREATING_RESOURCE", "WAITING_FOR_RESOURCES")  # fmt: skip
_TRIES = 5  # of asking for the state
_PYTHON = "3.11"  # the images of TPU VMs have an older one


@dataclass(frozen=True)
class Machine:
    """The commands of gcloud for one TPU, or for a queued resource of one or several slices.

    Attributes:
      flags: of creation: how it is paid for.
      where: --project and --zone.
    """

    job: Job
    queued: bool
    flags: tuple[str, ...]
    where: tuple[str, ...]
    gcloud: str = "gcloud"

    def _begin(self, verb: str, *words: str) -> list[str]:
        kind = "queued-resources" if self.queued else "tpu-vm"
        return [self.gcloud, "compute", "tpus", kind, verb, *words, *self.where, "--quiet"]

    def create(self) -> list[str]:
        """Asks for the TPU."""
        job, chips = self.job, self.job.accelerator
        runtime = TPUS[chips.kind].runtime
        if len(chips.shape) == 3:  # several shapes have the same number of chips
            shape = [f"--type={TPUS[chips.kind].cloud}", f"--topology={chips.topology}"]
        else:
            shape = [f"--accelerator-type={chips.cloud_type}"]
        if not self.queued:
            return self._begin("create", job.name, *shape, f"--version={runtime}", *self.flags)
        nodes = [f"--node-id={job.name}"]
        if job.slices > 1:
            nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
        shape += [f"--runtime-version={runtime}", *nodes]
        return self._begin("create", job.name, *shape, *self.flags)

    def describe(self) -> list[str]:
        """Prints the state, one word."""
        state = "state.state" if self.queued else "state"
        return self._begin("describe", self.job.name, f"--format=value({state})")

    def copy(self, files: Sequence[Path]) -> list[str]:
        """Copies files into the home folder of every host."""
        return self._begin("scp", *map(str, files), f"{self.job.name}:", *self._everywhere())

    def ssh(self, script: str) -> list[str]:
        """Runs a script on every host at once."""
        return self._begin("ssh", self.job.name, *self._everywhere(), f"--command={script}")

    def delete(self) -> list[str]:
        """Gives the TPU back."""
        return self._begin("delete", self.job.name, *(["--force"] if self.queued else []))

    def _everywhere(self) -> list[str]:
        # Hosts wait for each other: in batches, as gcloud has it by default, they would for ever.
        nodes = ["--node=all"] if self.queued else []
        return [*nodes, "--worker=all", "--batch-size=all"]


def files_to_copy(job: Job, install: str) -> list[Path]:
    """The files that the hosts need: a wheel, and a config of the user's own."""
    wheel = [Path(install)] if install.endswith(".whl") else []
    return wheel + ([job.own_config] if job.own_config else [])


def install_script(job: Job, install: str) -> str:
    """What every host runs first. install: a wheel, or what pip calls a requirement."""
    package = f"{PACKAGE}[tpu] @ {install}"
    if install.endswith(".whl"):
        package = f"./{Path(install).name}[tpu]"
    return " && ".join(
        [
            "python3 -m pip install --quiet --user uv",
            f"python3 -m uv venv --quiet --allow-existing --python {_PYTHON} moe",
            shlex.join(["python3", "-m", "uv", "pip", "install", "--quiet", "--python", "moe"])
            + f" {shlex.join([package, *job.drivers])}",
        ]
    )


def run_script(job: Job) -> str:
    """What every host runs then: the command, after what an earlier one may have left is ended."""
    words = list(job.words)
    if job.own_config:
        _, colon, arg = job.config.partition(":")
        words[words.index(job.config)] = job.own_config.name + colon + arg
    return "; ".join(
        [
            "[ ! -f job.pid ] || kill -9 $(cat job.pid) 2> /dev/null",
            *jobs.exports(job),
            f"moe/bin/moe-diffusion {shlex.join(words)} & echo $! > job.pid",
            "wait $!; code=$?; rm job.pid; exit $code",
        ]
    )


def keep_running(
    machine: Machine, install: str, wait: float, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Runs the job to its end, whatever is done to the TPU; returns the job's last exit code.

    Args:
      install: what is installed.
      wait: seconds that a TPU may take to come.
      sleep: for tests.

    Raises:
      UserError: the TPU does not come, or cannot be used.
    """
    crashes = 0
    for attempt in range(MOST_INTERRUPTIONS):
        _obtain(machine, wait, sleep, patient=attempt > 0)
        begin = time.monotonic()
        code = _prepare_and_run(machine, install)
        if code in (0, USER_ERROR):
            return code
        state = _state(machine, sleep)
        if state not in _READY:
            print(f"the TPU is gone ({state or 'deleted'}): another one goes on", flush=True)
        elif code == RUN_AGAIN and time.monotonic() - begin >= SHORTEST:
            print("interrupted, and saved: the same command goes on", flush=True)
        else:
            crashes += 1
            if crashes > machine.job.max_restarts:
                print(f"code {code}, crash {crashes}: no more restarts", file=sys.stderr)
                return code
            print(f"code {code}, crash {crashes} of {machine.job.max_restarts}", flush=True)
    print(f"interrupted {MOST_INTERRUPTIONS} times: no more restarts", file=sys.stderr)
    return code


def _prepare_and_run(machine: Machine, install: str) -> int:
    files = files_to_copy(machine.job, install)
    for command in [*([machine.copy(files)] if files else []),
                    machine.ssh(install_script(machine.job, install))]:  # fmt: skip
        if code := jobs.run(command):
            # A mistake in what is installed looks like a broken line: it may be tried again.
            return 1 if code == USER_ERROR else code
    return jobs.run(machine.ssh(run_script(machine.job)))


def _obtain(machine: Machine, wait: float, sleep: Callable[[float], None], patient: bool) -> None:
    """Returns when the TPU is there; one that is dead is deleted and created anew.

    patient: try again where none can be created; there was one before.
    """
    waited = 0.0
    while (state := _state(machine, sleep)) not in _READY:
        if state and state not in _COMING:
            jobs.run(machine.delete())
        if state not in _COMING and jobs.run(machine.create()) and not patient:
            raise UserError(
                f"no TPU {machine.job.name} could be created, and the message of gcloud says why: "
                "where none is free, --queued waits for one"
            )
        if waited >= wait:
            raise UserError(f"{machine.job.name} did not come within {wait:.0f} s: raise --wait")
        sleep(EVERY)
        waited += EVERY


def _state(machine: Machine, sleep: Callable[[float], None]) -> str:
    """The state of the TPU in one word; "" if there is none.

    Raises:
      UserError: gcloud cannot tell, several times in a row.
    """
    for _ in range(_TRIES):
        try:
            result = subprocess.run(machine.describe(), capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"there is no program {machine.gcloud} here: install it") from None
        if result.returncode == 0:
            return result.stdout.strip()
        if "NOT_FOUND" in result.stderr or "not found" in result.stderr:
            return ""
        sleep(EVERY)  # the network may be back then
    raise UserError(f"gcloud cannot describe {machine.job.name}: {result.stderr.strip()}")


def preview(machine: Machine, install: str, keep: bool) -> str:
    """The commands of an undisturbed run, and what is done when it is disturbed."""
    job, files = machine.job, files_to_copy(machine.job, install)
    again = f"# code {RUN_AGAIN}: run it again; the TPU is gone: begin anew; at most "
    again += f"{job.max_restarts} times after a crash; code {USER_ERROR}: end"
    lines = [
        shlex.join(machine.create()),
        f"# until it prints {' or '.join(_READY)}:",
        shlex.join(machine.describe()),
        *([shlex.join(machine.copy(files))] if files else []),
        shlex.join(machine.ssh(install_script(job, install))),
        shlex.join(machine.ssh(run_script(job))),
        again,
        *([] if keep else ["# at the end, whatever it is:", shlex.join(machine.delete())]),
    ]
    return "\n".join(lines)


def _machine(args, job: Job) -> Machine:
    chips = job.accelerator
    require(
        chips.platform == "tpu" and bool(TPUS[chips.kind].runtime),
        f"--accelerator {chips} is no TPU that comes as a VM: for tpu7x use launch.gke or "
        "launch.xpk, for GPUs launch.slurm",
    )
    require(not (args.spot and args.reserved), "--spot and --reserved exclude each other")
    flags = ["--spot"] if args.spot else ["--reserved"] if args.reserved else []
    where = [f"--{name}={getattr(args, name)}" for name in ("project", "zone")
             if getattr(args, name)]  # fmt: skip
    return Machine(job, args.queued or job.slices > 1, tuple(flags), tuple(where), args.gcloud)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = jobs.make_parser("tpu_vm", __doc__)
    add = parser.add_argument
    add("--zone", required=True, help="of Google Cloud")
    add("--project", default="", help="of Google Cloud (that of gcloud)")
    add("--spot", action="store_true", help="cheap, and taken away at any time")
    add("--reserved", action="store_true", help="from a reservation")
    add("--queued", action="store_true", help="a queued resource, which waits for a free TPU; "
        "several slices always are one")  # fmt: skip
    add("--wait", type=float, default=86400, metavar="S", help="for the TPU to come (%(default)s)")
    add("--install", required=True, metavar="WHAT",
        help="a wheel, or git+https://.../moe_diffusion@REF")  # fmt: skip
    add("--keep", action="store_true", help="leave the TPU at the end; it goes on costing")
    add("--gcloud", default="gcloud", metavar="PATH", help="the program (%(default)s)")
    args, job = jobs.parse(parser, argv)
    machine = _machine(args, job)
    if job.hosts > 1 or not args.keep:
        why = "is deleted with the TPU, and its hosts share no folder"
        jobs.require_remote(job, why, ", or use one host and --keep" if job.hosts == 1 else "")
    if args.install.endswith(".whl"):
        require(Path(args.install).is_file(), f"--install {args.install}: there is no such file")
    if args.dry_run:
        print(preview(machine, args.install, args.keep))
        return
    # Told to stop, this program gives the TPU back before it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = keep_running(machine, args.install, args.wait)
    finally:
        if not args.keep:
            jobs.run(machine.delete())
    sys.exit(code)


if __name__ == "__main__":
    main()
