from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from moe_diffusion import clusters
from moe_diffusion.errors import UserError
from moe_diffusion.parallel import distributed
from tests import cli

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys, time
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from moe_diffusion.parallel import distributed
distributed.initialize()
from moe_diffusion.training.loop import train
from tests.training import toy

workdir, steps, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
config = toy.make_config(
    parallel__preset="fsdp", optim__accumulate=2, optim__eps=1e-3, train__num_steps=steps,
    train__log_every=1, checkpoint__every=1000, optim__trainable=("*/kernel",),
)
# Not all of the parameters are trained, and there is something that is given.
frozen = {"host": np.arange(16.0), "device": jax.device_put(np.ones(3), jax.local_devices()[0])}

def loss_fn(params, router_state, batch, key, frozen):
    loss, aux = toy.loss_fn(params, router_state, batch, key)
    return loss + 1e-3 * frozen["host"].sum() * frozen["device"].mean(), aux

class Part(toy.Batches):
    def __next__(self):
        time.sleep(seconds)
        size = self.batch_size // jax.process_count()
        part = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
        return {name: value[part] for name, value in super().__next__().items()}

train(config, toy.Toy(), loss_fn, lambda: Part(16), workdir, frozen=frozen)
"""


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]"}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1"}


def test_a_single_host_needs_nothing(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: called.append(a))
    distributed.initialize()
    assert not called and distributed.is_main_process()


@pytest.mark.parametrize(
    "env,arguments",
    [
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            (("a:1", 2, 1), {}, "2 processes at a:1"),
        ),
        (SLURM | {"SLURM_NTASKS": "2"}, ((), {"num_processes": 2}, "2 processes of this Slurm")),
        (
            SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"},
            ((), {"num_processes": 2}, "2 processes of this Slurm step on n[1-2]"),
        ),
        # A single process inside of an allocation for eight waits for nobody.
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ((), {}, "4 processes of mpirun")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ((), {}, "the hosts of the TPU: a,b")),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, None),
    ],
)
def test_clusters_are_recognised(monkeypatch, env, arguments, capsys):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: called.append((a, k)))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    output = capsys.readouterr().out
    if arguments is None:
        assert called == [] and output == ""
    else:
        args, cluster, whom = arguments
        assert called == [(args, cluster | {"initialization_timeout": 600} | clusters._NOTICE)]
        assert output.startswith(f"waiting for {whom}") and output.endswith(", at most 300 s\n")


@pytest.mark.parametrize(
    "env,message",
    [
        (
            {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"},
            "WORLD_SIZE=4 .* or unset WORLD_SIZE",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (JAX | {"JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES is not set"),
        (JAX | {"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not set"),
        (JAX | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=two is no"),
        (
            JAX | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "cannot connect 2 processes at a:1",
        ),
    ],
)
def test_what_cannot_be_a_cluster_is_refused(monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize()


def test_nobody_waits_longer_than_it_says(tmp_path):
    """The second of two processes is never started."""
    code = "from moe_diffusion import clusters; clusters.WAIT = 2;clusters.initialize()"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | cluster,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.stdout == f"waiting for 2 processes at {address}, at most 2 s\n"
    error = cli.the_one_error(result.returncode, result.stderr)
    assert error.startswith(f"2 processes at {address} did not all come within 2 s: start all of")


def start(workdir, processes, steps, seconds=0.0):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }
    command = [sys.executable, "-c", WORKER, str(workdir), str(steps), str(seconds)]
    return [
        subprocess.Popen(command, env=env | own, stdout=subprocess.PIPE)
        for own in cli.cluster(processes)
    ]


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """SIGTERM to one of two: both save the same step, and one alone resumes with equal losses."""
    pair = start(tmp_path / "run", 2, 500, seconds=0.1)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 2:
        assert all(process.poll() is None for process in pair)
        time.sleep(0.2)
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=cli.HANGS_AFTER)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "stopped by SIGTERM after step" in outputs[0]
    assert "stopped" not in outputs[1]  # only the main process speaks
    stopped = max(losses(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [str(stopped)]
    noted = tmp_path / "run" / "checkpoints" / str(stopped) / "state" / "digests.json"
    # Each process has read back its own files; the first did so with what belongs to all.
    owners = {name.split("/")[0] for name in json.loads(noted.read_text())["files"]}
    assert owners >= {"ocdbt.process_0", "ocdbt.process_1", "manifest.ocdbt", "_METADATA"}
    assert not list(noted.parent.glob("digests.*.part"))
    for workdir in (tmp_path / "run", tmp_path / "alone"):
        (process,) = start(workdir, 1, stopped + 3)
        process.communicate(timeout=cli.HANGS_AFTER)
        assert process.returncode == 0
    assert list(losses(tmp_path / "run")) == list(range(1, stopped + 4))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
