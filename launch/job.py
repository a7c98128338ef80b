"""The description of a job that all launchers share, the flags that make one, and its checks."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import accelerators
from launch.accelerators import Accelerator
from moe_diffusion import remote, shipped, xla_flags
from moe_diffusion.checks import require
from moe_diffusion.cli import Parser
from moe_diffusion.errors import UserError

# Exit codes of the commands. 75 is EX_TEMPFAIL: the state is saved, run the same command again.
# It is moe_diffusion.signals.RUN_AGAIN, in a module that imports jax.
RUN_AGAIN = 75
USER_ERROR = 2
# A job that asks to be run again sooner than this has not been interrupted: it counts as a crash.
SHORTEST = 60  # seconds
MOST_INTERRUPTIONS = 100  # how often a job is run again in all, so that none goes on for ever

COMMANDS = ("train", "distill", "prepare", "sample", "evaluate")
_TRAINING = ("train", "distill")
PACKAGE = "moe_diffusion"


@dataclass(frozen=True)
class Job:
    """What runs, on what, and where it leaves its files.

    Attributes:
      name: of the job; a name of Kubernetes, which all clusters accept.
      command: of `moe-diffusion`.
      config: a config file or its name, perhaps with an argument; "" for commands without one.
      overrides: keys of the config, like "--config.seed=1".
      arguments: further words for the command.
      workdir: folder of the run; local or remote (of `prepare`: its --out).
      accelerator: one slice of TPUs, all GPUs, or CPUs.
      slices: TPU slices that train together.
      nodes: machines of one slice, or of all GPUs or CPUs.
      image: of a container, where the cluster runs containers.
      environment: variables of the job, the compilers' flags included.
      max_restarts: after crashes; being interrupted does not count.
    """

    name: str
    command: str = "train"
    config: str = ""
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    workdir: str = ""
    accelerator: Accelerator = Accelerator("cpu", ())
    slices: int = 1
    nodes: int = 1
    image: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 3

    @property
    def words(self) -> list[str]:
        """The command line after `moe-diffusion`."""
        config = [*(["--config", self.config] if self.config else []), *self.overrides]
        flag = "--out" if self.command == "prepare" else "--workdir"
        workdir = [flag, self.workdir] if self.workdir else []
        return [self.command, *config, *workdir, *self.arguments]

    @property
    def hosts(self) -> int:
        """Machines of the whole job."""
        return self.nodes * self.slices

    @property
    def is_local(self) -> bool:
        """Whether the workdir lies on the machines that run the job."""
        return not remote.is_remote(self.workdir)

    @property
    def own_config(self) -> Path | None:
        """The config file, unless it is one that comes with the package."""
        path = shipped.find(self.config.partition(":")[0]) if self.config else None
        return None if path is None or shipped.FOLDER in path.resolve().parents else path

    @property
    def drivers(self) -> tuple[str, ...]:
        """Packages that read and write at a remote workdir."""
        return remote.DRIVERS.get(self.workdir.partition("://")[0], ())


class LaunchParser(Parser):
    """The parser of a launcher. The drivers of a remote folder are needed where the job runs."""

    def __init__(self, name: str, doc: str):
        super().__init__(name, doc)
        self.prog = f"python -m launch.{name}"

    def _check_remote(self, parsed: argparse.Namespace) -> None:
        scheme, _, rest = parsed.workdir.partition("://")
        if rest and scheme not in remote.DRIVERS:
            known = " and ".join(f"{name}://" for name in remote.DRIVERS)
            raise UserError(
                f"--workdir {parsed.workdir}: {scheme}:// is not supported; {known} are"
            )


def make_parser(name: str, doc: str) -> LaunchParser:
    """A parser with the flags that all launchers share."""
    parser = LaunchParser(name, doc)
    add = parser.add_argument
    add("--accelerator", required=True, metavar="CHIPS",
        help="as `plan` spells topologies, like v5e:16x16 or h100:8; v5e-256; cpu")  # fmt: skip
    add("--command", choices=COMMANDS, default="train", help="what to run (%(default)s)")
    add("--config", default="", metavar="NAME", help="config, as for the command")
    add("--workdir", default="", metavar="DIR", help="folder of the run, like gs://bucket/run")
    add("--name", default="", help="of the job (that of the config)")
    add("--slices", type=int, default=1, metavar="N", help="TPU slices (%(default)s)")
    add(
        "--nodes", type=int, default=0, metavar="N", help="machines of GPUs or CPUs (as few as can)"
    )
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="of the job; repeatable")
    add("--max-restarts", type=int, default=3, metavar="N", help="after crashes (%(default)s)")
    add("--no-xla-flags", action="store_true", help="leave out the flags of docs/pods.md")
    add("--dry_run", "--dry-run", action="store_true", help="print what would run, run nothing")
    return parser


def parse(parser: LaunchParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Job]:
    """The flags and the job that they describe. Words after `--` go to the command.

    Raises:
      UserError: something of it cannot be.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args, overrides = parser.parse_with_overrides(words[:cut])
    accelerator = accelerators.parse(args.accelerator)
    config = args.config
    job = Job(
        name=args.name or _name_of(config or args.command),
        command=args.command,
        config=config,
        overrides=tuple(overrides),
        arguments=tuple(words[cut + 1 :]),
        workdir=args.workdir,
        accelerator=accelerator,
        slices=args.slices,
        nodes=args.nodes or accelerator.hosts,
        image=getattr(args, "image", ""),
        environment=_environment(args, accelerator),
        max_restarts=args.max_restarts,
    )
    check(job)
    return args, job


def check(job: Job) -> None:
    """Raises a UserError unless the job can be."""
    require(
        len(job.name) <= 40 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.name) is not None,
        f"--name {job.name} is no name for a cluster: take at most 40 of a-z, 0-9 and -, "
        "beginning with a letter",
    )
    needed = {"--config": job.config} if job.command in _TRAINING else {}
    if job.command != "prepare":
        needed["--workdir"] = job.workdir
    for flag, value in needed.items():
        require(bool(value), f"--command {job.command} needs {flag}")
    require(
        not job.overrides or bool(job.config),
        f"{' '.join(job.overrides)} sets keys of a config, and no --config is given",
    )
    require(
        not job.config or job.command in _TRAINING,
        f"--command {job.command} takes no --config: the workdir has it",
    )
    file = job.config.partition(":")[0]
    require(
        not file or shipped.find(file) is not None,
        f"--config {job.config}: there is no such file; `moe-diffusion train --config list` shows "
        "those of the project",
    )
    for flag, value in (("--slices", job.slices), ("--nodes", job.nodes)):
        require(value >= 1, f"{flag} {value} must be at least 1")
    require(job.max_restarts >= 0, f"--max-restarts {job.max_restarts} must not be negative")
    _check_nodes(job)


def _check_nodes(job: Job) -> None:
    chips, platform = job.accelerator, job.accelerator.platform
    require(
        job.slices == 1 or platform == "tpu",
        f"--slices {job.slices} are of TPUs; of {chips} raise the number: {chips.kind}:64",
    )
    if platform == "tpu":
        require(
            job.nodes == chips.hosts,
            f"--nodes {job.nodes}: a slice {chips} has {chips.hosts} hosts; leave the flag out",
        )
    elif platform == "cuda":
        require(
            chips.chips % job.nodes == 0 and job.nodes >= chips.hosts,
            f"--nodes {job.nodes}: {chips} are {chips.chips} GPUs, which cannot be shared evenly "
            f"by as many hosts of at most {accelerators.GPUS_PER_HOST}",
        )


def require_remote(job: Job, why: str, way_out: str) -> None:
    """Raises a UserError if the workdir is local, and so would be lost.

    Args:
      why: what becomes of local files there.
      way_out: what else there is than a remote folder; "" if nothing.
    """
    require(
        not job.workdir or not job.is_local,
        f"--workdir {job.workdir} is local, and {why}: name a remote one, like "
        f"gs://bucket/{job.name}{way_out}",
    )


def _name_of(config: str) -> str:
    """A name for the job from that of a config file: "configs/dsmoe_l.py" -> "dsmoe-l"."""
    stem = Path(config.partition(":")[0]).stem.lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40]


def _environment(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, str]:
    """The variables that the user gave, and the compilers' flags."""
    given = {}
    for text in args.env:
        name, equals, value = text.partition("=")
        require(
            bool(equals) and re.fullmatch(r"[A-Za-z_]\w*", name) is not None,
            f"--env {text} is no variable: write NAME=VALUE",
        )
        require("\n" not in value, f"--env {name} has several lines: write one")
        given[name] = value
    if args.no_xla_flags:
        return {**given, xla_flags.SWITCH: "off"}
    hardware = {"devices": accelerator.chips, "slices": args.slices}
    wanted = xla_flags.for_hardware(accelerator.platform, **hardware)
    return given | xla_flags.merged(wanted, given)


def exports(job: Job) -> list[str]:
    """Lines of a shell script that set the variables of the job."""
    return [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]


def run(command: Sequence[str], dry_run: bool = False) -> int:
    """Prints a command, and runs it unless this is a dry run; returns its exit code.

    Raises:
      UserError: there is no such program.
    """
    print(shlex.join(command), flush=True)
    if dry_run:
        return 0
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        raise UserError(f"there is no program {command[0]} here: install it, or name it") from None


def gpus_per_node(job: Job) -> int:
    """GPUs of one machine of the job."""
    return math.ceil(job.accelerator.chips / job.nodes)


def repository() -> str:
    """The folder of the checkout that holds this file."""
    return os.fspath(Path(__file__).resolve().parents[1])


def tell_of_own_config(job: Job) -> None:
    """Warns that a config file of the user's own must be in the image."""
    if job.own_config:
        print(f"warning: {job.own_config} must lie in the image, too", file=sys.stderr)
