"""Plays sbatch, srun and scontrol on this machine, by the name it is called with.

`sbatch` runs the script here and now, again as long as `scontrol requeue` asks for it, and ends
with its last exit code. `srun` starts the tasks as processes, which see the variables of a step.
STANDIN is a folder for what the three tell each other; PORT is where the first task listens, from
which jax computes it by the number of the job. The file `preempt` there, if it is there, has the
name of a file: once that has as many lines as the second word says, Slurm takes the job's first
place away, which is SIGTERM to all tasks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

LOWEST_PORT = 65535 - 2**12 + 1  # of jax, for Slurm
folder, me, words = Path(os.environ["STANDIN"]), Path(sys.argv[0]).name, sys.argv[1:]
requeued = folder / "requeued"


def option(text: str, name: str) -> str:
    return re.search(rf"^#SBATCH --{name}=(\S+)", text, re.MULTILINE)[1]


def sbatch(path: str) -> int:
    text = Path(path).read_text()
    nodes, tasks = int(option(text, "nodes")), int(option(text, "ntasks-per-node"))
    env = os.environ | {
        "SLURM_JOB_ID": str(int(os.environ.get("PORT", LOWEST_PORT)) - LOWEST_PORT),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks),
    }
    for count in range(1000):
        requeued.unlink(missing_ok=True)
        counted = {"SLURM_RESTART_COUNT": str(count)} if count else {}
        code = subprocess.run(["bash", path], env=env | counted).returncode
        if not requeued.exists():
            return code
    return 1


def srun(words: list[str]) -> int:
    command = [word for word in words if not word.startswith("--wait=")]
    nodes, tasks = (int(os.environ[f"SLURM_{n}"]) for n in ("JOB_NUM_NODES", "NTASKS"))
    step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": str(tasks)}
    step |= {"SLURM_STEP_NUM_NODES": str(nodes)}
    running = []
    for number in range(tasks):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % (tasks // nodes))}
        running.append(subprocess.Popen(command, env=os.environ | step | place))
    preempt(running)
    return max(process.wait() for process in running)


def preempt(tasks: list[subprocess.Popen]) -> None:
    """SIGTERM to all tasks, once in the life of a job, when it has come so far."""
    order = folder / "preempt"
    if not order.exists():
        return
    path, lines = order.read_text().split()
    order.unlink()
    while all(task.poll() is None for task in tasks):
        if Path(path).exists() and Path(path).read_text().count("\n") >= int(lines):
            for task in tasks:
                task.terminate()
            return
        time.sleep(0.1)


if me == "sbatch":
    sys.exit(sbatch(words[-1]))
if me == "srun":
    sys.exit(srun(words))
assert me == "scontrol" and words == ["requeue", os.environ["SLURM_JOB_ID"]], words
requeued.touch()
