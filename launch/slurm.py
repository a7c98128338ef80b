"""Writes a script for Slurm and submits it.

  python -m launch.slurm --config dsmoe_l --workdir /shared/runs/dsmoe_l --accelerator h100:32 \\
      --time 24:00:00 --dry_run
  python -m launch.slurm --config dsmoe_l --workdir /shared/runs/dsmoe_l --accelerator h100:32 \\
      --tasks-per gpu --sbatch=--partition=gpu --sbatch=--account=lab

Two minutes before the time is up, or when Slurm preempts the job, training saves and the job is put
back into the queue, where it goes on from what it saved. docs/pods.md has the rest.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import job as jobs
from launch.job import MOST_INTERRUPTIONS, PACKAGE, RUN_AGAIN, SHORTEST, USER_ERROR, Job
from moe_diffusion.checks import require
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.writing import save_text

WARNING = 120  # seconds between the signal and the end of the time
STRAGGLE = 600  # seconds that other tasks may take after the first has ended

_RUN = """
# The signal reaches the tasks of the step. The shell must outlive them, to read their code.
trap : TERM
srun --wait={straggle} {command}
code=$?

# {again}: the state is saved, run again. {user}: a mistake that running again does not mend.
# Slurm counts how often the job was put back, which bounds both kinds of restart.
count=${{SLURM_RESTART_COUNT:-0}}
limit={crashes}
if [ "$code" -eq {again} ] && [ "$SECONDS" -ge {shortest} ]; then limit={interruptions}; fi
if [ "$code" -ne 0 ] && [ "$code" -ne {user} ] && [ "$count" -lt "$limit" ]; then
    echo "code $code after $SECONDS s: back into the queue, time $((count + 1)) of at most $limit"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def script(job: Job, tasks_per: str, python: str, time: str, sbatch: Sequence[str]) -> str:
    """The text of the batch script.

    Args:
      tasks_per: "node" (a process drives all GPUs of its node) or "gpu".
      python: of the environment that has the library.
      time: limit of one run, as Slurm writes it; "" for that of the partition.
      sbatch: further options, like --partition=gpu.
    """
    gpus = jobs.gpus_per_node(job) if job.accelerator.platform == "cuda" else 0
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={gpus if tasks_per == 'gpu' else 1}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *([f"--time={time}"] if time else []),
        f"--signal=TERM@{WARNING}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        *sbatch,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines += jobs.exports(job)
    if job.accelerator.platform == "cpu":
        lines.append("export JAX_PLATFORMS=cpu")
    elif tasks_per == "node":
        # On Slurm jax gives a task one GPU, the one with its number, unless it is told otherwise.
        lines.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}")
    command = shlex.join([python, "-m", f"{PACKAGE}.{job.command}", *job.words[1:]])
    body = _RUN.format(
        straggle=STRAGGLE,
        command=command,
        again=RUN_AGAIN,
        user=USER_ERROR,
        crashes=job.max_restarts,
        interruptions=MOST_INTERRUPTIONS,
        shortest=SHORTEST,
    )
    return "\n".join(lines) + "\n" + body


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = jobs.make_parser("slurm", __doc__)
    add = parser.add_argument
    add("--tasks-per", choices=("node", "gpu"), default="node",
        help="a process for each of them (%(default)s)")  # fmt: skip
    add(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="that has the library, on all nodes",
    )
    add("--time", default="", help="limit of one run, like 24:00:00")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch; repeatable")
    add("--script", default="", metavar="FILE", help="where the script is kept (<name>.sbatch)")
    args, job = jobs.parse(parser, argv)
    chips = job.accelerator
    require(chips.platform != "tpu", f"--accelerator {chips}: TPUs have no Slurm; see docs/pods.md")
    require(
        args.tasks_per == "node" or chips.platform == "cuda",
        f"--tasks-per gpu needs GPUs, and --accelerator is {chips}",
    )
    for option in args.sbatch:
        require(
            option.startswith("--") and option.isprintable(),
            f"--sbatch {option} is no option: write --sbatch=--partition=gpu",
        )
    text = script(job, args.tasks_per, args.python, args.time, args.sbatch)
    path = Path(args.script or f"{job.name}.sbatch")
    if job.hosts > 1 and job.workdir and job.is_local:
        print(
            f"warning: --workdir {job.workdir} must be one folder that all {job.hosts} nodes share",
            file=sys.stderr,
        )
    if args.dry_run:
        print(f"# {path}\n{text}# end of {path}")
    else:
        save_text(text, path)
    sys.exit(jobs.run(["sbatch", os.fspath(path)], args.dry_run))


if __name__ == "__main__":
    main()
