"""The script of launch/slurm.py, run under programs that play sbatch, srun and scontrol."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from launch import slurm
from moe_diffusion.shipped import CHECKOUT
from tests import cli
from tests.launch import standins


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Puts the stand-ins first on the path; returns their folder."""
    names = ("sbatch", "srun", "scontrol")
    place = standins.install(tmp_path, "sbatch.py", *names)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends_with(words: str, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        slurm.main([*words.split(), *more])
    return ended.value.code or 0


# A program in the place of Python; every run ends with the next code of a file.
RUNS = """#!/bin/bash
[ "$SLURM_PROCID" = 0 ] || exit 0
echo run >> runs
code=$(head -1 codes); sed -i 1d codes
exit "${code:-0}"
"""


@pytest.mark.parametrize(
    "codes, shortest, last, runs",
    [
        ([], 0, 0, 1),
        ([75, 75, 75, 75], 0, 0, 5),  # interrupted more often than --max-restarts
        ([75, 75, 75, 75], 60, 75, 3),  # within a minute of its start: a crash
        ([1, 139], 0, 0, 3),
        ([1, 1, 1], 0, 1, 3),
        ([2], 0, 2, 1),
        ([75, 2], 0, 2, 2),
        ([75] * 9, 0, 75, 7),  # not for ever, here not after six times
    ],
)
def test_what_goes_back_into_the_queue(cluster, monkeypatch, codes, shortest, last, runs):
    monkeypatch.setattr(slurm, "SHORTEST", shortest)
    monkeypatch.setattr(slurm, "MOST_INTERRUPTIONS", 6)
    program = cluster / "python"
    program.write_text(RUNS)
    program.chmod(0o755)
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    words = f"--accelerator cpu --nodes 2 --config digits --workdir w --python {program}"
    assert ends_with(words, "--max-restarts", "2") == last
    assert Path("runs").read_text().count("run") == runs


def test_variables_reach_every_task(cluster):
    program = cluster / "python"
    program.write_text('#!/bin/bash\nenv > "env.$SLURM_PROCID"\necho "$@" > args\n')
    program.chmod(0o755)
    words = f"--accelerator h100:4 --nodes 2 --config digits --workdir w --python {program}"
    assert ends_with(words, "--tasks-per", "gpu", "--env", "NOTE=a 'b' $c") == 0
    tasks = [Path(f"env.{number}").read_text().splitlines() for number in range(4)]
    for number, task in enumerate(tasks):
        assert {f"SLURM_LOCALID={number % 2}", "SLURM_STEP_NUM_TASKS=4"} <= set(task)
        assert "NOTE=a 'b' $c" in task
        assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true" in task
    assert Path("args").read_text() == "-m moe_diffusion.train --config digits --workdir w\n"
    assert ends_with(words) == 0  # a process for the two GPUs of a node
    assert "JAX_LOCAL_DEVICE_IDS=0,1" in Path("env.1").read_text().splitlines()


def test_the_signal_reaches_the_tasks_and_the_shell_outlives_it(cluster):
    """SIGTERM to the shell alone, as when Slurm preempts: it waits for the tasks and their code."""
    program = cluster / "python"
    program.write_text(
        '#!/bin/bash\n[ "$SLURM_PROCID" = 0 ] && kill $(cat shell)\nsleep 0.2\nexit 2\n'
    )
    program.chmod(0o755)
    words = f"--accelerator cpu --config digits --workdir w --python {program}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slurm.jobs, "run", lambda *_: 0)
        assert ends_with(words) == 0
    script = Path("digits.sbatch")
    script.write_text(script.read_text().replace("trap :", "echo $$ > shell\ntrap :"))
    assert subprocess.run(["sbatch", script]).returncode == 2


@pytest.mark.slow
def test_two_tasks_train_together_and_go_on_after_a_preemption(cluster, capfd, monkeypatch):
    """jax finds the first task by Slurm's variables, and two processes train over loopback.

    SIGTERM at the third step: both save the same step and end with 75, the job goes back into the
    queue, and its second run makes the steps that are missing.
    """
    for name, value in cli.environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("PORT", str(free_port()))
    monkeypatch.setattr(slurm, "SHORTEST", 0)
    steps, run = 60, cluster / "run"
    (cluster / "preempt").write_text(f"{run}/metrics.jsonl 3")
    # Steps that wait for their data, because jax looks for the signal once a second.
    slow = {"data__source": "tests.campaign.slow:Slow", "data__prefetch": 1}
    settings = cli.digits(train__num_steps=steps, checkpoint__every=1000, **slow)[2:]
    words = f"--accelerator cpu --nodes 2 --config digits --workdir {run} --name two"
    assert ends_with(words, "--max-restarts", "0", *settings) == 0
    output = capfd.readouterr().out
    assert output.count("waiting for 2 processes of this Slurm step on 127.0.0.1") == 4
    assert output.count("2 x cpu, preset") == 2  # one process speaks, of both their devices
    stopped = int(
        re.search(r"stopped by SIGTERM after step (\d+) of 60, which is saved", output)[1]
    )
    assert 3 <= stopped < steps
    assert re.search(r"code 75 after \d+ s: back into the queue, time 1 of at most 100", output)
    made = [int(step) for step in re.findall(rf"^step (\d+)/{steps}:", output, re.MULTILINE)]
    assert made == list(range(1, steps + 1))  # by the two runs together, each once
    assert [line["step"] for line in cli.metrics(run)] == made
    assert cli.saved_steps(run) == [stopped, steps]
    for step in (stopped, steps):
        parts = (run / "checkpoints" / str(step) / "state").glob("ocdbt*")
        assert {path.name for path in parts} == {"ocdbt.process_0", "ocdbt.process_1"}


def free_port() -> int:
    """A port of those that jax takes on Slurm."""
    for port in range(61440 + os.getpid() % 2000, 65535):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")
